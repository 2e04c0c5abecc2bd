"""Print a program as C: the header, and the source with the functions of ``runtime/`` that it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources

import numpy
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from unrolled._version import __version__
from unrolled.export.c_functions import step_functions
from unrolled.export.c_ops import in_c
from unrolled.export.kernels import ALIGNMENT
from unrolled.export.layout import PADDING, Layout, PlacedStage
from unrolled.export.program import Value, largest
from unrolled.export.templates import fill, template

FORMAT = (
    1  # of the weights, the memory and the functions; a change that old code can't read gets the next number
)
_MAGIC = 0x57524E55  # "UNRW"
# The parts of the runtime in order, each with the parts that it needs.
_RUNTIME = {
    "vectors": (),
    "reductions": (),
    "roots": (),
    "integers": (),
    "exponential": (),
    "logarithm": ("exponential",),
    "wide": ("roots", "integers"),
    "trigonometric": ("wide", "exponential"),
    "int8": (),
    "sixteen_bits": (),
}


_DEFINITION = r"^(?:ALWAYS_INLINE|static inline) \w+ (v_\w+)\("


class CSource:
    """The C of a program.

    Args:
        name: Prefix of all names.
        layout: The program and its arrays.
        example: An input for the self-test.
        expected: Its output.
        weights_in_file: Whether the weights are a file that the caller loads, not an array in the source.
    """

    def __init__(
        self, name: str, layout: Layout, example: Tensor, expected: Tensor, weights_in_file: bool
    ) -> None:
        self.name, self.layout, self.in_file = name, layout, weights_in_file
        self.program = layout.program
        self.has_words = bool(layout.words.numel())
        self.has_int8 = any(placed.step.row_offsets for placed in layout.stages)
        self.example, self.expected = example, expected
        self.functions = self._functions()

    def _functions(self) -> dict[int, str]:
        """Return the name of the step function of each stage; equal ones share it."""
        self.texts: dict[str, str] = {}
        names = {}
        for index, placed in enumerate(self.layout.stages):
            text = step_functions("step", placed.step)
            names[index] = self.texts.setdefault(text, f"step{len(self.texts)}")
        return names

    # --- the header ---

    def header(self) -> str:
        """Return the header."""
        x = self.x_type()
        return fill(
            template("model.h"),
            name=self.name,
            NAME=self.name.upper(),
            version=__version__,
            format=FORMAT,
            input=self.program.input.width,
            output=self.program.output.width,
            memory=self.layout.memory,
            bytes=4 * self._size(),
            x=x,
            pointer="  const float *weights; /* set by init */\n" if self.in_file else "",
            init=self.init_declaration(),
            step=""
            if self.program.bidirectional
            else fill(template("step.h"), name=self.name, x=self.x_type()),
            run=self.run_declaration(),
            run_comment=_BIDIRECTIONAL if self.program.bidirectional else _CAUSAL,
            work=self._sequence_width(),
        )

    def x_type(self) -> str:
        """Return the type of the input."""
        return "float" if self.program.lookup is None else "int32_t"

    def init_declaration(self) -> str:
        """Return the declaration of the function that prepares a state."""
        extra = ", const void *weights, size_t size" if self.in_file else ""
        return f"int {self.name}_init({self.name}_state *state{extra})"

    def run_declaration(self) -> str:
        """Return the declaration of the function that runs several steps."""
        extra = ", float *work" if self.program.bidirectional else ""
        start = f"void {self.name}_run({self.name}_state *state, const {self.x_type()} *x, float *y"
        return f"{start}, size_t steps{extra})"

    def declarations(self) -> dict[str, str]:
        """Return the declarations of all functions by name."""
        name, state = self.name, f"{self.name}_state *state"
        declarations = {
            f"{name}_init": self.init_declaration(),
            f"{name}_reset": f"void {name}_reset({state})",
            f"{name}_step": f"void {name}_step({state}, const {self.x_type()} *x, float *y)",
            f"{name}_run": self.run_declaration(),
            f"{name}_selftest": f"int {name}_selftest({state}, float *difference)",
        }
        if self.program.bidirectional:
            del declarations[f"{name}_step"]
        return declarations

    # --- the source ---

    def source(self) -> str:
        """Return the source."""
        parts = [
            fill(template("top.c"), name=self.name, NAME=self.name.upper(), version=__version__),
            *self._runtime(),
            *(text.replace("step", name) for text, name in self.texts.items()),
            self._weights(),
            *self._api(),
        ]
        return "\n".join(parts)

    def _runtime(self) -> Iterator[str]:
        """Yield the parts of the runtime whose functions are used."""
        used = set(re.findall(r"\bv_\w+", "".join(self.texts)))
        texts = {
            part: (resources.files(__package__) / "runtime" / f"{part}.h").read_text(encoding="ascii")
            for part in _RUNTIME
        }
        needed = {"vectors"}
        for part in reversed(_RUNTIME):
            if part in needed or not used.isdisjoint(re.findall(r"\b(v_\w+)\(", texts[part])):
                defined = set(re.findall(_DEFINITION, texts[part], re.MULTILINE))
                if part in needed or used & defined:
                    needed |= {part, *_RUNTIME[part]}
        yield from (texts[part] for part in _RUNTIME if part in needed)

    def _weights(self) -> str:
        if self.in_file:
            return ""
        text = f"static const float WEIGHTS[] ALIGNED = {{\n{_numbers(self._padded_weights())}\n}};\n"
        if self.has_words:
            text += f"static const uint32_t WORDS[] ALIGNED = {{\n{_words(self._padded_words())}\n}};\n"
        return text

    def _padded_weights(self) -> Tensor:
        padding = PADDING
        if self.has_words:  # those in a file begin at a cache line, too
            padding += -(self.layout.weights.numel() + PADDING) % ALIGNMENT
        return F.pad(self.layout.weights, (0, padding))

    def _padded_words(self) -> Tensor:
        return F.pad(self.layout.words, (0, PADDING if self.has_words else 0))

    def _size(self) -> int:
        """Return how many numbers and words there are."""
        return self._padded_weights().numel() + self._padded_words().numel()

    def weights_file(self) -> bytes:
        """Return the content of the file with the weights: a header of 64 bytes, and the weights."""
        header = numpy.array([_MAGIC, FORMAT, self._size(), 0], "<u4").tobytes() + bytes(48)
        weights = self._padded_weights().numpy().astype("<f4").tobytes()
        return header + weights + self._padded_words().numpy().astype("<i4").tobytes()

    def _pointers(self) -> list[str]:
        """Return the statements that define the pointers to the weights."""
        lines = [f"const float *const w = {'state->weights' if self.in_file else 'WEIGHTS'};"]
        if self.has_words:
            start = f"(const uint32_t *)(w + {self._padded_weights().numel()})"
            lines.append(f"const uint32_t *const words = {start if self.in_file else 'WORDS'};")
        return lines

    def _api(self) -> Iterator[str]:
        name, layout = self.name, self.layout
        weights = "state->weights" if self.in_file else "WEIGHTS"
        check = fill(template("init_file.c"), NAME=name.upper()) if self.in_file else ""
        yield (
            f"{self.init_declaration()} {{\n{check}  CLEAR(state->values, 0, sizeof state->values);\n"
            f"  {name}_reset(state);\n  return 0;\n}}\n"
        )
        yield f"void {name}_reset({name}_state *state) {{\n{self._reset(weights)}}}\n"
        sizes = self.program.input.width, self.program.output.width
        if self.program.bidirectional:
            yield self._sequence()
        else:
            yield (
                f"void {name}_step({name}_state *state, const {self.x_type()} *x, float *y) {{\n"
                f"{_lines(self._pointers())}"
                f"  float *const old = state->values + state->turn * {layout.states};\n"
                f"  float *const next = state->values + (1 - state->turn) * {layout.states};\n"
                f"  float *const work = state->values + {2 * layout.states};\n"
                f"{_lines(self._step())}  state->turn = 1 - state->turn;\n}}\n"
            )
            yield (
                f"{self.run_declaration()} {{\n  for (size_t t = 0; t < steps; t++)\n"
                f"    {name}_step(state, x + t * {sizes[0]}, y + t * {sizes[1]});\n}}\n"
            )
        yield self._selftest()

    def _reset(self, weights: str) -> str:
        # not with memset: gcc warns if the number of bytes happens to be that of the elements
        lines = [f"for (int i = 0; i < {2 * self.layout.states}; i++) state->values[i] = 0.0f;"]
        for placed in self.layout.stages:
            if placed.initial is not None:
                size = _bytes(placed.step.state_size)
                lines.append(f"COPY(state->values + {placed.states}, {weights} + {placed.initial}, {size});")
        return _lines([*lines, "state->turn = 0;"])

    def _step(self) -> Iterator[str]:
        """Yield the statements of one step."""
        places = {self.program.input: "x"}
        if self.program.lookup is not None:
            places[self.program.lookup.output] = self._row("x[0]")
        for index, placed in enumerate(self.layout.stages):
            stage = placed.stage
            x = places[stage.inputs[0]]
            if placed.gathered is not None:
                x, at = f"work + {placed.gathered}", placed.gathered
                for value in stage.inputs:
                    yield f"COPY(work + {at}, {places[value]}, {_bytes(value.width)});"
                    at += value.width
            yield self._call(index, placed, x, "old", "next")
            places[stage.output] = self._result(placed)
        yield f"COPY(y, {places[self.program.output]}, {_bytes(self.program.output.width)});"

    def _result(self, placed: PlacedStage) -> str:
        """Return where a step of a stage leaves its output."""
        if placed.stage.has_state:
            return f"next + {placed.states + placed.step.state_offsets[0]}"
        return f"work + {self.layout.values[placed.stage.output]}"

    def _call(self, index: int, placed: PlacedStage, x: str, old: str, new: str) -> str:
        """Return the call of a stage's step function."""
        states = f" + {placed.states}" if placed.states else ""
        old, new = f"{old}{states}", f"{new}{states}"
        if not placed.stage.has_state:
            new = self._result(placed)
        words = f"words + {placed.words}, " if placed.step.words.numel() else ""
        return f"{self.functions[index]}(w + {placed.weights}, {words}{x}, {old}, {new}, work);"

    def _row(self, index: str) -> str:
        """Return the row of the lookup's table, for an index that is clamped to the table."""
        lookup = self.program.lookup
        assert lookup is not None
        last = len(lookup.table) - 1
        row = f"({index} < 0 ? 0 : {index} > {last} ? {last} : {index})"
        return f"w + {self.layout.table} + {row} * {lookup.output.width}"

    # --- whole sequences, for models that also run from the last time step to the first ---

    def _between(self) -> list[Value]:
        """Return the values between input and output, which a sequence needs memory for."""
        outputs = dict.fromkeys(stage.output for stage in self.program.stages)
        lookup = [] if self.program.lookup is None else [self.program.lookup.output]
        return [*lookup, *(value for value in outputs if value is not self.program.output)]

    def _sequence_width(self) -> int:
        return sum(value.width for value in self._between()) if self.program.bidirectional else 0

    def _sequence(self) -> str:
        """Return the function that runs stage by stage over a sequence."""
        program, layout = self.program, self.layout
        places, at = {program.input: "x", program.output: "y"}, 0
        for value in self._between():
            places[value] = f"work_steps + {at} * steps" if at else "work_steps"
            at += value.width
        lines = [
            *self._pointers(),
            f"float *const work = state->values + {2 * layout.states};",
        ]
        lines += [f"{self.name}_reset(state);", "(void)work_steps;"]
        if program.lookup is not None:
            width = program.lookup.output.width
            target, row = f"{places[program.lookup.output]} + t * {width}", self._row("x[t]")
            lines += ["for (size_t t = 0; t < steps; t++)", f"  COPY({target}, {row}, {_bytes(width)});"]
        for index, placed in enumerate(layout.stages):
            lines += self._pass_over_time(index, placed, places)
        declaration = self.run_declaration().replace("float *work)", "float *work_steps)")
        return f"{declaration} {{\n{_lines(lines)}}}\n"

    def _pass_over_time(self, index: int, placed: PlacedStage, places: dict[Value, str]) -> Iterator[str]:
        stage, states = placed.stage, self.layout.states
        width = stage.cell.state_sizes()[next(iter(stage.cell.state_sizes()))]
        yield "{"
        yield f"  float *old = state->values, *next = state->values + {states};"
        yield "  for (size_t k = 0; k < steps; k++) {"
        yield f"    const size_t t = {'steps - 1 - k' if stage.reverse else 'k'};"
        x = f"{places[stage.inputs[0]]} + t * {stage.inputs[0].width}"
        if placed.gathered is not None:
            x, at = f"work + {placed.gathered}", placed.gathered
            for value in stage.inputs:
                source = f"{places[value]} + t * {value.width}"
                yield f"    COPY(work + {at}, {source}, {_bytes(value.width)});"
                at += value.width
        yield f"    {self._call(index, placed, x, 'old', 'next')}"
        result = self._result(placed)
        target = f"{places[stage.output]} + t * {stage.output.width} + {stage.column}"
        yield f"    COPY({target}, {result}, {_bytes(width)});"
        yield "    float *const before = old;"
        yield "    old = next;"
        yield "    next = before;"
        yield "  }"
        yield "}"

    # --- the self-test ---

    def _selftest(self) -> str:
        kind = self.x_type()
        x = self.example.reshape(-1)
        return fill(
            template("selftest_sequence.c" if self.program.bidirectional else "selftest.c"),
            name=self.name,
            NAME=self.name.upper(),
            kind=kind,
            x=", ".join(map(str, x.tolist())) if kind == "int32_t" else _numbers(x),
            y=_numbers(self.expected.reshape(-1)),
            steps=len(self.expected),
            tolerance=f"{self.program.tolerance * largest(self.expected):.9g}f",
            work=max(1, self._sequence_width() * len(self.expected)),
        )


_CAUSAL = "Runs several steps: x has steps * INPUT numbers, y steps * OUTPUT."
_BIDIRECTIONAL = (
    "Runs a whole sequence from its beginning: x has steps * INPUT numbers, y steps * OUTPUT, and work is\n"
    " * memory for steps * WORK numbers. A layer runs from the last step to the first, so there is no step."
)


def _bytes(numbers: int) -> str:
    """Return the size of some numbers, as C."""
    return f"{numbers} * sizeof(float)"


def _lines(lines: Iterator[str] | Sequence[str]) -> str:
    return "".join(f"  {line}\n" for line in lines)


def _numbers(values: Tensor) -> str:
    """Return float32 numbers as C, with all their bits."""
    texts = list(map(in_c, map(str, values.numpy())))
    return "\n".join(", ".join(texts[k : k + 8]) + "," for k in range(0, len(texts), 8))


def _words(values: Tensor) -> str:
    """Return words of 32 bits as C."""
    texts = [f"0x{value:08x}" for value in values.numpy().view(numpy.uint32).tolist()]
    return "\n".join(", ".join(texts[k : k + 9]) + "," for k in range(0, len(texts), 9))

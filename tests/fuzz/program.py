"""A random cell as Python source, and the layer and call that it is tested with."""

from __future__ import annotations

import itertools
import linecache
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import unrolled as ur
from fuzz.builder import NAMES, Builder, Dice, Invalid, Line
from fuzz.grammar import new_state, random_lines

_numbers = itertools.count()

WIDER_FROM = (
    10_000  # the first seed whose step may contain all operations; smaller ones repeat older programs
)

OPTIONS: dict[str, tuple[str, Any, Any]] = {  # annotation, default, another value
    "rate": ("float", 0.3, -0.25),
    "count": ("int", 2, 1),
    "flag": ("bool", True, False),
    "mode": ("str", "tanh", "sin"),
}
SCALE = "torch.linspace(-1, 1.5, 3, dtype=torch.float64)"
# For NaN, the gradient of hardtanh in torch depends on the memory layout, and a cast to an integer on the
# processor. Of equal values, torch may sort any one first.
_NEEDS_NORMAL_VALUES = re.compile("hardtanh|relu6")
_WIDER_NEEDS_NORMAL_VALUES = re.compile(
    r"hardtanh|relu6|\.(long|int|short)\(\)|torch\.u?int8|topk|sort|kthvalue|cdist|pairwise_distance"
)
_DRAW = re.compile(r"rand|torch\.normal|dropout|bernoulli|gumbel|exponential_|uniform_")
_FACTOR = re.compile(r"torch\.arange\((\d+)\)(?!\.flip| // )")  # the others are indices
_INIT = f"""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = {SCALE}
"""


@dataclass(frozen=True)
class Call:
    """How a layer is created and called.

    Attributes:
        dtype: Name of the dtype.
        time: Number of time steps.
        batch: Batch size.
        threads: Number of threads.
        layers: Number of layers.
        bidirectional, batch_first, bias: Arguments of the layer.
        initial_state: ``zeros``, ``learned``, or ``given`` to the call.
        zoneout, dropout: Probabilities. The layer is in evaluation mode, where dropout has no effect.
        training: Whether the layer is in training mode. Then it has no dropout and no zoneout.
        lengths: ``none``, ``packed`` for a packed sequence, or ``lengths`` for the argument.
        resets: Whether the state is reset before some steps.
        reset_state: None, ``initial`` or ``given``.
        all_states: Whether the call returns all states of all steps.
        checkpoint: Number of time steps of a segment.
        layout: Memory layout of the input.
        values: Kind of the values: ``normal``, ``halves`` (equal values are frequent), or ``special``
            (some are infinite or NaN).
        frozen: Numbers that select the leaves without gradients.
        outputs: Which results the loss depends on: ``all``, ``first`` or ``last``.
        route: How else the layer runs: ``none``, ``vmap``, ``make_fx``, ``second``, ``unbatched``.
        options: Options of the cell that differ from their defaults.
    """

    dtype: str = "float64"
    time: int = 2
    batch: int = 2
    threads: int = 1
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    initial_state: str = "zeros"
    zoneout: float = 0.0
    dropout: float = 0.0
    training: bool = True
    lengths: str = "none"
    resets: bool = False
    reset_state: str | None = None
    all_states: bool = False
    checkpoint: int | None = None
    layout: str = "dense"
    values: str = "normal"
    frozen: tuple[int, ...] = ()
    outputs: str = "all"
    route: str = "none"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the arguments that differ from their defaults."""
        default = Call()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return f"Call({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


@dataclass(frozen=True)
class Program:
    """A cell and its call.

    Attributes:
        seed: The seed that it was made from.
        input, hidden: Sizes.
        states: Width of each state, by name.
        params: Shape of each parameter, by name.
        lines: The lines of the step.
        results: The expression of each new state.
        call: The call.
    """

    seed: int
    input: int
    hidden: int
    states: dict[str, int]
    params: dict[str, tuple[int, ...]]
    lines: tuple[Line, ...]
    results: tuple[str, ...]
    call: Call

    @property
    def body(self) -> str:
        """The text of the step."""
        text = [part for line in self.lines for part in (f"{line.name} = {line.text}", *line.changes)]
        return "\n        ".join([*text, f"return {', '.join(self.results)}"])

    @property
    def draws(self) -> bool:
        """Whether the step draws random numbers."""
        return _DRAW.search(self.body) is not None

    @property
    def source(self) -> str:
        """The source of the cell's class."""
        body = self.body
        lines = [f"class Cell{self.seed}(ur.Cell):"]
        if set(self.states.values()) == {self.hidden}:
            lines.append(f"    state = {tuple(self.states)!r}")
        else:
            lines.append(f"    state = {self.states!r}")
        for name, shape in self.params.items():
            if re.search(rf"self\.{name}\b", body):
                lines.append(f"    {name} = ur.Param({', '.join(map(str, shape))})")
        for name, (kind, default, _) in OPTIONS.items():
            if f"self.{name}" in body:
                lines.append(f"    {name}: {kind} = {default!r}")
        init = _INIT if "self.scale" in body else ""
        header = f"    def step(self, x, {', '.join(self.states)}):"
        return "\n".join(lines) + f"\n{init}\n{header}\n        {body}\n"

    def __str__(self) -> str:
        return f"{self.source}\nSIZES = {self.input}, {self.hidden}\nCALL = {self.call}\n"

    def cell(self) -> type[ur.Cell]:
        """Return the cell's class, with a name of its own. ``inspect`` finds its source."""
        number = next(_numbers)
        name = f"Cell{self.seed}_{number}"
        source = f"import torch\n\n\n{self.source.replace(f'Cell{self.seed}', name, 1)}"
        file = f"<cell {number}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"__name__": "generated", "ur": ur, **NAMES}
        exec(compile(source, file, "exec"), namespace)
        cell: type[ur.Cell] = namespace[name]
        return cell

    def cell_options(self) -> dict[str, Any]:
        """Return the options of the cell that the call sets and the step uses."""
        return {name: value for name, value in self.call.options.items() if f"self.{name}" in self.body}


def random_call(dice: Dice) -> Call:
    """Return a random call."""
    time = dice.integer(1, 7)
    call = Call(
        dtype=dice.pick(["float64", "float32"]),
        time=time,
        batch=dice.pick([1, 2, 3, 5, 8, 17]),
        threads=dice.integer(1, 3),
        layers=dice.pick([1, 1, 1, 2]),
        bidirectional=dice.chance(0.25),
        batch_first=dice.chance(0.3),
        bias=dice.chance(0.85),
        initial_state=dice.pick(["zeros", "zeros", "given", "given", "learned"]),
        layout=dice.pick(["dense", "dense", "transposed", "strided", "expanded"]),
        values=dice.pick([*["normal"] * 8, "halves", "special"]),
        outputs=dice.pick(["all", "all", "all", "first", "last"]),
        frozen=tuple(dice.integer(0, 9) for _ in range(3)) if dice.chance(0.3) else (),
        options={name: other for name, (_, _, other) in OPTIONS.items() if dice.chance(0.5)},
    )
    if dice.chance(0.3):
        call = replace(call, training=False, zoneout=dice.pick([0.0, 0.2]), dropout=dice.pick([0.0, 0.3]))
    extra = dice.pick(
        ["none"] * 4 + ["packed", "packed", "lengths", "lengths", "resets", "resets", "checkpoint"]
    )
    if extra in ("packed", "lengths"):
        call = replace(call, lengths=extra)
    if extra == "resets" or (extra in ("lengths", "checkpoint") and dice.chance(0.4)):
        reset_state = dice.pick([None, None, "initial", "given"])
        call = replace(call, resets=True, reset_state=reset_state)
    if extra == "checkpoint" or (extra != "packed" and dice.chance(0.08)):
        call = replace(call, checkpoint=dice.integer(1, time))
    if extra != "packed" and dice.chance(0.15):
        call = replace(call, all_states=True)
    routes = ["none", "none", "second", "make_fx", "vmap"]
    if call.lengths == "none":
        routes += ["unbatched"]
    if call.lengths != "packed":
        call = replace(call, route=dice.pick(routes))
    return call


def random_program(seed: int) -> Program:
    """Return the program of a seed."""
    dice = Dice(f"unrolled cell {seed}")
    call = random_call(dice)
    states = {name: dice.integer(1, 8) for name in "stu"[: dice.pick([1, 1, 2, 2, 3])]}
    hidden = dice.integer(1, 8)
    if dice.chance(0.4):
        states = dict.fromkeys(states, hidden)
    width = next(iter(states.values()))
    inputs = width * (1 + call.bidirectional) if call.layers > 1 else dice.integer(1, 5)
    builder = Builder(f"unrolled step {seed}", {"x": inputs, **states}, getattr(torch, call.dtype), call.bias)
    for name, (_, default, _) in OPTIONS.items():
        builder.set_attribute(name, call.options.get(name, default))
    builder.set_attribute("scale", eval(SCALE, NAMES))
    builder.set_attribute("training", call.training)
    if dice.chance(0.7):
        size = dice.integer(1, 8)
        bias = f", {builder.param(size, prefix='bias')}" if dice.chance(0.5) else ""
        first = f"linear(x, {builder.param(size, inputs)}{bias})"
        builder.let(f"{first} + linear(s, {builder.param(size, width)})")
    random_lines(builder, dice.integer(2, 9), seed >= WIDER_FROM)
    results = []
    for name, size in states.items():
        while True:
            try:
                results.append(new_state(builder, name, size))
                break
            except Invalid:
                continue
    program = Program(
        seed, inputs, hidden, states, builder.params, tuple(builder.lines), tuple(results), call
    )
    program = without_unused(_with_float_factors(program))
    needs_normal = _WIDER_NEEDS_NORMAL_VALUES if seed >= WIDER_FROM else _NEEDS_NORMAL_VALUES
    if needs_normal.search(program.body):
        program = replace(program, call=replace(call, values="normal"))
    if program.draws and call.route in ("vmap", "make_fx"):  # vmap refuses, and a graph contains the seed
        program = replace(program, call=replace(program.call, route="none"))
    if "cdist" in program.body and call.route == "second":  # torch has no second derivative
        program = replace(program, call=replace(program.call, route="none"))
    return program


def _with_float_factors(program: Program) -> Program:
    """Convert the whole numbers in ``addcdiv`` and ``addcmul``, for which torch computes no gradient."""
    lines = [
        replace(line, text=_FACTOR.sub(r"torch.arange(\1, dtype=x.dtype)", line.text))
        if "addc" in line.text
        else line
        for line in program.lines
    ]
    return replace(program, lines=tuple(lines))


def without_unused(program: Program) -> Program:
    """Remove the lines whose variables aren't used."""
    lines = list(program.lines)
    for line in reversed(program.lines):
        rest = [text for other in lines if other is not line for text in (other.text, *other.changes)]
        if not any(re.search(rf"\b{line.name}\b", text) for text in (*rest, *program.results)):
            lines.remove(line)
    return replace(program, lines=tuple(lines))

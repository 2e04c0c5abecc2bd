"""Print a trace in the terminal, or return it as plain data for JSON."""

from __future__ import annotations

import functools
import itertools
import math
import re
import reprlib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell
from unrolled.cells.descriptions import docstring_paragraphs, option_descriptions, quantity_descriptions
from unrolled.cli.findings import print_findings
from unrolled.cli.number_lines import NumberLines
from unrolled.equations.source import step_source
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.recurrent import Recurrent
from unrolled.tracing.color_scales import ColorScales
from unrolled.tracing.colors import ColorScale
from unrolled.tracing.explain import DIGITS
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.tables import format_vector
from unrolled.tracing.trace import Trace

ARGUMENTS = {
    "input_size": "number of features at each time step",
    "hidden_size": "number of units (size of the hidden state)",
    "num_layers": "number of stacked layers; each reads the output of the layer below",
    "bias": "whether the layer uses biases",
    "batch_first": "input shape: (batch, time, features) if True, else (time, batch, features)",
    "dropout": "dropout probability between stacked layers, in training",
    "bidirectional": "whether a second cell reads the sequence backward",
}
PARAMETERS = {
    "weight_ih": "multiplies the input",
    "weight_hh": "multiplies the previous hidden state",
    "bias_ih": "added to the weighted input",
    "bias_hh": "added to the weighted hidden state",
    "weight_hr": "projects the hidden state",
}

MAX_TERMS = 8  # of a sum, unless everything is shown
_DESCRIPTION_WIDTH = 12  # with less room, the numbers get lines of their own


def print_trace(
    console: Console,
    trace: Trace,
    steps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    *,
    full: bool = False,
    digits: int | None = DIGITS,
) -> None:
    """Print the first sequence of a trace: the layer, its parameters, the steps and a check against torch.nn.

    Whatever is left out is mentioned in a line that says how to see it.

    Args:
        console: The console to print to.
        trace: The trace.
        steps: The time steps to show; negative ones count from the end. By default, all steps of a short
            sequence, or the first three and the last one of a long sequence.
        labels: A label for each time step, such as the characters of a text.
        full: Whether to leave nothing out: all steps, all numbers, and the arithmetic behind each of them.
        digits: Number of decimal places. None for as many as the numbers have.

    Raises:
        IndexError: If a time step doesn't exist.
    """
    recurrent = trace.recurrent
    cell = recurrent.cell
    length = int(trace.layers[0].lengths[0])
    shown_steps = _resolve_steps(range(length) if full and steps is None else steps, length)
    lines = NumberLines(console, full, digits)
    console.print(Text(repr(trace.module), style="bold"))
    print_findings(console, trace.health(), full)
    for paragraph in docstring_paragraphs(cell):
        console.print(Text(paragraph, style="dim"))
    console.print()
    console.print(_arguments_table(recurrent))
    _print_heading(console, "Parameters")
    scales = ColorScales.for_console(console, trace)
    if scales:
        _print_legend(console, "", scales.parameters)
    _print_parameters(lines, trace, scales.parameters if scales else None)
    _print_omitted(lines, "Weights are left out.")
    code = step_source(cell)
    if code:
        _print_heading(console, "One step, in the cell's own code")
        console.print(Padding(Text(code), (0, 0, 0, 2)))
    x = trace.input
    counts = f"{_format_count(length, 'time step')}, {_format_count(recurrent.input_size, 'feature')}"
    _print_heading(console, f"Input {_format_shape(x)}: {counts}")
    if scales:
        _print_legend(console, " of the input", scales.input)
        for name, scale in scales.own.items():
            _print_legend(console, f" of {name}", scale)
        _print_legend(console, f" of all {'other ' if scales.own else ''}quantities", scales.quantities)
    for part in trace.layers:
        for step in shown_steps:
            _print_heading(console, f"Step {step}{step_label(labels, step)}{position_label(trace, part)}")
            _print_step(lines, part, step, scales)
        if len(set(shown_steps)) < length:
            hidden = length - len(set(shown_steps))
            console.print(f"\n  {hidden} of {length} steps hidden; use --steps all to see them.")
    _print_omitted(lines, "Numbers are left out.")
    _print_heading(console, "How the numbers are computed")
    _print_arithmetic(lines, trace, shown_steps)
    _print_heading(console, "Output and final state")
    console.print(f"  shapes: output {_format_shape(trace.output)}, {_format_final_shapes(trace)}")
    console.print(f"  {_format_check(trace)}")


def _print_omitted(lines: NumberLines, what: str) -> None:
    """Say that numbers were left out since the last call, if any were."""
    if lines.omitted:
        lines.console.print(f"\n  {what} Use --full to see them all.")
    lines.omitted = False


def _print_parameters(lines: NumberLines, trace: Trace, scale: ColorScale | None) -> None:
    recurrent = trace.recurrent
    params = recurrent.cell.params()
    suffixes = ["_reverse" if k % 2 else "" for k in range(len(recurrent.all_weights))]
    directions = 1 + recurrent.bidirectional
    by_name: list[tuple[LayerTrace, str, str, Tensor]] = []
    for index, tensors in enumerate(recurrent.all_weights):
        suffix = f"_l{index // directions}{suffixes[index] if recurrent.bidirectional else ''}"
        with_suffix = [name for name in params if hasattr(recurrent, name + suffix)]
        part = trace.layers[index]
        by_name += [(part, name, suffix, tensor) for name, tensor in zip(with_suffix, tensors, strict=True)]
    if not by_name:
        lines.console.print("  none")
        return
    width = max(cell_len(name + suffix) for _, name, suffix, _ in by_name)
    shapes = {id(tensor): " × ".join(map(str, tensor.shape)) for *_, tensor in by_name}
    shape_width = max(map(len, shapes.values()))
    for part, name, suffix, tensor in by_name:
        symbols = " × ".join(_size_symbol(part.cell, size) for size in params[name].shape)
        description = f"{PARAMETERS.get(name, '')} ({symbols})".strip()
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, width=min(width + 2, lines.console.width // 2))
        table.add_column(no_wrap=True, width=shape_width)
        table.add_row(f"  {name}{suffix}", shapes[id(tensor)], description)
        lines.console.print(table)
        lines.parameter(part, name, tensor.detach(), scale)


def _size_symbol(cell: Cell, size: int | str) -> str:
    """Return a size as in the cell's code, such as ``4*hidden``. ``A or B`` becomes the one that is used."""

    def used(found: re.Match[str]) -> str:
        return found[1] if getattr(cell, found[1]) else found[2]

    text = re.sub(r"\(?\b(\w+) or (\w+)\b\)?", used, str(size))
    return f"({text})" if " " in text else text


def _print_step(lines: NumberLines, part: LayerTrace, step: int, scales: ColorScales | None) -> None:
    words = descriptions(type(part.cell))
    words = {part.input_name: "input", **words}
    rows = {part.input_name: part.input, **part.values}
    name_width = max(map(cell_len, rows))
    left = 2 + name_width + 2
    texts = (format_vector(values, 10**9, None, lines.digits) for values in _pieces(part, rows, step))
    room = lines.console.width - left - 2 - max((cell_len(text.plain) for text in texts), default=0)
    gate_gap = {name: 2 * part.row_names.is_split(name) for name in part.values}  # before the name of a gate
    widths = (cell_len(words.get(name, "")) + gate_gap.get(name, 0) for name in rows)
    words_width = min(room, max(widths))
    has_column = room >= _DESCRIPTION_WIDTH
    graph = functools.cache(lambda: part.derivations(step))
    for name, values in rows.items():
        description = words.get(name, "")
        label, rest = f"  {name}  {description}\n", []
        if has_column:
            is_whole = name in part.values and part.row_names.is_split(name)
            first, *rest = [description] if is_whole else textwrap.wrap(description, words_width) or [""]
            first = set_cell_size(first, max(words_width, cell_len(first)))
            label = f"  {set_cell_size(name, name_width)}  {first}  "
        scale = scales.of_quantity(part, name) if scales else None
        lines.quantity(part, name, values[step, 0].flatten(), label, left + words_width + 2, scale, graph)
        for line in rest:
            lines.console.print(Text(" " * left + line), no_wrap=True)


def _pieces(part: LayerTrace, rows: dict[str, Tensor], step: int) -> Iterator[Tensor]:
    """Yield the numbers of each quantity at a step, or of each of its gates."""
    for name, values in rows.items():
        flat = values[step, 0].flatten()
        if name in part.values and part.row_names.is_split(name):
            for block in part.row_names.blocks[name]:
                yield flat[block.rows.start : block.rows.stop]
        else:
            yield flat


def _print_arithmetic(lines: NumberLines, trace: Trace, steps: Sequence[int]) -> None:
    """Print the arithmetic behind each number, or behind those of unit 0 in the first steps."""
    shown = steps if lines.full else steps[:2]
    parts = trace.layers if lines.full else trace.layers[:1]
    shortened = inexact = False
    for part, step in itertools.product(parts, shown):
        graph = part.derivations(step)
        unit = "" if lines.full else ", unit 0"
        lines.console.print(f"  Step {step}{unit}{position_label(trace, part)}:")
        for name in _nonempty_quantities(part):
            every = range(part[name].shape[2:].numel())
            for index in every if lines.full else _elements_of_unit_0(part, name):
                terms = None if lines.full else MAX_TERMS
                text = part.explain_in(graph, name, step, index, 0, terms, lines.digits)
                shortened = shortened or "more terms: " in text or "…" in text
                inexact = inexact or "≈" in text
                is_named = lines.full or part.row_names.is_split(name)
                label = element_label(part, name, index) if is_named else name
                lines.console.print(Padding(Text(f"{label}: {text}"), (0, 0, 0, 4)))
    if shortened:
        lines.console.print(f"\n  Sums show their {MAX_TERMS} largest terms. Use --full to see all terms.")
    if inexact:
        lines.console.print("\n  ≈: rounding errors of the layer itself change the printed digits.")
    if not lines.full:
        where = " of layer 0, forward" if len(trace.layers) > 1 else ""
        count = _format_count(len(shown), "step")
        lines.console.print(f"\n  Only unit 0 in {count}{where}. Use --full to see all units and steps.")


def _elements_of_unit_0(part: LayerTrace, name: str) -> list[int]:
    """Return the elements of a quantity that belong to unit 0: one for each gate."""
    blocks = part.row_names.blocks.get(name, ())
    return [block.rows.start for block in blocks if block.gate and not block.first_unit] or [0]


def element_label(part: LayerTrace, name: str, index: int) -> str:
    """Return the name of an element of a quantity, such as ``c[1]``, or ``input_sum f[1]`` for a gate."""
    block = part.row_names.block(name, index)
    if part.row_names.is_split(name) and block.gate:
        return f"{name} {block.gate}[{block.unit(index)}]"
    return f"{name}[{index}]"


def step_label(labels: Sequence[str] | None, step: int) -> str:
    """Return the label of a time step, to follow its number."""
    return f" {reprlib.repr(labels[step])}" if labels else ""


def as_data(trace: Trace, steps: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the first sequence of a trace as plain data: numbers, strings, lists and dictionaries.

    Values that JSON has no number for are strings: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, ``"1+2j"``.

    Args:
        trace: The trace.
        steps: The time steps, all by default.

    Raises:
        IndexError: If a time step doesn't exist.
    """
    length = int(trace.layers[0].lengths[0])
    chosen_steps = list(range(length)) if steps is None else _resolve_steps(steps, length)
    final = trace.final_state if isinstance(trace.final_state, tuple) else (trace.final_state,)
    drop_in = drop_in_layer(trace.recurrent.cell)
    return {
        "layer": repr(trace.module),
        "cell": trace.recurrent.cell.__name__,
        "equations": step_source(trace.recurrent.cell),
        "parameters": {name: _plain(value) for name, value in trace.recurrent.state_dict().items()},
        "input": _plain(trace.layers[0].input[:length, 0]),
        "steps": [
            {
                "layer": part.layer,
                "direction": part.direction,
                "step": step,
                "quantities": {name: _plain(part[name][step, 0]) for name in part.names},
                "explanations": {name: part.explain(name, step, 0) for name in _nonempty_quantities(part)},
            }
            for part in trace.layers
            for step in chosen_steps
        ],
        "output": _plain(trace.output),
        "final_state": {
            name: _plain(value) for name, value in zip(trace.recurrent.cell.state, final, strict=True)
        },
        "torch": f"torch.nn.{drop_in.torch_class.__name__}" if drop_in else None,
        "largest_difference_from_torch": _plain(trace.check()) if drop_in else None,
    }


def _plain(value: Any) -> Any:
    """Convert tensors to nested lists, and numbers that JSON doesn't have to strings."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, complex):
        return str(value).strip("()")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def print_layers(console: Console, layers: dict[str, Recurrent]) -> None:
    """Print the recurrent layers of a file: prefix, arguments and dtype."""
    for prefix, layer in layers.items():
        dtype = str(next(layer.parameters()).dtype).removeprefix("torch.")
        console.print(Text.assemble((prefix or "(no prefix)", "bold"), f": {layer}, {dtype}"))


def _arguments_table(recurrent: Recurrent) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    shown = {"input_size", "hidden_size", "batch_first"}
    defaults = {"num_layers": 1, "bias": True, "dropout": 0.0, "bidirectional": False}
    shown |= {name for name, default in defaults.items() if getattr(recurrent, name) != default}
    for name, words in ARGUMENTS.items():
        if name in shown:
            table.add_row(f"  {name}={getattr(recurrent, name)}", words)
    option_words = option_descriptions(recurrent.cell)
    for name, value in recurrent.chosen_options().items():
        table.add_row(f"  {name}={value}", option_words.get(name, "cell option"))
    return table


def _nonempty_quantities(part: LayerTrace) -> list[str]:
    """Return the names of the quantities that have at least one number per step."""
    return [name for name, values in part.values.items() if values[0, 0].numel()]


def descriptions(cell: type[Cell]) -> dict[str, str]:
    """Return the known descriptions of the quantities of a cell, by name."""
    by_name = {"x": "input", **quantity_descriptions(cell)}
    output = next(iter(cell.state))
    by_name[output] = f"{by_name.get(output, 'new state')} (output)"
    return by_name


def position_label(trace: Trace, part: LayerTrace) -> str:
    """Return the layer and direction in parentheses; empty if there is only one."""
    position = [f"layer {part.layer}"] if trace.recurrent.num_layers > 1 else []
    position += [part.direction] if trace.recurrent.bidirectional else []
    return f" ({', '.join(position)})" if position else ""


def _format_check(trace: Trace) -> str:
    drop_in = drop_in_layer(trace.recurrent.cell)
    if drop_in is None:
        return f"not compared with torch.nn, which has no {trace.recurrent.cell.__name__} layer"
    return f"largest difference from torch.nn.{drop_in.torch_class.__name__}: {trace.check():.1e}"


def _format_final_shapes(trace: Trace) -> str:
    final = trace.final_state if isinstance(trace.final_state, tuple) else (trace.final_state,)
    states = zip(trace.recurrent.cell.state, final, strict=True)
    return ", ".join(f"final {name} {_format_shape(value)}" for name, value in states)


def _resolve_steps(steps: Sequence[int] | None, length: int) -> list[int]:
    """Return the time steps to show, with negative ones counted from the end."""
    if steps is None:
        return list(range(length)) if length <= 6 else [0, 1, 2, length - 1]
    for step in steps:
        if not -length <= step < length:
            raise IndexError(f"time step {step} is out of range; the last one is {length - 1}")
    return [step % length for step in steps]


def _format_count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _format_shape(value: Tensor | PackedSequence | nn.Parameter) -> str:
    return str(tuple(value.data.shape))


def _print_legend(console: Console, subject: str, scale: ColorScale) -> None:
    console.print(Text.assemble((f"  Colors{subject}: ", "dim"), scale.legend()))


def _print_heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))

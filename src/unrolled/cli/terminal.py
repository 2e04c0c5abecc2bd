"""Print a trace in the terminal, or return it as plain data for JSON."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell
from unrolled.cells.descriptions import quantity_descriptions
from unrolled.equations.source import docstring_paragraphs, step_source
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.recurrent import Recurrent
from unrolled.tracing.color_scales import ColorScales
from unrolled.tracing.colors import ColorScale
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


def print_trace(
    console: Console, trace: Trace, steps: Sequence[int] | None = None, labels: Sequence[str] | None = None
) -> None:
    """Print the first sequence of a trace: the layer, its parameters, the steps and a check against torch.nn.

    Args:
        console: The console to print to.
        trace: The trace.
        steps: The time steps to show; negative ones count from the end. By default, all steps of a short
            sequence, or the first three and the last one of a long sequence.
        labels: A label for each time step, such as the characters of a text.

    Raises:
        IndexError: If a time step doesn't exist.
    """
    recurrent = trace.recurrent
    cell = recurrent.cell
    length = int(trace.layers[0].lengths[0])
    shown_steps = _resolve_steps(steps, length)
    console.print(Text(repr(trace.module), style="bold"))
    for paragraph in docstring_paragraphs(cell):
        console.print(Text(paragraph, style="dim"))
    console.print()
    console.print(_arguments_table(recurrent))
    _print_heading(console, "Parameters")
    scales = ColorScales.for_console(console, trace)
    if scales:
        _print_legend(console, "", scales.parameters)
    console.print(_parameters_table(recurrent, console.width, scales.parameters if scales else None))
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
            console.print(_step_table(part, step, console.width, scales))
        if len(shown_steps) < length:
            hidden = length - len(shown_steps)
            console.print(f"\n  {hidden} of {length} steps hidden; use --steps all to see them.")
    _print_heading(console, "How the numbers are computed")
    first = trace.layers[0]
    for step in shown_steps[:2]:
        console.print(f"  Step {step}, unit 0:")
        for name in _nonempty_quantities(first):
            console.print(Padding(Text(f"{name}: {first.explain(name, step, 0)}"), (0, 0, 0, 4)))
    _print_heading(console, "Output and final state")
    console.print(f"  shapes: output {_format_shape(trace.output)}, {_format_final_shapes(trace)}")
    console.print(f"  {_format_check(trace)}")


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
    shown = {"input_size", "hidden_size", "batch_first"}
    defaults = {"num_layers": 1, "bias": True, "dropout": 0.0, "bidirectional": False}
    shown |= {name for name, default in defaults.items() if getattr(recurrent, name) != default}
    for name, words in ARGUMENTS.items():
        if name in shown:
            table.add_row(f"  {name}={getattr(recurrent, name)}", words)
    for name, value in recurrent.chosen_options().items():
        table.add_row(f"  {name}={value}", "cell option")
    return table


def _parameters_table(recurrent: Recurrent, width: int, scale: ColorScale | None) -> Table:
    table = Table.grid(padding=(0, 2))
    directions = 1 + recurrent.bidirectional
    names = [name for name, _ in recurrent.named_parameters()]
    if not names:
        table.add_row("  none")
        return table
    left = 2 + max(map(cell_len, names)) + 2 + len("1000 × 1000") + 2
    params = recurrent.cell.params()
    for index, tensors in enumerate(recurrent.all_weights):
        suffix = f"_l{index // directions}{'_reverse' if index % directions else ''}"
        with_suffix = [name for name in params if hasattr(recurrent, name + suffix)]
        for name, tensor in zip(with_suffix, tensors, strict=True):
            sizes = map(str, params[name].shape)
            symbols = " × ".join(f"({size})" if " " in size else size for size in sizes)
            shape = " × ".join(map(str, tensor.shape))
            table.add_row(f"  {name}{suffix}", shape, f"{PARAMETERS.get(name, '')} ({symbols})".strip())
            if tensor.numel() <= 24:
                for line in tensor.reshape(-1, tensor.shape[-1]):
                    table.add_row("", "", format_vector(line, width - left, scale))
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


def _step_table(part: LayerTrace, step: int, width: int, scales: ColorScales | None) -> Table:
    words = descriptions(type(part.cell))
    rows = {"x": part.input, **part.values}
    name_width, words_width = (max(map(cell_len, texts)) for texts in (rows, words.values()))
    full_width = max(len(format_vector(values[step, 0].flatten(), 10**6)) for values in rows.values())
    room = min(full_width, max(width // 2, width - (2 + name_width + 2 + words_width + 2)))
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, max_width=max(8, width - room - len("  12345678  ")))
    table.add_column(width=max(8, min(words_width, width - room - name_width - 6)))
    table.add_column(no_wrap=True, width=room)
    for name, values in rows.items():
        row = values[step, 0].flatten()
        scale = scales.of_quantity(part, name) if scales else None
        table.add_row(f"  {name}", words.get(name, ""), format_vector(row, room, scale))
    return table


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

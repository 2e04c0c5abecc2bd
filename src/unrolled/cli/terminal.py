"""A trace told from the top to the last digit: for a terminal, or as data for programs."""

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
from unrolled.equations.source import equations, meanings, prose
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.recurrent import Recurrent
from unrolled.tracing.color_scales import Scales
from unrolled.tracing.colors import Scale
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.tables import vector
from unrolled.tracing.trace import Trace

ARGUMENTS = {
    "input_size": "features of the input at each time step",
    "hidden_size": "units: numbers in the hidden state",
    "num_layers": "layers on top of each other, each reading the output of the one below",
    "bias": "whether the sums have a constant term",
    "batch_first": "True: (batch, time, features); False: (time, batch, features)",
    "dropout": "share of the outputs between two layers that training sets to zero",
    "bidirectional": "a second cell reads the sequence from its end",
}
PARAMETERS = {
    "weight_ih": "weighs the input",
    "weight_hh": "weighs the previous hidden state",
    "bias_ih": "is added to the weighted input",
    "bias_hh": "is added to the weighted hidden state",
    "weight_hr": "projects the hidden state",
}


def say(
    console: Console, trace: Trace, steps: Sequence[int] | None = None, labels: Sequence[str] | None = None
) -> None:
    """Print a trace of one row: the layer, its parameters, every step, and the check.

    Args:
        console: where to.
        trace: its first row is shown.
        steps: the time steps to show, negative from the end; None: all of a short sequence, the
            first and the last of a long one.
        labels: what stands for each time step of the sequence, such as the characters of a text.

    Raises:
        IndexError: there is no such step.
    """
    recurrent = trace.recurrent
    cell = recurrent.cell
    length = int(trace.layers[0].lengths[0])
    chosen = _steps(steps, length)
    console.print(Text(repr(trace.module), style="bold"))
    for paragraph in prose(cell):
        console.print(Text(paragraph, style="dim"))
    console.print()
    console.print(_arguments(recurrent))
    _heading(console, "Parameters")
    scales = Scales.on(console, trace)
    if scales:
        _legend(console, "", scales.parameters)
    console.print(_parameters(recurrent, console.width, scales.parameters if scales else None))
    code = equations(cell)
    if code:
        _heading(console, "One step, as the code of the cell has it")
        console.print(Padding(Text(code), (0, 0, 0, 2)))
    x = trace.input
    _heading(console, f"Input {_dimensions(x)}: {length} time steps of {recurrent.input_size} features")
    if scales:
        _legend(console, " of the input", scales.input)
        for name, scale in scales.own.items():
            _legend(console, f" of {name}", scale)
        _legend(console, f" of all {'else ' if scales.own else ''}that is computed", scales.quantities)
    for part in trace.layers:
        for step in chosen:
            _heading(console, f"Step {step}{label(labels, step)}{where(trace, part)}")
            console.print(_step(part, step, console.width, scales))
        if len(chosen) < length:
            console.print(f"\n  {length - len(chosen)} of {length} steps are not shown; --steps chooses.")
    _heading(console, "Where a number comes from")
    first = trace.layers[0]
    for step in chosen[:2]:
        console.print(f"  Step {step}, the first number of each:")
        for name in _with_numbers(first):
            console.print(Padding(Text(f"{name}: {first.explain(name, step, 0)}"), (0, 0, 0, 4)))
    _heading(console, "Output and final state")
    console.print(f"  output {_dimensions(trace.output)}, final {_final(trace)}")
    console.print(f"  {_verdict(trace)}")


def label(labels: Sequence[str] | None, step: int) -> str:
    """What stands for a time step, as text after its number."""
    return f" {reprlib.repr(labels[step])}" if labels else ""


def as_data(trace: Trace, steps: Sequence[int] | None = None) -> dict[str, Any]:
    """The same as plain data: numbers, strings, lists and dictionaries.

    What JSON has no number for is text: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, ``"1+2j"``.

    Args:
        trace: its first row is taken.
        steps: the time steps; None: all of them.

    Raises:
        IndexError: there is no such step.
    """
    length = int(trace.layers[0].lengths[0])
    chosen = list(range(length)) if steps is None else _steps(steps, length)
    final = trace.final_state if isinstance(trace.final_state, tuple) else (trace.final_state,)
    twin = drop_in_layer(trace.recurrent.cell)
    return {
        "layer": repr(trace.module),
        "cell": trace.recurrent.cell.__name__,
        "equations": equations(trace.recurrent.cell),
        "parameters": {name: _plain(value) for name, value in trace.recurrent.state_dict().items()},
        "input": _plain(trace.layers[0].input[:length, 0]),
        "steps": [
            {
                "layer": part.layer,
                "direction": part.direction,
                "step": step,
                "quantities": {name: _plain(part[name][step, 0]) for name in part.names},
                "explanations": {name: part.explain(name, step, 0) for name in _with_numbers(part)},
            }
            for part in trace.layers
            for step in chosen
        ],
        "output": _plain(trace.output),
        "final_state": {
            name: _plain(value) for name, value in zip(trace.recurrent.cell.state, final, strict=True)
        },
        "torch": f"torch.nn.{twin.torch_class.__name__}" if twin else None,
        "largest_difference_from_torch": _plain(trace.check()) if twin else None,
    }


def _plain(value: Any) -> Any:
    """A tensor's numbers as lists, in what JSON can say."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, complex):
        return str(value).strip("()")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def found(console: Console, layers: dict[str, Recurrent]) -> None:
    """Print the recurrent layers of a file, with their parameters."""
    for prefix, layer in layers.items():
        dtype = str(next(layer.parameters()).dtype).removeprefix("torch.")
        console.print(Text.assemble((prefix or "(no prefix)", "bold"), f": {layer}, {dtype}"))


def _arguments(recurrent: Recurrent) -> Table:
    table = Table.grid(padding=(0, 2))
    shown = {"input_size", "hidden_size", "batch_first"}
    defaults = {"num_layers": 1, "bias": True, "dropout": 0.0, "bidirectional": False}
    shown |= {name for name, default in defaults.items() if getattr(recurrent, name) != default}
    for name, words in ARGUMENTS.items():
        if name in shown:
            table.add_row(f"  {name}={getattr(recurrent, name)}", words)
    for name, value in recurrent.chosen_options().items():
        table.add_row(f"  {name}={value}", "an option of the cell")
    return table


def _parameters(recurrent: Recurrent, width: int, scale: Scale | None) -> Table:
    table = Table.grid(padding=(0, 2))
    directions = 1 + recurrent.bidirectional
    named = [name for name, _ in recurrent.named_parameters()]
    if not named:
        table.add_row("  none")
        return table
    left = 2 + max(map(cell_len, named)) + 2 + len("1000 × 1000") + 2
    params = recurrent.cell.params()
    for index, tensors in enumerate(recurrent.all_weights):
        suffix = f"_l{index // directions}{'_reverse' if index % directions else ''}"
        names = [name for name in params if hasattr(recurrent, name + suffix)]
        for name, tensor in zip(names, tensors, strict=True):
            symbols = " × ".join(map(str, params[name].shape))
            shape = " × ".join(map(str, tensor.shape))
            table.add_row(f"  {name}{suffix}", shape, f"{PARAMETERS.get(name, '')} ({symbols})".strip())
            if tensor.numel() <= 24:
                for line in tensor.reshape(-1, tensor.shape[-1]):
                    table.add_row("", "", vector(line, width - left, scale))
    return table


def _with_numbers(part: LayerTrace) -> list[str]:
    """The quantities of a layer that have any number."""
    return [name for name, values in part.values.items() if values[0, 0].numel()]


def words_for(cell: type[Cell]) -> dict[str, str]:
    """What to say of the quantities of a cell, by name, as far as there is something."""
    words = {"x": "the input", **meanings(cell)}
    output = next(iter(cell.state))
    words[output] = f"{words.get(output, 'the new state')}, the output"
    return words


def _step(part: LayerTrace, step: int, width: int, scales: Scales | None) -> Table:
    words = words_for(type(part.cell))
    rows = {"x": part.input, **part.values}
    name_width, words_width = (max(map(cell_len, texts)) for texts in (rows, words.values()))
    whole = max(len(vector(values[step, 0].flatten(), 10**6)) for values in rows.values())
    room = min(whole, max(width // 2, width - (2 + name_width + 2 + words_width + 2)))
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, max_width=max(8, width - room - len("  12345678  ")))
    table.add_column(width=max(8, min(words_width, width - room - name_width - 6)))
    table.add_column(no_wrap=True, width=room)
    for name, values in rows.items():
        row = values[step, 0].flatten()
        scale = scales.of_quantity(part, name) if scales else None
        table.add_row(f"  {name}", words.get(name, ""), vector(row, room, scale))
    return table


def where(trace: Trace, part: LayerTrace) -> str:
    """Which layer and direction, in brackets; nothing where there is only one."""
    named = [f"layer {part.layer}"] if trace.recurrent.num_layers > 1 else []
    named += [part.direction] if trace.recurrent.bidirectional else []
    return f" ({', '.join(named)})" if named else ""


def _verdict(trace: Trace) -> str:
    ours = drop_in_layer(trace.recurrent.cell)
    if ours is None:
        return (
            f"torch.nn has no layer that computes {trace.recurrent.cell.__name__}: nothing to compare with."
        )
    return f"largest difference from torch.nn.{ours.torch_class.__name__}: {trace.check():.1e}"


def _final(trace: Trace) -> str:
    final = trace.final_state if isinstance(trace.final_state, tuple) else (trace.final_state,)
    parts = zip(trace.recurrent.cell.state, final, strict=True)
    return ", ".join(f"{name} {_dimensions(value)}" for name, value in parts)


def _steps(steps: Sequence[int] | None, length: int) -> list[int]:
    if steps is None:
        return list(range(length)) if length <= 6 else [0, 1, 2, length - 1]
    for step in steps:
        if not -length <= step < length:
            raise IndexError(f"there is no time step {step}: the sequence has {length}, counted from 0")
    return [step % length for step in steps]


def _dimensions(value: Tensor | PackedSequence | nn.Parameter) -> str:
    return str(tuple(value.data.shape))


def _legend(console: Console, what: str, scale: Scale) -> None:
    console.print(Text.assemble((f"  Colours{what}: ", "dim"), scale.legend()))


def _heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))

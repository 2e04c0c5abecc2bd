"""How well a layer does in one training call: its quantities, states and gradients in a few figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors
from unrolled.tracing.backward import differentiating, loss_from_gradients
from unrolled.tracing.gradient_flow import spectral_radii
from unrolled.tracing.hooks import LayerCall, agree
from unrolled.tracing.provenance import Recording
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.selection import BatchRows
from unrolled.tracing.step_recorder import names_per_row, run_with_names
from unrolled.tracing.trace import DIRECTIONS, traced

FLAT = 0.05  # a function is saturated where its slope is less than this share of its steepest one
_LONGEST = 4000  # steps of all rows that run again, where one row has fewer
_SQUASHING = {  # functions of one tensor that never fall, and of which some parts are flat
    "sigmoid", "special_expit", "tanh", "hardsigmoid", "hardtanh", "softsign", "logsigmoid", "softplus",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "clamp", "clip", "clamp_min", "clamp_max",
}  # fmt: skip

Figures = dict[str, Any]
FIELDS = (
    "call", "module", "layer", "direction", "quantity", "mean", "std", "function", "saturated", "dead",
    "norm_first", "norm_last", "norm_growth", "gradient_first", "gradient_last", "gradient_growth", "radius",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Part:
    """What is known of a layer in one direction.

    Attributes:
        values: of each quantity ``(steps of all rows, …)``.
        functions: of the quantities that a known function made, it and its name.
        states, gradients: of each state ``(time, batch, size)``, zeros past the end of a row.
        lengths: the steps of each row.
    """

    cell: Cell
    layer: int
    reverse: bool
    values: dict[str, Tensor]
    functions: dict[str, tuple[str, Callable[[Tensor], Tensor]]]
    states: dict[str, Tensor]
    gradients: dict[str, Tensor]
    lengths: Tensor


def examine(
    seen: LayerCall,
    output: Tensor | None,
    states: list[Tensor | None],
    rows: int,
    differs: Callable[[], None],
) -> list[Figures]:
    """The figures of a call that a backward has reached: what :class:`unrolled.Watch` records.

    Args:
        seen: the call.
        output: the gradient of its output.
        states: the gradients of its final states.
        rows: of so many rows of the batch at most; of all of them where the step draws random numbers or its
            rows depend on each other.
        differs: called where the steps, run again, give something else than the call.
    """
    parts = _quick(seen, output, states, rows)
    return [record for part in parts or _thorough(seen, output, states, differs) for record in _figures(part)]


class _Steps:
    """Keeps what each step of its ``cell`` is given and returns."""

    def __init__(self, cell: Cell) -> None:
        self.original = cell
        self.cell = cell.bind({})
        self.cell.__dict__["step"] = self._step
        self.given: list[tuple[Tensor, ...]] = []
        self.made: list[tuple[Tensor, ...]] = []
        self.gradients: list[tuple[Tensor, ...]] = []

    def _step(self, *given: Tensor) -> Any:
        new = self.original.step(*given)
        self.given.append(tuple(part.detach() for part in given))
        self.made.append(new if isinstance(new, tuple) else (new,))
        return new


def _quick(
    seen: LayerCall, output: Tensor | None, states: list[Tensor | None], count: int
) -> list[_Part] | None:
    """Of some rows, the steps of all times in one call; None where that gives other numbers."""
    recurrent, x, state = seen.recurrent, seen.x, seen.state
    whole = SequenceBatch.of(x, recurrent.batch_first, "")
    batch, count = whole.batch, max(1, min(count, _LONGEST // whole.time))
    there = seen.as_input(seen.output), seen.final
    rows = BatchRows.of(tuple(range(min(count, batch))), x, recurrent.batch_first) if count < batch else None
    if rows is not None:
        x, state, states = rows.of_sequence(x), rows.of_states(state), rows.of_states(states)
        output = None if output is None else rows.of_sequence(output)
        there = rows.of_sequence(there[0]), rows.of_states(there[1])
    ran: list[_Steps] = []
    with differentiating(seen.drawn_from, cuda_devices(x)):
        x = map_tensors(x, lambda tensor: tensor.requires_grad_())
        sequence = SequenceBatch.of(x, recurrent.batch_first, "")

        def run(cells: list[Cell], steps: Tensor, starts: list[Any], sizes: Any) -> Any:
            results = []
            for cell, start, reverse in zip(cells, starts, (False, True), strict=False):
                kept = _Steps(cell.bind({name: getattr(cell, name).detach() for name in cell.shapes()}))
                ran.append(kept)
                results.append(reference.run(kept.cell, steps, start, sizes, reverse))
            return results

        result = recurrent.unroll(x, state, run, *([] if rows is None else [rows.dropout]))
        if not agree(result, there):
            return None
        value = loss_from_gradients(output, states)(*result)
        made = [one for kept in ran for step in kept.made for one in step if one.requires_grad]
        found = torch.autograd.grad(value, made, allow_unused=True)
        gradients = dict(zip(map(id, made), found, strict=True))
        for kept in ran:
            for step in kept.made:
                own = (gradients.get(id(one)) for one in step)
                kept.gradients.append(
                    tuple(torch.zeros_like(a) if b is None else b for a, b in zip(step, own, strict=True))
                )
    for kept in ran:
        del vars(kept.cell)["step"]  # which holds it: all would wait for the garbage collector
    parts = [_part(kept, k, recurrent.bidirectional, sequence) for k, kept in enumerate(ran)]
    told = [part for part in parts if part is not None]
    return told if len(told) == len(parts) else None


def _part(kept: _Steps, place: int, bidirectional: bool, sequence: SequenceBatch) -> _Part | None:
    """What is known of the steps that ran, all run again at once; None where that gives other numbers."""
    cell, reverse = kept.original, bool(bidirectional and place % 2)
    x, *before = (torch.cat(parts) for parts in zip(*kept.given, strict=True))
    recording = Recording()
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(x)):
            with recording:
                _, named = run_with_names(cell, x, *before)
            per_row = names_per_row(cell, x[:1], *(part[:1] for part in before))
    except (RuntimeError, ValueError, TypeError, IndexError):  # it takes no more rows than there were
        return None
    if not agree(
        [named[name] for name in cell.state], [torch.cat(made) for made in zip(*kept.made, strict=True)]
    ):
        return None

    def over_time(steps: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        join = torch.stack if sequence.sizes is None else torch.cat
        along = zip(*(steps[::-1] if reverse else steps), strict=True)
        joined = (join([part.detach() for part in parts]) for parts in along)
        return {name: sequence.padded(part) for name, part in zip(cell.state, joined, strict=True)}

    values = {name: value for name, value in named.items() if name in per_row}
    return _Part(
        cell=cell,
        layer=place // (1 + bidirectional),
        reverse=reverse,
        values=values,
        functions=_functions(recording, values),
        states=over_time(kept.made),
        gradients=over_time(kept.gradients),
        lengths=sequence.lengths,
    )


def _thorough(
    seen: LayerCall, output: Tensor | None, states: list[Tensor | None], differs: Callable[[], None]
) -> Iterator[_Part]:
    """The same of the whole batch, step by step."""
    trace, result = traced(seen.recurrent, seen.recurrent, seen.x, seen.state, seen.drawn_from)
    if not agree(result, (seen.as_input(seen.output), seen.final)):
        differs()
    trace.backward(loss_from_gradients(output, states))
    for part in trace.layers:
        recording = Recording()
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(part.input)), recording:
            _, named = run_with_names(part.cell, part.input[0], *part.initial_state.values())
        there = torch.arange(len(part.input)).unsqueeze(1) < part.lengths
        states_of = {name: part.values[name] for name in part.cell.state}
        yield _Part(
            cell=part.cell,
            layer=part.layer,
            reverse=part.direction == DIRECTIONS[1],
            values={name: value[there.to(value.device)] for name, value in part.values.items()},
            functions=_functions(recording, {name: named[name] for name in part.values if name in named}),
            states=states_of,
            gradients={name: part.gradients[name] for name in states_of},
            lengths=part.lengths,
        )


def _functions(
    recording: Recording, values: dict[str, Tensor]
) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    found = {name: recording.function_of(value) for name, value in values.items()}
    return {name: made for name, made in found.items() if made is not None and made[0] in _SQUASHING}


def _figures(part: _Part) -> Iterator[Figures]:
    """One record for each quantity, and for each block of a parameter that weighs a state."""
    where = {"layer": part.layer, "direction": DIRECTIONS[part.reverse]}
    for name, value in part.values.items():
        numbers = (value.abs() if value.is_complex() else value).double()
        record = dict.fromkeys(FIELDS) | where | {"quantity": name}
        record |= {"mean": numbers.mean().item(), "std": numbers.std(correction=0).item()}
        if name in part.functions:
            record["function"], function = part.functions[name]
            low, high = flat_parts(function)
            record["saturated"] = ((numbers <= low) | (numbers >= high)).double().mean().item()
        if name in part.states:
            record["dead"] = _dead(value)
            first, last, growth = _over_time(part.states[name], part, backward=False)
            record |= {"norm_first": first, "norm_last": last, "norm_growth": growth}
            first, last, growth = _over_time(part.gradients[name], part, backward=True)
            record |= {"gradient_first": first, "gradient_last": last, "gradient_growth": growth}
        yield record
    for name, radii in spectral_radii(part.cell).items():
        for k, radius in enumerate(radii):
            block = f"{name}[{k}]" if len(radii) > 1 else name
            yield dict.fromkeys(FIELDS) | where | {"quantity": block, "radius": radius}


def flat_parts(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Values of a function that never falls: up to the first of them, and from the second on, it is flat."""
    with torch.enable_grad():
        at = torch.linspace(-20, 20, 20001, dtype=torch.float64, requires_grad=True)
        made = function(at)
        (slope,) = torch.autograd.grad(made.sum(), at)
    steep = (slope >= FLAT * slope.max()).nonzero().flatten()
    first, last = int(steep[0]), int(steep[-1])
    low = made[first - 1].item() if first > 0 else -torch.inf
    return low, made[last + 1].item() if last + 1 < len(made) else torch.inf


def _dead(values: Tensor) -> int | None:
    """How many units of ``(steps of all rows, size)`` never change but for rounding."""
    if len(values) < 2:
        return None
    change = (values - values[0]).abs().amax(0)
    return int((change <= 8 * torch.finfo(values.dtype).eps * values[0].abs()).sum())


def _over_time(values: Tensor, part: _Part, backward: bool) -> tuple[float, float, float | None]:
    """The norm after the first step that runs, and after the last, and by how much it grows in a step.

    Means over the rows, the growth their geometric mean. ``backward``: the growth from the last to the first.
    """
    norms = values.detach().flatten(2).norm(dim=-1).double().cpu()
    rows = torch.arange(norms.shape[1])
    begin, end = torch.zeros_like(rows), part.lengths - 1
    first, last = norms[begin, rows], norms[end, rows]
    if part.reverse:
        first, last = last, first
    longer = part.lengths > 1
    ratio = (first / last if backward else last / first)[longer]
    growth = ratio.log() / (part.lengths[longer] - 1)
    return first.mean().item(), last.mean().item(), growth.mean().exp().item() if len(growth) else None

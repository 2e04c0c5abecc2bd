"""Health statistics of a layer in one training call: its quantities, states and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors
from unrolled.tracing.backward import differentiating, loss_from_gradients
from unrolled.tracing.call_recorder import CallRecorder
from unrolled.tracing.gradient_flow import spectral_radii
from unrolled.tracing.hooks import LayerCall, results_match
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.saturation import dead_units, saturating_functions, saturation_bounds
from unrolled.tracing.selection import BatchRows
from unrolled.tracing.step_recorder import batched_names, run_recorded, run_with_locals
from unrolled.tracing.trace import DIRECTIONS, run_traced

_MAX_STEPS = 4000  # maximum number of steps to rerun, all rows together; at least one row always runs
HealthRecord = dict[str, Any]
FIELDS = (
    "call", "module", "layer", "direction", "quantity", "mean", "std", "function", "saturated", "dead",
    "norm_first", "norm_last", "norm_growth", "gradient_first", "gradient_last", "gradient_growth", "radius",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _LayerData:
    """The values and gradients of a layer in one direction, from which its statistics are computed.

    Attributes:
        cell: The cell with its parameters.
        layer: Index of the layer.
        reverse: Whether it is the backward direction.
        values: Each quantity by name, ``(steps of all rows, …)``.
        functions: For each quantity that a saturating function computed, the function's name and the
            function.
        states, gradients: Each state and its gradient by name, ``(time, batch, size)``, zero padded.
        lengths: Sequence length of each row.
    """

    cell: Cell
    layer: int
    reverse: bool
    values: dict[str, Tensor]
    functions: dict[str, tuple[str, Callable[[Tensor], Tensor]]]
    states: dict[str, Tensor]
    gradients: dict[str, Tensor]
    lengths: Tensor


def compute_health(
    call: LayerCall,
    output_gradient: Tensor | None,
    state_gradients: list[Tensor | None],
    rows: int,
    warn_mismatch: Callable[[], None],
    steps: int = 1,
) -> list[HealthRecord]:
    """Compute the statistics that :class:`unrolled.Watch` records, after a backward pass reached a call.

    Args:
        call: The call.
        output_gradient: Gradient of its output.
        state_gradients: Gradients of its final states.
        rows: Maximum number of rows of the batch to use. All rows are used if the step draws random numbers
            or its rows depend on each other.
        warn_mismatch: Called if running the steps again gives other values than the call.
        steps: If the call has the rows of several steps of a sequence as its rows, the number of steps.
    """
    some_rows = _rerun_some_rows(call, output_gradient, state_gradients, rows)
    layers = some_rows or _rerun_whole_batch(call, output_gradient, state_gradients, warn_mismatch)
    layers = layers if steps == 1 else [_split_steps(layer, steps) for layer in layers]
    return [record for layer in layers for record in _health_records(layer)]


def _split_steps(layer: _LayerData, steps: int) -> _LayerData:
    """Give the states and gradients, whose rows are those of several steps, their axis of time."""
    states, gradients = (
        {name: value.view(steps, -1, *value.shape[2:]) for name, value in part.items()}
        for part in (layer.states, layer.gradients)
    )
    lengths = torch.full_like(layer.lengths[: len(layer.lengths) // steps], steps)
    return replace(layer, states=states, gradients=gradients, lengths=lengths)


class _StepIORecorder:
    """Records the inputs and results of each step of its ``cell``.

    Attributes:
        original: The cell to record.
        cell: A copy of it that records its steps.
        inputs: Arguments of each step: input and states.
        results: New states after each step.
        gradients: Gradients of the new states, to be filled in.
    """

    def __init__(self, cell: Cell) -> None:
        self.original = cell
        self.cell = cell.bind({})
        self.cell.__dict__["step"] = self._step
        self.inputs: list[tuple[Tensor, ...]] = []
        self.results: list[tuple[Tensor, ...]] = []
        self.gradients: list[tuple[Tensor, ...]] = []

    def _step(self, *inputs: Tensor) -> Any:
        new = self.original.step(*inputs)
        self.inputs.append(tuple(part.detach() for part in inputs))
        self.results.append(new if isinstance(new, tuple) else (new,))
        return new


def _rerun_some_rows(
    call: LayerCall, output_gradient: Tensor | None, state_gradients: list[Tensor | None], row_count: int
) -> list[_LayerData] | None:
    """Run some rows again, and compute the quantities of all their steps in a single call of the step.

    Returns:
        The data of each layer and direction; None if the results differ from those of the call.
    """
    recurrent, x, state = call.recurrent, call.input, call.initial_state
    full_batch = SequenceBatch.from_input(x, recurrent.batch_first, "")
    batch = full_batch.batch
    row_count = max(1, min(row_count, _MAX_STEPS // full_batch.time))
    expected = call.with_input_layout(call.output), call.final_state
    rows = None
    if row_count < batch:
        rows = BatchRows.from_input(tuple(range(row_count)), x, recurrent.batch_first)
        x, state = rows.select_sequence(x), rows.select_states(state)
        state_gradients = rows.select_states(state_gradients)
        output_gradient = None if output_gradient is None else rows.select_sequence(output_gradient)
        expected = rows.select_sequence(expected[0]), rows.select_states(expected[1])
    recorders: list[_StepIORecorder] = []
    with differentiating(call.random_state, cuda_devices(x)):
        x = map_tensors(x, lambda tensor: tensor.requires_grad_())
        sequence = SequenceBatch.from_input(x, recurrent.batch_first, "")

        def run(cells: list[Cell], steps: Tensor, starts: list[Any], sizes: Any, **draws: Any) -> Any:
            results = []
            for cell, start, reverse in zip(cells, starts, (False, True), strict=False):
                parameters = {name: getattr(cell, name).detach() for name in cell.shapes()}
                recorder = _StepIORecorder(cell.bind(parameters))
                recorders.append(recorder)
                start = reference.zeros(cell, steps, sizes) if start is None else start
                results.append(run_recorded(recorder.cell, steps, start, sizes, reverse, **draws))
            return results

        result = recurrent.unroll(x, state, run, *([] if rows is None else [rows.dropout]))
        if not results_match(result, expected):
            return None
        loss = loss_from_gradients(output_gradient, state_gradients)(*result)
        new_states = [
            tensor
            for recorder in recorders
            for step in recorder.results
            for tensor in step
            if tensor.requires_grad
        ]
        gradients = torch.autograd.grad(loss, new_states, allow_unused=True)
        by_id = dict(zip(map(id, new_states), gradients, strict=True))
        for recorder in recorders:
            for step in recorder.results:
                pairs = ((tensor, by_id.get(id(tensor))) for tensor in step)
                recorder.gradients.append(
                    tuple(torch.zeros_like(tensor) if grad is None else grad for tensor, grad in pairs)
                )
    for recorder in recorders:
        # Break the reference cycle. Otherwise, all tensors stay in memory until the garbage collector runs.
        del vars(recorder.cell)["step"]
    layers = [
        _compute_quantities(recorder, k, recurrent.bidirectional, sequence)
        for k, recorder in enumerate(recorders)
    ]
    complete = [layer for layer in layers if layer is not None]
    return complete if len(complete) == len(layers) else None


def _compute_quantities(
    recorder: _StepIORecorder, index: int, bidirectional: bool, sequence: SequenceBatch
) -> _LayerData | None:
    """Compute the quantities of all recorded steps at once, with the steps as rows of one large batch.

    Returns:
        The data of the layer; None if the results differ from those of the steps.
    """
    cell, reverse = recorder.original, bool(bidirectional and index % 2)
    x, *states = (torch.cat(parts) for parts in zip(*recorder.inputs, strict=True))
    call_recorder = CallRecorder()
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(x)):
            with call_recorder:
                _, named = run_with_locals(cell, x, *states)
            names = batched_names(cell, x[:1], *(part[:1] for part in states))
    except (RuntimeError, ValueError, TypeError, IndexError):  # the step accepts only the original batch size
        return None
    if not results_match(
        [named[name] for name in cell.state],
        [torch.cat(parts) for parts in zip(*recorder.results, strict=True)],
    ):
        return None

    def over_time(steps: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        join = torch.stack if sequence.batch_sizes is None else torch.cat
        by_state = zip(*(steps[::-1] if reverse else steps), strict=True)
        joined = (join([part.detach() for part in parts]) for parts in by_state)
        return {name: sequence.padded(part) for name, part in zip(cell.state, joined, strict=True)}

    values = {name: value for name, value in named.items() if name in names}
    return _LayerData(
        cell=cell,
        layer=index // (1 + bidirectional),
        reverse=reverse,
        values=values,
        functions=saturating_functions(call_recorder, values),
        states=over_time(recorder.results),
        gradients=over_time(recorder.gradients),
        lengths=sequence.lengths,
    )


def _rerun_whole_batch(
    call: LayerCall,
    output_gradient: Tensor | None,
    state_gradients: list[Tensor | None],
    warn_mismatch: Callable[[], None],
) -> Iterator[_LayerData]:
    """Run the whole batch again, step by step. It is slower, but works for every cell."""
    trace, result = run_traced(
        call.recurrent, call.recurrent, call.input, call.initial_state, call.random_state
    )
    if not results_match(result, (call.with_input_layout(call.output), call.final_state)):
        warn_mismatch()
    trace.backward(loss_from_gradients(output_gradient, state_gradients))
    for part in trace.layers:
        call_recorder = CallRecorder()
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(part.input)), call_recorder:
            _, named = run_with_locals(part.cell, part.input[0], *part.initial_state.values())
        mask = torch.arange(len(part.input)).unsqueeze(1) < part.lengths
        states = {name: part.values[name] for name in part.cell.state}
        computed = {name: named[name] for name in part.values if name in named}
        yield _LayerData(
            cell=part.cell,
            layer=part.layer,
            reverse=part.direction == DIRECTIONS[1],
            values={name: value[mask.to(value.device)] for name, value in part.values.items()},
            functions=saturating_functions(call_recorder, computed),
            states=states,
            gradients={name: part.gradients[name] for name in states},
            lengths=part.lengths,
        )


def _health_records(layer: _LayerData) -> Iterator[HealthRecord]:
    """Yield one record for each quantity, and one for each block of a hidden-to-hidden weight."""
    where = {"layer": layer.layer, "direction": DIRECTIONS[layer.reverse]}
    for name, value in layer.values.items():
        numbers = (value.abs() if value.is_complex() else value).double()
        record = dict.fromkeys(FIELDS) | where | {"quantity": name}
        record |= {"mean": numbers.mean().item(), "std": numbers.std(correction=0).item()}
        if name in layer.functions:
            record["function"], function = layer.functions[name]
            low, high = saturation_bounds(function)
            record["saturated"] = ((numbers <= low) | (numbers >= high)).double().mean().item()
        if name in layer.states:
            record["dead"] = _count_dead_units(value)
            first, last, growth = _norms_over_time(layer.states[name], layer, backward=False)
            record |= {"norm_first": first, "norm_last": last, "norm_growth": growth}
            first, last, growth = _norms_over_time(layer.gradients[name], layer, backward=True)
            record |= {"gradient_first": first, "gradient_last": last, "gradient_growth": growth}
        yield record
    for name, radius in spectral_radii(layer.cell).items():
        yield dict.fromkeys(FIELDS) | where | {"quantity": name, "radius": radius}


def _count_dead_units(values: Tensor) -> int | None:
    """Count the units of ``(steps of all rows, size)`` that never change, up to rounding."""
    return None if len(values) < 2 else int(dead_units(values, torch.finfo(values.dtype).eps).sum())


def _norms_over_time(values: Tensor, layer: _LayerData, backward: bool) -> tuple[float, float, float | None]:
    """Compute the norms after the first and the last step that run, and the growth factor per step.

    Args:
        values: A state or its gradient, ``(time, batch, size)``.
        layer: The layer.
        backward: Whether to measure growth from the last step to the first.

    Returns:
        The means of both norms over the rows, and the geometric mean of the growth. The growth is None if no
        row has two steps.
    """
    norms = values.detach().flatten(2).norm(dim=-1).double().cpu()
    rows = torch.arange(norms.shape[1])
    start, end = torch.zeros_like(rows), layer.lengths - 1
    first, last = norms[start, rows], norms[end, rows]
    if layer.reverse:
        first, last = last, first
    longer = layer.lengths > 1
    ratio = (first / last if backward else last / first)[longer]
    growth = ratio.log() / (layer.lengths[longer] - 1)
    return first.mean().item(), last.mean().item(), growth.mean().exp().item() if len(growth) else None

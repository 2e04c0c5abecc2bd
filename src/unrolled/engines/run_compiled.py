"""A call of the native engine: a cell in one direction, or in both, with its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines.autograd import DirectionSpec, Recurrence, States, group_by_direction, threads_of
from unrolled.engines.checkpointing import Segments
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native import registry
from unrolled.engines.native.compiled_cell import CompiledCell
from unrolled.engines.native.kernel import launch


@dataclass
class DirectionCall:
    """A cell that runs over a sequence in one direction.

    Attributes:
        compiled: its loops.
        cell: bound to its parameters.
        params: its parameters, in order, next to one another in memory each; then the columns beside x that
            variants read.
        state: its initial states, each ``(batch, size)``; None: zeros.
        back: from the last step to the first.
    """

    compiled: CompiledCell
    cell: Cell
    params: list[Tensor]
    state: States | None
    back: bool


def run_directions(
    lanes: Sequence[DirectionCall], x: Tensor, sizes: list[int] | None, checkpoint: int | None = None
) -> list[tuple[Tensor, States]]:
    """The output and the final states of every lane; the arguments are those of :func:`unrolled.engines.dispatch.run`.

    bfloat16 is computed in float32: it is widened before and narrowed after.
    """
    given = x.dtype
    if given is torch.bfloat16:
        x, lanes = x.float(), [_widened(lane) for lane in lanes]
    tensors: list[Tensor] = []
    for lane in lanes:
        tensors += (*(lane.state or ()), *lane.params)
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        for lane in lanes:
            lane.compiled.prepare_training()
        kinds = tuple(
            DirectionSpec(lane.compiled, lane.cell, lane.state is not None, lane.back) for lane in lanes
        )
        if checkpoint is not None and checkpoint < len(x):
            flat: Any = Segments.apply(kinds, checkpoint, x, *tensors)  # type: ignore[no-untyped-call]
        else:
            flat = Recurrence.apply(kinds, sizes, x, *tensors)  # type: ignore[no-untyped-call]
        results = group_by_direction(flat, kinds)
    else:
        results = infer(lanes, x, Layout.of(x, sizes))
    if given is torch.bfloat16:
        return [(output.to(given), tuple(part.to(given) for part in final)) for output, final in results]
    return results


def _widened(lane: DirectionCall) -> DirectionCall:
    params = [param.float() for param in lane.params]
    state = None if lane.state is None else tuple(part.float() for part in lane.state)
    cell = lane.cell.bind(dict(zip(lane.cell.shapes(), params, strict=False)))
    return DirectionCall(lane.compiled, cell, params, state, lane.back)


def infer(lanes: Sequence[DirectionCall], x: Tensor, layout: Layout) -> list[tuple[Tensor, States]]:
    """The output and the final states of every lane, without what a backward would read."""
    jobs, results, threads = [], list[tuple[Tensor, States]](), threads_of(lanes)
    for lane in lanes:
        state = None if lane.state is None else tuple(part.contiguous() for part in lane.state)
        job, output, final = lane.compiled.infer(lane.params, x, state, layout, lane.back, threads)
        jobs.append(job)
        results.append((output, final))
    if layout.rows:
        launch(jobs)
    return results


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[tuple[Tensor, ...] | None],
    sizes: list[int] | None,
    checkpoint: int | None = None,
    columns: Tensor | None = None,
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Run bound cells over a sequence, the first one forward, a second one back; see :func:`engines.run`.

    Raises:
        UnsupportedError: a step holds what the compiler can't take.
        NoCompilerError: there is no C++ compiler.
    """
    given = []
    for cell, state, back in zip(cells, states, (False, True), strict=False):
        held = cell.__dict__
        params = [held[name] for name in cell.shapes()]
        params += [] if columns is None else [columns]
        params = [param if param.is_contiguous() else param.contiguous() for param in params]
        given.append(DirectionCall(registry.compiled(cell, x.dtype), cell, params, state, back))
    return run_directions(given, x, sizes, checkpoint)

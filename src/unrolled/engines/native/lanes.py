"""A call of the native engine: a cell in one direction, or in both, with its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cell import Cell
from unrolled.engines.native.autograd import Kind, Recurrence, States, threads_of, unflattened
from unrolled.engines.native.layout import Layout
from unrolled.engines.native.loop import execute
from unrolled.engines.native.segments import Segments
from unrolled.engines.native.step import Compiled


@dataclass
class Lane:
    """A cell that runs over a sequence in one direction.

    Attributes:
        compiled: its loops.
        cell: bound to its parameters.
        params: its parameters, in order, next to one another in memory each; then the columns beside x that
            variants read.
        state: its initial states, each ``(batch, size)``; None: zeros.
        back: from the last step to the first.
    """

    compiled: Compiled
    cell: Cell
    params: list[Tensor]
    state: States | None
    back: bool


def run(
    lanes: Sequence[Lane], x: Tensor, sizes: list[int] | None, checkpoint: int | None = None
) -> list[tuple[Tensor, States]]:
    """The output and the final states of every lane; the arguments are those of :func:`unrolled.engines.run`.

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
        kinds = tuple(Kind(lane.compiled, lane.cell, lane.state is not None, lane.back) for lane in lanes)
        if checkpoint is not None and checkpoint < len(x):
            flat: Any = Segments.apply(kinds, checkpoint, x, *tensors)  # type: ignore[no-untyped-call]
        else:
            flat = Recurrence.apply(kinds, sizes, x, *tensors)  # type: ignore[no-untyped-call]
        results = unflattened(flat, kinds)
    else:
        results = infer(lanes, x, Layout.of(x, sizes))
    if given is torch.bfloat16:
        return [(output.to(given), tuple(part.to(given) for part in final)) for output, final in results]
    return results


def _widened(lane: Lane) -> Lane:
    params = [param.float() for param in lane.params]
    state = None if lane.state is None else tuple(part.float() for part in lane.state)
    cell = lane.cell.bind(dict(zip(lane.cell.shapes(), params, strict=False)))
    return Lane(lane.compiled, cell, params, state, lane.back)


def infer(lanes: Sequence[Lane], x: Tensor, layout: Layout) -> list[tuple[Tensor, States]]:
    """The output and the final states of every lane, without what a backward would read."""
    jobs, results, threads = [], list[tuple[Tensor, States]](), threads_of(lanes)
    for lane in lanes:
        state = None if lane.state is None else tuple(part.contiguous() for part in lane.state)
        job, output, final = lane.compiled.infer(lane.params, x, state, layout, lane.back, threads)
        jobs.append(job)
        results.append((output, final))
    if layout.rows:
        execute(jobs)
    return results

"""Training in bounded memory: the backward runs each segment of the sequence forward anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.autograd import (
    DirectionSpec,
    States,
    by_reference,
    group_by_direction,
    keep_graph,
    reference_gradients,
    split_by_direction,
)
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.native.kernel import launch


class Segments(torch.autograd.Function):
    """As :class:`autograd.Recurrence`, keeping no more than the states between segments."""

    @staticmethod
    def forward(ctx: Any, kinds: tuple[DirectionSpec, ...], length: int, x: Tensor, *tensors: Tensor) -> Any:
        """The output and the final states of each lane, one after another."""
        ctx.save_for_backward(x, *tensors)
        results: list[Tensor] = []
        between: list[list[States | None]] = []
        for kind, (state, params) in zip(kinds, split_by_direction(kinds, tensors), strict=True):
            state = None if state is None else tuple(part.contiguous() for part in state)
            output = x.new_empty(*x.shape[:-1], kind.compiled.widths[0])
            starts: list[States | None] = []
            for begin, end in _cuts(len(x), length, kind.back):
                starts.append(state)
                part = x[begin:end]
                threads = torch.get_num_threads()
                job, made, state = kind.compiled.infer(
                    _cut(kind, params, begin, end), part, state, Layout.of(part, None), kind.back, threads
                )
                launch([job])
                output[begin:end] = made
            between.append(starts)
            assert state is not None
            results += (output, *state)
        ctx.made = kinds, length, between
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of x and of the tensors."""
        kinds, length, between = ctx.made
        x, *tensors = ctx.saved_tensors
        if not keep_graph():
            ctx.made = None
        if by_reference(grads):
            return None, None, *reference_gradients(kinds, None, x, tensors, grads)
        of_x: Tensor | None = None
        results: list[Tensor | None] = []
        for kind, (_, params), starts, (grad, last) in zip(
            kinds, split_by_direction(kinds, tensors), between, group_by_direction(grads, kinds), strict=True
        ):
            sums: list[Tensor | None] = [None] * (len(params) - kind.columns)
            carry: Sequence[Tensor] = last
            cuts = _cuts(len(x), length, kind.back)
            for (begin, end), start in zip(reversed(cuts), reversed(starts), strict=True):
                mine = _cut(kind, params, begin, end)
                carry, found, of_part = _segment(kind, mine, x[begin:end], start, grad[begin:end], carry)
                sums = [_sum(a, b) for a, b in zip(sums, found, strict=True)]
                if of_part is not None:
                    of_x = (
                        torch.zeros_like(x, memory_format=torch.contiguous_format) if of_x is None else of_x
                    )
                    of_x[begin:end] += of_part.view(end - begin, *x.shape[1:])
            results += (*(carry if kind.stateful else ()), *sums, *[None] * kind.columns)
        return None, None, of_x, *results


def _cuts(steps: int, length: int, back: bool) -> list[tuple[int, int]]:
    """Where segments begin and end, in the order in which they run."""
    cuts = [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]
    return cuts[::-1] if back else cuts


def _cut(kind: DirectionSpec, params: list[Tensor], begin: int, end: int) -> list[Tensor]:
    """The parameters, and of columns beside x the steps of a segment."""
    return [*params[:-1], params[-1][begin:end]] if kind.columns else params


def _segment(
    kind: DirectionSpec,
    params: list[Tensor],
    x: Tensor,
    start: States | None,
    grad: Tensor,
    carry: Sequence[Tensor],
) -> tuple[Sequence[Tensor], list[Tensor | None], Tensor | None]:
    """The gradients of a segment's initial state, of the parameters and of its x."""
    layout, threads = Layout.of(x, None), torch.get_num_threads()
    job, kept, _, values = kind.compiled.forward(params, x, start, layout, kind.back, threads, keep=True)
    launch([job])
    values = kind.compiled.read_back(values)
    last = tuple(part.contiguous() for part in carry)
    job, before, found = kind.compiled.back(
        values, params, x, start, kept, grad, last, layout, kind.back, threads
    )
    launch([job])
    of_params, of_x = kind.compiled.gradients(found, layout.rows)
    return before, of_params, of_x


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a.add_(b)

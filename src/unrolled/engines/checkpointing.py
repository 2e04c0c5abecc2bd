"""Training in bounded memory: the backward pass recomputes the sequence segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines._torch_private import keep_graph
from unrolled.engines.autograd import (
    by_reference,
    materialize_gradients,
    needed_gradients,
    reference_gradients,
)
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.directions import DirectionSpec, States, group_by_direction, split_by_direction
from unrolled.engines.missing_gradients import constant_results, existing_gradients, unused_states_spread
from unrolled.engines.threads import thread_count


class CheckpointedRecurrence(torch.autograd.Function):
    """As :class:`autograd.Recurrence`, but saves only the states between segments."""

    @staticmethod
    def forward(ctx: Any, specs: tuple[DirectionSpec, ...], length: int, x: Tensor, *tensors: Tensor) -> Any:
        """Return the output and the final states of each direction in one flat tuple."""
        ctx.save_for_backward(x, *tensors)
        ctx.set_materialize_grads(False)
        results: list[Tensor] = []
        states_by_direction: list[list[States | None]] = []
        for spec, (state, params) in zip(specs, split_by_direction(specs, tensors), strict=True):
            state = None if state is None else tuple(part.contiguous() for part in state)
            output = x.new_empty(*x.shape[:-1], spec.compiled.widths[0])
            segment_states: list[States | None] = []
            for begin, end in _segments(len(x), length, spec.reverse):
                segment_states.append(state)
                segment = x[begin:end]
                call, segment_output, state = spec.compiled.inference_call(
                    _segment_params(spec, params, begin, end),
                    segment,
                    state,
                    Layout.of(segment, None),
                    spec.reverse,
                    thread_count(),
                )
                spec.compiled.backend.launch([call])
                output[begin:end] = segment_output
            states_by_direction.append(segment_states)
            assert state is not None
            results += (output, *state)
        ctx.saved = specs, length, states_by_direction
        ctx.mark_non_differentiable(*constant_results(specs, len(x), None, ctx.needs_input_grad[2:], results))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of x and of the tensors."""
        x, *tensors = ctx.saved_tensors  # first, because it raises torch's error at a second backward pass
        specs, length, states_by_direction = ctx.saved
        if not keep_graph():
            ctx.saved = None
        grads = materialize_gradients(grads, [x, *tensors])
        if by_reference(grads):
            return None, None, *reference_gradients(specs, None, x, tensors, grads)
        grad_x: Tensor | None = None
        results: list[Tensor | None] = []
        for spec, needed, (_, params), segment_states, (grad_output, grad_final) in zip(
            specs,
            needed_gradients(specs, ctx.needs_input_grad[2:]),
            split_by_direction(specs, tensors),
            states_by_direction,
            group_by_direction(grads, specs),
            strict=True,
        ):
            grad_params: list[Tensor | None] = [None] * (len(params) - spec.extra_input_count)
            if grad_output is None:
                grad_output = x.new_zeros(*x.shape[:-1], spec.compiled.widths[0])
            grad_state: Sequence[Tensor | None] = grad_final
            segments = _segments(len(x), length, spec.reverse)
            for (begin, end), state in zip(reversed(segments), reversed(segment_states), strict=True):
                grad_state, segment_grad_params, segment_grad_x = _segment_gradients(
                    spec,
                    _segment_params(spec, params, begin, end),
                    x[begin:end],
                    state,
                    grad_output[begin:end],
                    grad_state,
                    needed,
                )
                grad_params = [_add(a, b) for a, b in zip(grad_params, segment_grad_params, strict=True)]
                if segment_grad_x is not None:
                    if grad_x is None:
                        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
                    grad_x[begin:end] += segment_grad_x.view(end - begin, *x.shape[1:])
            initial = grad_state if spec.stateful else ()
            results += (*initial, *grad_params, *[None] * spec.extra_input_count)
        results = [grad_x, *results]
        if unused_states_spread(specs, grads, results):
            return None, None, *reference_gradients(specs, None, x, tensors, grads)
        return None, None, *existing_gradients(specs, len(x), None, grads, results)


def _segments(steps: int, length: int, reverse: bool) -> list[tuple[int, int]]:
    """Return the first step and the end of each segment, in the order in which they run."""
    segments = [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]
    return segments[::-1] if reverse else segments


def _segment_params(spec: DirectionSpec, params: list[Tensor], begin: int, end: int) -> list[Tensor]:
    """Return the parameters, with the extra inputs cut to a segment."""
    return [*params[:-1], params[-1][begin:end]] if spec.extra_input_count else params


def _segment_gradients(
    spec: DirectionSpec,
    params: list[Tensor],
    x: Tensor,
    state: States | None,
    grad_output: Tensor,
    grad_final: Sequence[Tensor | None],
    needed: tuple[bool, ...],
) -> tuple[Sequence[Tensor], list[Tensor | None], Tensor | None]:
    """Return the gradients of a segment's initial states, of the parameters and of its x."""
    layout, threads = Layout.of(x, None), thread_count()
    call, step_states, _, values = spec.compiled.forward_call(
        params, x, state, layout, spec.reverse, threads, save_for_backward=True
    )
    spec.compiled.backend.launch([call])
    values = spec.compiled.select_saved(values)
    grads = tuple(None if part is None else part.contiguous() for part in grad_final)
    call, grad_initial, backward_values = spec.compiled.backward_call(
        values, params, x, state, step_states, grad_output, grads, layout, spec.reverse, threads
    )
    spec.compiled.backend.launch([call])
    grad_params, grad_x = spec.compiled.gradients(backward_values, layout.rows, needed)
    return grad_initial, grad_params, grad_x


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total.add_(part)

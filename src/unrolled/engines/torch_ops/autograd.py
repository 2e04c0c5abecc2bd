"""The gradients of the operators, of any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd.function import _SingleLevelFunction

from unrolled.engines import reference
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.torch_ops.operators import (
    SerializedDirection,
    axes_of_gradients,
    axes_of_results,
    elsewhere,
    library,
    read_lanes,
)

_ops: Any = torch.ops.unrolled


class _Kept(_SingleLevelFunction):
    """``recurrence_kept``; what is kept beside the results has no gradient."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor | None, text: str, x: Tensor, *tensors: Tensor) -> Any:
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():  # which levels below may need
            results = _ops.recurrence_kept(x, tensors, sizes, text)
        axes = axes_of_results(read_lanes(text, tensors))
        outputs = [result for result, axis in zip(results, axes, strict=False) if axis == 1]
        extras = results[len(axes) :]
        ctx.mark_non_differentiable(*extras)
        ctx.save_for_backward(sizes, x, *tensors, *outputs, *extras)
        ctx.text, ctx.tensors, ctx.results = text, len(tensors), len(axes)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        sizes, x, *saved = ctx.saved_tensors
        tensors, made = saved[: ctx.tensors], saved[ctx.tensors :]
        found = _ops.recurrence_back(list(grads[: ctx.results]), made, x, tensors, sizes, ctx.text)
        return None, None, *_in_places(found, x, tensors, ctx.text)


class _Back(_SingleLevelFunction):
    """``recurrence_back``; its own gradients are those of the reference engine's backward.

    What it reads of the forward is a function of x and the tensors and counts as one: its gradient is part
    of theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: Tensor | None, text: str, groups: int, grads: int, made: int, *flat: Tensor
    ) -> Any:
        x, *tensors = flat[grads + made :]
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            results = _ops.recurrence_back(
                flat[:grads], flat[grads : grads + made], x, tensors, sizes, text, groups
            )
        ctx.save_for_backward(sizes, *flat[:grads], x, *tensors)
        ctx.text, ctx.groups, ctx.grads, ctx.made = text, groups, grads, made
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> Any:
        sizes, *inputs = ctx.saved_tensors

        def first(*given: Tensor) -> tuple[Tensor, ...]:
            grads, (x, *tensors) = given[: ctx.grads], given[ctx.grads :]
            return _back_by_reference(grads, x, tensors, sizes, ctx.text, ctx.groups)

        pull: Any = torch.func.vjp(first, *inputs)[1]
        found = pull(tuple(second))
        nothing = [None] * ctx.made
        return None, None, None, None, None, *found[: ctx.grads], *nothing, *found[ctx.grads :]


def _apply(function: Any, *arguments: Any) -> list[Tensor]:
    """Apply a function at the level of torch.func that the dispatcher is at, or at none."""
    with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
        return list(function.apply(*arguments))


def _in_places(found: Sequence[Any], x: Tensor, tensors: Sequence[Tensor], text: str) -> list[Any]:
    """The gradients that there are in the order of x and the tensors, None where there is none."""
    given, read = iter(found), read_lanes(text, tensors)
    steps = [lane.compiled(x.dtype).captured for lane in read]
    results = [next(given) if any(step.grad_x for step in steps) else None]
    for lane, step in zip(read, steps, strict=True):
        results += [next(given) for _ in lane.states]
        results += [None if node is None else next(given) for node in step.grad_params]
        results += [None for _ in lane.own]
    return results


# --- the same by the reference engine ---


def _forward_by_reference(
    x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str
) -> tuple[Tensor, ...]:
    results: list[Tensor] = []
    for lane in read_lanes(text, tensors):
        states = tuple(lane.states) or None
        steps = None if sizes is None else sizes.tolist()
        output, final = reference.run(lane.bound(), x, states, steps, lane.back)
        results += (output, *final)
    return tuple(results)


def _back_by_reference(
    grads: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int,
) -> tuple[Tensor, ...]:
    if groups > 1:
        return _groups_by_reference(grads, x, tensors, text, groups)

    def forward(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _forward_by_reference(x, tensors, sizes, text)

    pull: Any = torch.func.vjp(forward, x, *tensors)[1]
    found = pull(tuple(grads))
    wanted = _in_places(range(len(found)), x, tensors, text)
    return tuple(grad for grad, place in zip(found, wanted, strict=True) if place is not None)


def _groups_by_reference(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], text: str, groups: int
) -> tuple[Tensor, ...]:
    """The gradients of parameters for each of so many groups of rows."""
    read = read_lanes(text, tensors)
    axes = axes_of_results(read)
    of_rows = [k < len(lane.states) for lane in read for k, _ in enumerate(lane.tensors)]
    found = []
    for k in range(groups):
        mine = [grad.chunk(groups, axis)[k] for grad, axis in zip(grads, axes, strict=True)]
        part = [t.chunk(groups, 0)[k] if rows else t for t, rows in zip(tensors, of_rows, strict=True)]
        found.append(_back_by_reference(mine, x.chunk(groups, 1)[k], part, None, text, 1))
    return tuple(
        torch.stack(parts) if axis is None else torch.cat(parts, axis)
        for parts, axis in zip(zip(*found, strict=True), axes_of_gradients(read, x.dtype), strict=True)
    )


# --- the operators where gradients are wanted, and where not ---


def _recurrence(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> Any:
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.recurrence(x, tensors, sizes, text)
    read = read_lanes(text, tensors)
    if not all(_trains(lane, x.dtype) for lane in read):
        return list(_forward_by_reference(x, tensors, sizes, text))
    return _apply(_Kept, sizes, text, x, *tensors)[: len(axes_of_results(read))]


def _recurrence_kept(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, tensors):
        return _apply(_Kept, sizes, text, x, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.recurrence_kept(x, tensors, sizes, text)


def _recurrence_back(
    grads: Sequence[Tensor],
    made: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int = 1,
) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(grads, x, tensors):
        return _apply(_Back, sizes, text, groups, len(grads), len(made), *grads, *made, x, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.recurrence_back(grads, made, x, tensors, sizes, text, groups)


def _trains(lane: SerializedDirection, dtype: torch.dtype) -> bool:
    """Whether the backward of a lane can be compiled, which it then is."""
    compiled = lane.compiled(dtype)
    try:
        elsewhere(compiled.prepare_training)
    except UnsupportedError:
        return False
    return all(shape[0] > 0 for shape in compiled.shapes_kept)


library.impl("recurrence", _recurrence, "Autograd")
library.impl("recurrence_kept", _recurrence_kept, "Autograd")
library.impl("recurrence_back", _recurrence_back, "Autograd")

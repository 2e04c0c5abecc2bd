"""Gradients of the operators, to any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines import reference
from unrolled.engines._torch_private import (
    BelowAutograd,
    SingleLevelFunction,
    any_requires_grad,
    enable_single_level_autograd_function,
    in_onnx_export,
)
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.step_values import BY_REFERENCE, check_same_values
from unrolled.engines.torch_ops import argument_checks, recording
from unrolled.engines.torch_ops.operators import (
    SerializedDirection,
    checked_directions,
    deserialize_directions,
    gradient_batch_axes,
    library,
    result_batch_axes,
)
from unrolled.engines.torch_ops.outside_transforms import run_outside_transforms

_ops: Any = torch.ops.unrolled


class _Forward(SingleLevelFunction):
    """``recurrence_kept``, where the values saved for the backward pass have no gradient."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor | None, text: str, x: Tensor, *tensors: Tensor) -> Any:
        with torch.enable_grad(), BelowAutograd():  # outer levels may need gradients
            results = _ops.recurrence_kept(x, tensors, sizes, text)
        axes = result_batch_axes(deserialize_directions(text, tensors))
        outputs = [result for result, axis in zip(results, axes, strict=False) if axis == 1]
        saved = results[len(axes) :]
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(sizes, x, *tensors, *outputs, *saved)
        ctx.text, ctx.tensor_count, ctx.result_count = text, len(tensors), len(axes)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        sizes, x, *rest = ctx.saved_tensors
        tensors, outputs_and_saved = rest[: ctx.tensor_count], rest[ctx.tensor_count :]
        result_grads = list(grads[: ctx.result_count])
        gradients = _ops.recurrence_back(result_grads, outputs_and_saved, x, tensors, sizes, ctx.text)
        return None, None, *_insert_nones(gradients, x, tensors, ctx.text)


class _Backward(SingleLevelFunction):
    """``recurrence_back``, whose own gradients come from the reference engine's backward pass.

    The values saved by the forward pass are a function of x and the tensors. Their gradient is therefore part
    of the gradients of x and the tensors, and is None by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: Tensor | None, text: str, groups: int, grads: int, saved: int, *flat: Tensor
    ) -> Any:
        """Take ``grads`` gradients, ``saved`` outputs and saved values, x and the tensors, in a row."""
        x, *tensors = flat[grads + saved :]
        with torch.enable_grad(), BelowAutograd():
            results = _ops.recurrence_back(
                flat[:grads], flat[grads : grads + saved], x, tensors, sizes, text, groups
            )
        ctx.save_for_backward(sizes, *flat[:grads], x, *tensors)
        ctx.text, ctx.groups, ctx.grads, ctx.saved = text, groups, grads, saved
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *second_grads: Tensor) -> Any:
        sizes, *inputs = ctx.saved_tensors

        def backward_pass(*inputs: Tensor) -> tuple[Tensor, ...]:
            grads, (x, *tensors) = inputs[: ctx.grads], inputs[ctx.grads :]
            return _backward_by_reference(grads, x, tensors, sizes, ctx.text, ctx.groups)

        vjp: Any = torch.func.vjp(backward_pass, *inputs)[1]
        gradients = vjp(tuple(second_grads))
        of_saved = [None] * ctx.saved
        return None, None, None, None, None, *gradients[: ctx.grads], *of_saved, *gradients[ctx.grads :]


def _apply(function: Any, *arguments: Any) -> list[Tensor]:
    """Apply an autograd function at the dispatcher's current torch.func level, if there is one."""
    with enable_single_level_autograd_function():
        return list(function.apply(*arguments))


def _insert_nones(gradients: Sequence[Any], x: Tensor, tensors: Sequence[Tensor], text: str) -> list[Any]:
    """Return the gradients in the order of x and the tensors, with None where there is no gradient."""
    remaining, directions = iter(gradients), deserialize_directions(text, tensors)
    captured = [direction.compiled(x).captured for direction in directions]
    results = [next(remaining) if any(step.grad_x for step in captured) else None]
    for direction, step in zip(directions, captured, strict=True):
        results += [next(remaining) for _ in direction.states]
        results += [None if node is None else next(remaining) for node in step.grad_params]
        results += [None for _ in direction.tensor_attributes]
    return results


# --- the same on the reference engine ---


def _forward_by_reference(
    x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str
) -> tuple[Tensor, ...]:
    results: list[Tensor] = []
    for direction in deserialize_directions(text, tensors):
        check_same_values(direction.cell, direction.graph_cell.values.digest, BY_REFERENCE)
        states = tuple(direction.states) or None
        size_list = None if sizes is None else recording.read_sizes(sizes)
        output, final = reference.run(direction.bound(), x, states, size_list, direction.reverse)
        results += (output, *final)
    return tuple(results)


def _backward_by_reference(
    grads: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int,
) -> tuple[Tensor, ...]:
    if groups > 1:
        return _grouped_backward_by_reference(grads, x, tensors, text, groups)

    def forward(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _forward_by_reference(x, tensors, sizes, text)

    vjp: Any = torch.func.vjp(forward, x, *tensors)[1]
    gradients = vjp(tuple(grads))
    indices = _insert_nones(range(len(gradients)), x, tensors, text)  # None: the operator has no gradient
    return tuple(grad for grad, index in zip(gradients, indices, strict=True) if index is not None)


def _grouped_backward_by_reference(
    grads: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], text: str, groups: int
) -> tuple[Tensor, ...]:
    """Return the gradients, with those of parameters for each group of the batch."""
    directions = deserialize_directions(text, tensors)
    axes = result_batch_axes(directions)
    is_state = [
        k < len(direction.states) for direction in directions for k, _ in enumerate(direction.tensors)
    ]
    gradients_by_group = []
    for k in range(groups):
        group_grads = [grad.chunk(groups, axis)[k] for grad, axis in zip(grads, axes, strict=True)]
        group_tensors = [
            tensor.chunk(groups, 0)[k] if batched else tensor
            for tensor, batched in zip(tensors, is_state, strict=True)
        ]
        group_x = x.chunk(groups, 1)[k]
        gradients_by_group.append(_backward_by_reference(group_grads, group_x, group_tensors, None, text, 1))
    gradient_axes = gradient_batch_axes(directions, x)
    return tuple(
        torch.stack(parts) if axis is None else torch.cat(parts, axis)
        for parts, axis in zip(zip(*gradients_by_group, strict=True), gradient_axes, strict=True)
    )


# --- Autograd kernels ---


def _recurrence(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> Any:
    if in_onnx_export() or not (torch.is_grad_enabled() and any_requires_grad(x, tensors)):
        with BelowAutograd():
            return _ops.recurrence(x, tensors, sizes, text)
    directions = checked_directions(x, tensors, sizes, text)
    if not all(_can_train(direction, x) for direction in directions):
        return list(_forward_by_reference(x, tensors, sizes, text))
    return _apply(_Forward, sizes, text, x, *tensors)[: len(result_batch_axes(directions))]


def _recurrence_kept(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> Any:
    if torch.is_grad_enabled() and any_requires_grad(x, tensors):
        checked_directions(x, tensors, sizes, text)
        return _apply(_Forward, sizes, text, x, *tensors)
    with BelowAutograd():
        return _ops.recurrence_kept(x, tensors, sizes, text)


def _recurrence_back(
    grads: Sequence[Tensor],
    outputs_and_saved: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int = 1,
) -> Any:
    if torch.is_grad_enabled() and any_requires_grad(grads, x, tensors):
        directions = checked_directions(x, tensors, sizes, text)
        argument_checks.check_backward(directions, grads, outputs_and_saved, x, sizes, groups)
        counts = len(grads), len(outputs_and_saved)
        return _apply(_Backward, sizes, text, groups, *counts, *grads, *outputs_and_saved, x, *tensors)
    with BelowAutograd():
        return _ops.recurrence_back(grads, outputs_and_saved, x, tensors, sizes, text, groups)


def _can_train(direction: SerializedDirection, x: Tensor) -> bool:
    """Compile the backward pass of a direction, and return whether that was possible."""
    compiled = direction.compiled(x)

    def prepare() -> list[tuple[tuple[int, ...], torch.dtype]]:
        compiled.prepare_training()
        return compiled.saved_tensors

    try:
        return all(shape[:1] != (0,) for shape, _ in run_outside_transforms(prepare))
    except UnsupportedError:
        return False


library.impl("recurrence", _recurrence, "Autograd")
library.impl("recurrence_kept", _recurrence_kept, "Autograd")
library.impl("recurrence_back", _recurrence_back, "Autograd")

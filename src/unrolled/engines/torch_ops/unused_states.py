"""Gradients for states that nothing uses, which the operators get as zeros instead of None."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.engines import autograd
from unrolled.engines.directions import DirectionSpec
from unrolled.engines.missing_gradients import all_complete, states_are_skipped
from unrolled.engines.torch_ops.outside_transforms import run_outside_transforms


def exclude_unused_states(
    specs: Sequence[DirectionSpec],
    sizes: list[int] | None,
    x: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    results: list[Tensor | None],
    groups: int,
) -> list[Tensor | None]:
    """Compute gradients again if infinity may have spread from states whose gradients are zero.

    0 · infinity is NaN, and autograd doesn't visit a state that nothing uses.

    Args:
        specs: The directions.
        sizes: Number of sequences at each time step of packed input.
        x: The input.
        tensors: Initial states, parameters and extra inputs of each direction.
        grads: Gradients of the output and of the final states of each direction.
        results: Gradients of x and of the tensors, as :func:`.autograd.gradients` returns them.
        groups: Number of groups of the batch, as for :func:`.autograd.gradients`.

    Returns:
        The gradients: ``results`` if they are finite.
    """
    if all_complete(specs) or all(r is None or bool(r.isfinite().all()) for r in results):
        return results
    used = [grad if bool(grad.any()) else None for grad in grads]
    if all(grad is not None for grad in used) and not states_are_skipped(specs, used):
        return results
    axes: list[int | None] = [1]
    for spec in specs:
        axes += [0] * spec.state_count + [None] * len(spec.cell.shapes()) + [1] * spec.extra_input_count
    grad_axes = [axis for spec in specs for axis in (1, *[0] * len(spec.cell.state))]

    def of_group(k: int) -> list[Tensor | None]:
        def select(tensor: Tensor, axis: int | None) -> Tensor:
            return tensor if axis is None or groups == 1 else tensor.chunk(groups, axis)[k]

        leaves = [
            select(tensor, axis).detach().requires_grad_(result is not None)
            for tensor, axis, result in zip((x, *tensors), axes, results, strict=True)
        ]
        group_grads = [
            None if grad is None else select(grad, axis) for grad, axis in zip(used, grad_axes, strict=True)
        ]
        gradients = autograd.reference_gradients(specs, sizes, leaves[0], leaves[1:], group_grads)
        return [
            torch.zeros_like(leaf) if leaf.requires_grad and gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]

    if groups == 1:
        return run_outside_transforms(lambda: of_group(0))
    by_group = run_outside_transforms(lambda: [of_group(k) for k in range(groups)])
    joined: list[Tensor | None] = []
    for axis, parts in zip(axes, zip(*by_group, strict=True), strict=True):
        given = [part for part in parts if part is not None]
        joined.append(None if not given else torch.stack(given) if axis is None else torch.cat(given, axis))
    return joined

"""The operators under vmap: one call with the rows of all mapped calls, if they share their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.torch_ops.operators import (
    SerializedDirection,
    deserialize_directions,
    gradient_batch_axes,
    library,
    result_batch_axes,
    saved_batch_axes,
)

_ops: Any = torch.ops.unrolled


def _recurrence(info: Any, in_dims: Any, x: Tensor, tensors: Any, sizes: Any, text: str) -> Any:
    axes = result_batch_axes(deserialize_directions(text, tensors))
    return _forward(_ops.recurrence, axes, info, in_dims, x, tensors, sizes, text)


def _recurrence_kept(info: Any, in_dims: Any, x: Tensor, tensors: Any, sizes: Any, text: str) -> Any:
    directions = deserialize_directions(text, tensors)
    axes = [*result_batch_axes(directions), *saved_batch_axes(directions, x)]
    return _forward(_ops.recurrence_kept, axes, info, in_dims, x, tensors, sizes, text)


def _forward(
    operator: Any,
    axes: Sequence[int | None],
    info: Any,
    in_dims: Any,
    x: Tensor,
    tensors: Any,
    sizes: Any,
    text: str,
) -> Any:
    calls, directions = info.batch_size, deserialize_directions(text, tensors)
    if sizes is not None or not _share_parameters(directions, in_dims[1]):
        return _call_one_by_one(operator, calls, in_dims, x, tensors, sizes, text)
    merged_x = _merge(x, in_dims[0], 1, calls)
    results = operator(merged_x, _merge_states(directions, in_dims[1], calls), None, text)
    return [_unmerge(*pair, calls) for pair in zip(results, axes, strict=True)], list(axes)


def _recurrence_back(
    info: Any,
    in_dims: Any,
    grads: Any,
    outputs_and_saved: Any,
    x: Tensor,
    tensors: Any,
    sizes: Any,
    text: str,
    groups: int = 1,
) -> Any:
    calls, directions = info.batch_size, deserialize_directions(text, tensors)
    if sizes is not None or not _share_parameters(directions, in_dims[3]):
        arguments = (grads, outputs_and_saved, x, tensors, sizes, text, groups)
        return _call_one_by_one(_ops.recurrence_back, calls, [*in_dims[:6], None], *arguments)
    saved_axes = [1 for _ in directions] + saved_batch_axes(directions, x)
    result_axes = result_batch_axes(directions)
    results = _ops.recurrence_back(
        [_merge(*item, calls) for item in zip(grads, in_dims[0], result_axes, strict=True)],
        [_merge(*item, calls) for item in zip(outputs_and_saved, in_dims[1], saved_axes, strict=True)],
        _merge(x, in_dims[2], 1, calls),
        _merge_states(directions, in_dims[3], calls),
        None,
        text,
        calls * groups,
    )
    gradients = []
    gradient_axes = gradient_batch_axes(directions, x)
    for result, axis in zip(results, gradient_axes, strict=True):
        if axis is None and calls * groups == 1:
            gradients.append(result.unsqueeze(0))
        elif axis is None and groups == 1:
            gradients.append(result)
        else:
            gradients.append(_unmerge(result, axis or 0, calls))
    return gradients, [axis or 0 for axis in gradient_axes]


def _share_parameters(directions: Sequence[SerializedDirection], dims: Sequence[int | None]) -> bool:
    """Return whether all mapped calls have the same parameters."""
    remaining = iter(dims)
    dims_by_direction = [
        [next(remaining) for _ in direction.tensors][len(direction.states) :] for direction in directions
    ]
    return all(dim is None for direction_dims in dims_by_direction for dim in direction_dims)


def _merge_states(
    directions: Sequence[SerializedDirection], dims: Sequence[int | None], calls: int
) -> list[Tensor]:
    """Return the tensors of all directions, with the mapped calls merged into the batch of the states."""
    tensors: list[Tensor] = []
    for direction in directions:
        count, rest = len(direction.states), direction.tensors[len(direction.states) :]
        state_dims = dims[len(tensors) : len(tensors) + count]
        tensors += [
            _merge(state, dim, 0, calls) for state, dim in zip(direction.states, state_dims, strict=True)
        ]
        tensors += rest
    return tensors


def _merge(tensor: Tensor, dim: int | None, axis: int | None, calls: int) -> Tensor:
    """Merge the mapped dimension of a tensor into its batch axis; unchanged if it has no batch axis."""
    if axis is None:
        return tensor
    tensor = tensor.unsqueeze(axis) if dim is None else tensor.movedim(dim, axis)
    shape = list(tensor.shape)
    shape[axis] = calls
    return tensor.expand(shape).flatten(axis, axis + 1)


def _unmerge(tensor: Tensor, axis: int | None, calls: int) -> Tensor:
    """Undo :func:`_merge`: put a mapped dimension in front of the batch axis."""
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis : axis + 1] = (calls, shape[axis] // calls)
    return tensor.view(shape)


def _call_one_by_one(operator: Any, calls: int, in_dims: Any, *arguments: Any) -> Any:
    """Run the mapped calls in a loop, and stack their results."""
    pairs = list(zip(arguments, in_dims, strict=True))
    results = [operator(*(_select_call(argument, dim, k) for argument, dim in pairs)) for k in range(calls)]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


def _select_call(argument: Any, dims: Any, k: int) -> Any:
    """Return the argument of mapped call k."""
    if isinstance(argument, (list, tuple)):
        return [_select_call(part, dim, k) for part, dim in zip(argument, dims, strict=True)]
    return argument if dims is None or not isinstance(argument, Tensor) else argument.select(dims, k)


torch.library.register_vmap("unrolled::recurrence", _recurrence, lib=library)
torch.library.register_vmap("unrolled::recurrence_kept", _recurrence_kept, lib=library)
torch.library.register_vmap("unrolled::recurrence_back", _recurrence_back, lib=library)

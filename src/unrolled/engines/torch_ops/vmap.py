"""The operators for many calls at once (vmap): one call with the rows of all, where parameters are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.torch_ops.operators import (
    SerializedDirection,
    axes_kept,
    axes_of_gradients,
    axes_of_results,
    library,
    read_lanes,
)

_ops: Any = torch.ops.unrolled


def _recurrence(info: Any, dims: Any, x: Tensor, tensors: Any, sizes: Any, text: str) -> Any:
    read = read_lanes(text, tensors)
    return _forward(_ops.recurrence, axes_of_results(read), info, dims, x, tensors, sizes, text)


def _recurrence_kept(info: Any, dims: Any, x: Tensor, tensors: Any, sizes: Any, text: str) -> Any:
    read = read_lanes(text, tensors)
    axes = [*axes_of_results(read), *axes_kept(read, x.dtype)]
    return _forward(_ops.recurrence_kept, axes, info, dims, x, tensors, sizes, text)


def _forward(
    operator: Any,
    axes: Sequence[int | None],
    info: Any,
    dims: Any,
    x: Tensor,
    tensors: Any,
    sizes: Any,
    text: str,
) -> Any:
    many, read = info.batch_size, read_lanes(text, tensors)
    if sizes is not None or not _shared(read, dims[1]):
        return _one_by_one(operator, many, dims, x, tensors, sizes, text)
    rows = _joined(x, dims[0], 1, many)
    results = operator(rows, _joined_states(read, dims[1], many), None, text)
    return [_parted(*pair, many) for pair in zip(results, axes, strict=True)], list(axes)


def _recurrence_back(
    info: Any,
    dims: Any,
    grads: Any,
    made: Any,
    x: Tensor,
    tensors: Any,
    sizes: Any,
    text: str,
    groups: int = 1,
) -> Any:
    many, read = info.batch_size, read_lanes(text, tensors)
    if sizes is not None or not _shared(read, dims[3]):
        given = (grads, made, x, tensors, sizes, text, groups)
        return _one_by_one(_ops.recurrence_back, many, [*dims[:6], None], *given)
    axes = [1 for _ in read] + axes_kept(read, x.dtype)
    results = _ops.recurrence_back(
        [_joined(*given, many) for given in zip(grads, dims[0], axes_of_results(read), strict=True)],
        [_joined(*given, many) for given in zip(made, dims[1], axes, strict=True)],
        _joined(x, dims[2], 1, many),
        _joined_states(read, dims[3], many),
        None,
        text,
        many * groups,
    )
    found = []
    for result, axis in zip(results, axes_of_gradients(read, x.dtype), strict=True):
        if axis is None and many * groups == 1:
            found.append(result.unsqueeze(0))
        elif axis is None and groups == 1:
            found.append(result)
        else:
            found.append(_parted(result, axis or 0, many))
    return found, [axis or 0 for axis in axes_of_gradients(read, x.dtype)]


def _shared(read: Sequence[SerializedDirection], dims: Sequence[int | None]) -> bool:
    """Whether all calls have the same parameters."""
    given = iter(dims)
    of_lanes = [[next(given) for _ in lane.tensors][len(lane.states) :] for lane in read]
    return all(dim is None for of_lane in of_lanes for dim in of_lane)


def _joined_states(
    read: Sequence[SerializedDirection], dims: Sequence[int | None], many: int
) -> list[Tensor]:
    """The tensors of the lanes: initial states with the rows of all calls, the others as they are."""
    tensors: list[Tensor] = []
    for lane in read:
        states, rest = len(lane.states), lane.tensors[len(lane.states) :]
        mine = dims[len(tensors) : len(tensors) + states]
        tensors += [_joined(state, dim, 0, many) for state, dim in zip(lane.states, mine, strict=True)]
        tensors += rest
    return tensors


def _joined(tensor: Tensor, dim: int | None, axis: int | None, many: int) -> Tensor:
    """The rows of all calls along this axis; what has no rows as it is."""
    if axis is None:
        return tensor
    tensor = tensor.unsqueeze(axis) if dim is None else tensor.movedim(dim, axis)
    shape = list(tensor.shape)
    shape[axis] = many
    return tensor.expand(shape).flatten(axis, axis + 1)


def _parted(tensor: Tensor, axis: int | None, many: int) -> Tensor:
    """The reverse: an axis of calls before that of their rows."""
    if axis is None:
        return tensor
    shape = list(tensor.shape)
    shape[axis : axis + 1] = (many, shape[axis] // many)
    return tensor.view(shape)


def _one_by_one(operator: Any, many: int, dims: Any, *arguments: Any) -> Any:
    """The calls one after another, their results stacked."""
    pairs = list(zip(arguments, dims, strict=True))
    calls = [operator(*(_of_one(given, dim, k) for given, dim in pairs)) for k in range(many)]
    stacked = [torch.stack(parts) for parts in zip(*calls, strict=True)]
    return stacked, [0] * len(stacked)


def _of_one(given: Any, dims: Any, k: int) -> Any:
    """An argument of one of the calls."""
    if isinstance(given, (list, tuple)):
        return [_of_one(part, dim, k) for part, dim in zip(given, dims, strict=True)]
    return given if dims is None or not isinstance(given, Tensor) else given.select(dims, k)


torch.library.register_vmap("unrolled::recurrence", _recurrence, lib=library)
torch.library.register_vmap("unrolled::recurrence_kept", _recurrence_kept, lib=library)
torch.library.register_vmap("unrolled::recurrence_back", _recurrence_back, lib=library)

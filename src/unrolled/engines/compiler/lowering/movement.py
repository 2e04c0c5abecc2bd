"""Lowering rules for operations that only move features: torch's own operation runs on the column ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.engines._torch_private import FakeTensor, disable_current_modes, tree_map
from unrolled.engines.compiler.ir import BATCH_SYMBOL, MIXES_ROWS, UnsupportedError
from unrolled.engines.compiler.lowering.columns import ColumnIds, Columns, ColumnView, without_batch
from unrolled.engines.compiler.lowering.reductions import sum_dims

aten = torch.ops.aten

_MAX_INDICES = 32  # of a row, each compared with all positions


def move(columns: Columns, target: Any, args: Any, kwargs: Any) -> Any:
    """Run one of ``MOVEMENT_OPS`` on column ids.

    Raises:
        UnsupportedError: If it would move rows of the batch.
    """
    value = columns.node.meta["val"]
    first = next(
        v for v in (args[0] if isinstance(args[0], (list, tuple)) else args) if isinstance(v, ColumnView)
    )
    _check_batch_axis(target, first, args, value)

    def to_ids(argument: Any) -> Any:
        if isinstance(argument, (ColumnView, Tensor)):
            return _id_tensor(columns.ids_of(argument))
        if type(argument) is int and argument and argument % BATCH_SYMBOL == 0:
            return argument // BATCH_SYMBOL
        return argument

    id_args = tree_map(to_ids, args, is_leaf=lambda v: isinstance(v, ColumnView))
    with disable_current_modes():
        if target is aten.constant_pad_nd.default:
            fill = columns.ids_of(args[2] if len(args) > 2 else 0)
            moved = target(id_args[0], args[1], -1)
            moved = torch.where(moved < 0, torch.tensor(int(fill)), moved)
        else:
            moved = target(*id_args, **kwargs)
    if isinstance(moved, (tuple, list)):
        return [_column_view(part, v.shape) for part, v in zip(moved, value, strict=True)]
    return _column_view(moved, value.shape)


def _id_tensor(ids: ColumnIds) -> Tensor:
    with disable_current_modes():
        return torch.from_numpy(np.ascontiguousarray(ids).copy())


def _column_view(ids: Tensor, shape: Sequence[int]) -> ColumnView:
    with disable_current_modes():
        return ColumnView(ids.numpy().reshape(without_batch(shape)), tuple(shape))


def _check_batch_axis(target: Any, x: ColumnView, args: Any, value: Any) -> None:
    """Raise an error if an operation moves, adds or repeats rows of the batch.

    Args:
        target: The operation.
        x: Its first operand.
        args: Its arguments.
        value: Its result, as a fake tensor.

    Raises:
        UnsupportedError: If it changes rows of the batch.
    """
    rank, axis = len(x.shape), x.batch_axis
    moved_dims: list[int] = []
    if target in _DIM_POSITION:
        position = _DIM_POSITION[target]
        dims = args[position] if len(args) > position else 0
        moved_dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
        start, end, step = [*args[2:5], *(None,) * 3][:3] if target is aten.slice.Tensor else (1, 0, 1)
        if start in (0, None) and (end is None or end >= BATCH_SYMBOL) and step in (1, None):
            return  # a slice of everything
        if not moved_dims:
            moved_dims = [axis]
    elif target in _DIAGONAL_DIM_POSITION:
        position = _DIAGONAL_DIM_POSITION[target]
        diagonal_dims = args[position : position + 2]
        moved_dims = [*diagonal_dims, *(0, 1)[len(diagonal_dims) :]]
    if axis in [dim % rank for dim in moved_dims]:
        raise UnsupportedError(f"{target} {MIXES_ROWS}")
    if target in _RESHAPE_OPS:
        shape = tuple(value.shape)
        new_axis = next((k for k, size in enumerate(shape) if size and size % BATCH_SYMBOL == 0), None)
        if new_axis is None or math.prod(shape[:new_axis]) != math.prod(x.shape[:axis]):
            raise UnsupportedError(f"{target} {MIXES_ROWS}")
    if target is aten.constant_pad_nd.default and any(args[1][2 * (rank - 1 - axis) : 2 * (rank - axis)]):
        raise UnsupportedError(f"{target} adds rows to the batch")
    if target is aten.repeat.default and args[1][len(args[1]) - rank + axis] != 1:
        raise UnsupportedError(f"{target} repeats rows of the batch")


_DIM_POSITION = {  # index of the argument that has the dimension
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.flip.default: 1,
    aten.roll.default: 2,
    aten.split_with_sizes.default: 2,
    aten.cat.default: 1,
    aten.unbind.int: 1,
    aten.unfold.default: 1,
    aten.slice_scatter.default: 2,
    aten.select_scatter.default: 2,
}
_DIAGONAL_DIM_POSITION = {aten.diagonal.default: 2, aten.diagonal_scatter.default: 3}
_RESHAPE_OPS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
MOVEMENT_OPS = {
    *_DIM_POSITION,
    *_DIAGONAL_DIM_POSITION,
    *_RESHAPE_OPS,
    aten.stack.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.repeat.default,
    aten.constant_pad_nd.default,
}


def _constant_indices(columns: Columns, x: ColumnView, indices: Sequence[Any]) -> list[Tensor | None]:
    """Return the indices of an indexing operation if all are constant and leave the batch dimension alone."""
    if x.batch_axis < len(indices) and indices[x.batch_axis] is not None:
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    if any(isinstance(index, (ColumnView, FakeTensor)) for index in indices):
        raise UnsupportedError(f"{columns.node.target} needs an index that the step creates from numbers")
    return list(indices)


def _index(columns: Columns, x: Any, indices: Sequence[Any]) -> ColumnView:
    if not isinstance(x, ColumnView):
        raise UnsupportedError(f"{columns.node.target} uses an index that differs between rows of the batch")
    constant = _constant_indices(columns, x, indices)
    with disable_current_modes():
        moved = aten.index.Tensor(_id_tensor(x.ids), constant)
    return _column_view(moved, columns.node.meta["val"].shape)


def _index_select(columns: Columns, x: ColumnView, dim: int, index: Any) -> ColumnView:
    return _index(columns, x, [*(None,) * (dim % len(x.shape)), index])


def _index_put(
    columns: Columns, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> ColumnView:
    if not isinstance(x, ColumnView):
        raise UnsupportedError(
            f"{columns.node.target} writes per-row values or indices to a tensor that all rows share"
        )
    shape = tuple(columns.node.meta["val"].shape)
    mask = indices[0]
    is_mask = isinstance(mask, ColumnView) and columns.node.args[1][0].meta["val"].dtype is torch.bool  # type: ignore
    if is_mask and len(indices) == 1 and not accumulate:
        expanded = mask.ids.reshape(*mask.ids.shape, *(1,) * (len(shape) - len(mask.shape)))
        condition = ColumnView(np.broadcast_to(expanded, x.ids.shape), shape)
        if isinstance(values, ColumnView) or (isinstance(values, Tensor) and values.numel() > 1):
            raise UnsupportedError(f"{columns.node.target} with a mask needs a single number to write")
        return columns.pointwise(aten.where.self, condition, values, x)
    constant = _constant_indices(columns, x, indices)
    with disable_current_modes():
        positions = aten.index.Tensor(torch.arange(x.ids.size).view(x.ids.shape), constant).numpy()
    return write(columns, x, positions, np.broadcast_to(columns.ids_of(values), positions.shape), accumulate)


def write(
    columns: Columns, x: ColumnView, positions: ColumnIds, ids: ColumnIds, accumulate: bool
) -> ColumnView:
    """Write columns at flat positions of a value, or add them to the columns there."""
    result, positions, ids = x.ids.flatten(), positions.flatten(), ids.flatten()
    if not accumulate:
        result[positions] = ids
    while accumulate and positions.size:
        _, selected = np.unique(positions, return_index=True)  # each position at most once per round
        selected.sort()
        shape = (BATCH_SYMBOL, len(selected))
        old = ColumnView(result[positions[selected]][None], shape)
        added = ColumnView(ids[selected][None], shape)
        result[positions[selected]] = columns.pointwise(aten.add.Tensor, old, added).ids.flatten()
        positions, ids = np.delete(positions, selected), np.delete(ids, selected)
    return ColumnView(result.reshape(x.ids.shape), x.shape)


def _unfold_backward(
    columns: Columns, gradient: ColumnView, sizes: Sequence[int], dim: int, size: int, step: int
) -> ColumnView:
    """Lower the backward of ``unfold``: add the gradients of the windows at their original positions."""
    shape = tuple(sizes)
    zeros = columns.constant(0, shape)
    with disable_current_modes():
        positions = torch.arange(zeros.ids.size).view(zeros.ids.shape).unfold(dim, size, step).numpy()
    return write(columns, ColumnView(zeros.ids.copy(), shape), positions, gradient.ids, accumulate=True)


def _gather(columns: Columns, x: ColumnView, dim: int, index: Any, **_: Any) -> ColumnView:
    shape = tuple(columns.node.meta["val"].shape)
    constant = _feature_index(columns, x, dim, index)
    if constant is not None:
        with disable_current_modes():
            return _column_view(torch.gather(_id_tensor(x.ids), dim, constant), shape)
    results = []
    for single in _single_indices(index, dim):
        selected = columns.pointwise(aten.eq.Tensor, single, columns.arange(x.shape, dim))
        masked = columns.pointwise(aten.where.self, selected, x, 0.0)
        results.append(sum_dims(columns, masked, [dim]).ids)
    return ColumnView(np.concatenate(results, dim), shape)


def _scatter(accumulate: bool) -> Callable[..., ColumnView]:
    def rule(columns: Columns, x: ColumnView, dim: int, index: Any, source: Any) -> ColumnView:
        constant = _feature_index(columns, x, dim, index)
        if constant is not None:
            with disable_current_modes():
                all_positions = torch.arange(x.ids.size).view(x.ids.shape)
                positions = torch.gather(all_positions, dim, constant).numpy()
            source_ids = columns.ids_of(source)
            if source_ids.ndim:  # the index may cover a part of the source only
                source_ids = source_ids[tuple(slice(0, size) for size in positions.shape)]
            return write(columns, x, positions, np.broadcast_to(source_ids, positions.shape), accumulate)
        result = x
        for k, single in enumerate(_single_indices(index, dim)):
            selected = columns.pointwise(aten.eq.Tensor, single, columns.arange(x.shape, dim))
            new = source
            if isinstance(source, (ColumnView, Tensor)):  # the index may cover a part of the source only
                ids = columns.ids_of(source).take([k], dim)
                new = ColumnView(np.broadcast_to(ids, single.ids.shape), single.shape)
            new = columns.pointwise(aten.add.Tensor, result, new) if accumulate else new
            result = columns.pointwise(aten.where.self, selected, new, result)
        return result

    return rule


def _feature_index(columns: Columns, x: ColumnView, dim: int, index: Any) -> Tensor | None:
    """Return the values of an index along a feature dimension, or None if each row has its own indices.

    Raises:
        UnsupportedError: If the index is along the batch, or rows have too many indices each.
    """
    if (
        not isinstance(index, ColumnView)
        or not isinstance(x, ColumnView)
        or dim % len(x.shape) == x.batch_axis
    ):
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    constants = columns.constant_values(index.ids)
    if constants is not None:
        return _id_tensor(constants.astype(np.int64))
    dim %= len(x.shape)
    if index.shape[:dim] != x.shape[:dim] or index.shape[dim + 1 :] != x.shape[dim + 1 :]:
        raise UnsupportedError(
            f"{columns.node.target} uses an index that covers a part of the other dimensions"
        )
    if index.shape[dim] > _MAX_INDICES:
        raise UnsupportedError(
            f"{columns.node.target} supports up to {_MAX_INDICES} indices per row, got {index.shape[dim]}"
        )
    return None


def _single_indices(index: ColumnView, dim: int) -> list[ColumnView]:
    """Split an index along a dimension into indices of size 1."""
    dim %= len(index.shape)
    shape = (*index.shape[:dim], 1, *index.shape[dim + 1 :])
    return [ColumnView(index.ids.take([k], dim), shape) for k in range(index.shape[dim])]


def _strided_positions(
    columns: Columns, size: Any, stride: Any, offset: Any
) -> tuple[ColumnIds, tuple[int, ...]]:
    """Return the positions of a strided view's elements in the flat ids of its base, and its shape."""
    base = columns.node.args[0].meta["val"]  # type: ignore[union-attr]
    start = base.storage_offset() if offset is None else offset
    batch_strides, base_offsets = _element_offsets(base.shape, base.stride(), base.storage_offset())
    view_batch_strides, view_offsets = _element_offsets(size, stride, start)
    if batch_strides != view_batch_strides:
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    position = {int(offset): k for k, offset in enumerate(base_offsets.flatten())}
    if len(position) != base_offsets.size or not position.keys() >= set(view_offsets.flatten().tolist()):
        raise UnsupportedError(f"{columns.node.target} uses strides that are not supported by the compiler")
    positions = np.vectorize(position.__getitem__, otypes=[np.int64])(view_offsets)
    return positions.reshape(without_batch(size)), tuple(size)


def _element_offsets(size: Any, stride: Any, start: int) -> tuple[list[int], ColumnIds]:
    """Return the strides of the batch dimension, and the storage offsets of the first row's elements."""
    batch_strides = [
        step * (n // BATCH_SYMBOL)
        for n, step in zip(size, stride, strict=True)
        if n and n % BATCH_SYMBOL == 0
    ]
    grids = np.indices(without_batch(size))
    offsets = start + sum(grid * step for grid, step in zip(grids, stride, strict=True))
    return batch_strides, np.asarray(offsets)


def _as_strided(columns: Columns, x: ColumnView, size: Any, stride: Any, offset: Any = None) -> ColumnView:
    positions, shape = _strided_positions(columns, size, stride, offset)
    return ColumnView(x.ids.flatten()[positions], shape)


def _as_strided_scatter(
    columns: Columns, x: ColumnView, source: Any, size: Any, stride: Any, offset: Any = None
) -> ColumnView:
    positions, _ = _strided_positions(columns, size, stride, offset)
    ids = np.broadcast_to(columns.ids_of(source), positions.shape)
    return write(columns, x, positions, ids, accumulate=False)


INDEXING_RULES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_put.default: _index_put,
    aten._unsafe_index.Tensor: _index,
    aten._unsafe_index_put.default: _index_put,
    aten.unfold_backward.default: _unfold_backward,
    aten.as_strided.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter(accumulate=False),
    aten.scatter.value: _scatter(accumulate=False),
    aten.scatter_add.default: _scatter(accumulate=True),
}

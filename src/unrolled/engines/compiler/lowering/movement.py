"""What moves the features of a value and computes nothing: torch's own operation, run on columns' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns, ColumnView, Names, without_batch
from unrolled.engines.compiler.lowering.reductions import total

aten = torch.ops.aten


def move(columns: Columns, target: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of MOVES on the names of the columns.

    Raises:
        UnsupportedError: it would move rows of the batch.
    """
    value = columns.node.meta["val"]
    first = next(
        v for v in (args[0] if isinstance(args[0], (list, tuple)) else args) if isinstance(v, ColumnView)
    )
    _check_axis(target, first, args, value)

    def names(argument: Any) -> Any:
        if isinstance(argument, (ColumnView, Tensor)):
            return _array(columns.names(argument))
        if type(argument) is int and argument and argument % BATCH_SYMBOL == 0:
            return argument // BATCH_SYMBOL
        return argument

    given = tree_map(names, args, is_leaf=lambda v: isinstance(v, ColumnView))
    with _disable_current_modes():
        if target is aten.constant_pad_nd.default:
            fill = columns.names(args[2] if len(args) > 2 else 0)
            moved = target(given[0], args[1], -1)
            moved = torch.where(moved < 0, torch.tensor(int(fill)), moved)
        else:
            moved = target(*given, **kwargs)
    if isinstance(moved, (tuple, list)):
        return [_row(part, v.shape) for part, v in zip(moved, value, strict=True)]
    return _row(moved, value.shape)


def _array(names: Names) -> Tensor:
    with _disable_current_modes():
        return torch.from_numpy(np.ascontiguousarray(names).copy())


def _row(names: Tensor, shape: Sequence[int]) -> ColumnView:
    with _disable_current_modes():
        return ColumnView(names.numpy().reshape(without_batch(shape)), tuple(shape))


def _check_axis(target: Any, row: ColumnView, args: Any, value: Any) -> None:
    """Raise where rows of the batch would be moved."""
    rank, axis = len(row.shape), row.axis
    moved: list[int] = []
    if target in _AXIS:
        place = _AXIS[target]
        given = args[place] if len(args) > place else 0
        moved = list(given) if isinstance(given, (list, tuple)) else [given]
        start, end, step = [*args[2:5], *(None,) * 3][:3] if target is aten.slice.Tensor else (1, 0, 1)
        if start in (0, None) and (end is None or end >= BATCH_SYMBOL) and step in (1, None):
            return  # all of it
        if not moved:
            moved = [axis]
    elif target in _DIAGONAL:
        first = _DIAGONAL[target]
        moved = [*args[first : first + 2], *(0, 1)[len(args[first : first + 2]) :]]
    if axis in [m % rank for m in moved]:
        raise UnsupportedError(f"{target} mixes rows of the batch")
    if target in _VIEWS:
        new = tuple(value.shape)
        at = next((k for k, size in enumerate(new) if size and size % BATCH_SYMBOL == 0), None)
        if at is None or math.prod(new[:at]) != math.prod(row.shape[:axis]):
            raise UnsupportedError(f"{target} mixes rows of the batch")
    if target is aten.constant_pad_nd.default and any(args[1][2 * (rank - 1 - axis) : 2 * (rank - axis)]):
        raise UnsupportedError(f"{target} adds rows to the batch")
    if target is aten.repeat.default and args[1][len(args[1]) - rank + axis] != 1:
        raise UnsupportedError(f"{target} repeats rows of the batch")


_AXIS = {
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
_DIAGONAL = {aten.diagonal.default: 2, aten.diagonal_scatter.default: 3}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
MOVES = {
    *_AXIS,
    *_DIAGONAL,
    *_VIEWS,
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


def _constant_indices(columns: Columns, row: ColumnView, indices: Sequence[Any]) -> list[Tensor | None]:
    """Indices of features whose numbers are known."""
    if row.axis < len(indices) and indices[row.axis] is not None:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    if any(isinstance(index, (ColumnView, FakeTensor)) for index in indices):
        raise UnsupportedError(f"{columns.node.target} needs an index that the step itself makes of numbers")
    return list(indices)


def _indexed(columns: Columns, row: Any, indices: Sequence[Any]) -> ColumnView:
    if not isinstance(row, ColumnView):
        raise UnsupportedError(f"{columns.node.target} takes what differs from row to row of the batch")
    constant = _constant_indices(columns, row, indices)
    with _disable_current_modes():
        moved = aten.index.Tensor(_array(row.columns), constant)
    return _row(moved, columns.node.meta["val"].shape)


def _selected(columns: Columns, row: ColumnView, dim: int, index: Any) -> ColumnView:
    return _indexed(columns, row, [*(None,) * (dim % len(row.shape)), index])


def _put(
    columns: Columns, row: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> ColumnView:
    if not isinstance(row, ColumnView):
        raise UnsupportedError(f"{columns.node.target} puts what differs from row to row of the batch")
    shape = tuple(columns.node.meta["val"].shape)
    mask = indices[0]
    truth = isinstance(mask, ColumnView) and columns.node.args[1][0].meta["val"].dtype is torch.bool  # type: ignore
    if truth and len(indices) == 1 and not accumulate:
        spread = mask.columns.reshape(*mask.columns.shape, *(1,) * (len(shape) - len(mask.shape)))
        where = ColumnView(np.broadcast_to(spread, row.columns.shape), shape)
        if isinstance(values, ColumnView) or (isinstance(values, Tensor) and values.numel() > 1):
            raise UnsupportedError(f"{columns.node.target} puts as many values as a mask has places")
        return columns.pointwise(aten.where.self, where, values, row)
    constant = _constant_indices(columns, row, indices)
    with _disable_current_modes():
        places = aten.index.Tensor(torch.arange(row.columns.size).view(row.columns.shape), constant).numpy()
    names = np.broadcast_to(columns.names(values), places.shape)
    return _placed(columns, row, places, names, accumulate)


def _placed(columns: Columns, row: ColumnView, places: Names, names: Names, accumulate: bool) -> ColumnView:
    """Columns put at places of a value, or added to what is there."""
    base, places, names = row.columns.flatten(), places.flatten(), names.flatten()
    if not accumulate:
        base[places] = names
    while accumulate and places.size:
        _, now = np.unique(places, return_index=True)  # each place once a round
        now.sort()
        count = len(now)
        old, new = (ColumnView(n[None], (BATCH_SYMBOL, count)) for n in (base[places[now]], names[now]))
        base[places[now]] = columns.pointwise(aten.add.Tensor, old, new).columns.flatten()
        places, names = np.delete(places, now), np.delete(names, now)
    return ColumnView(base.reshape(row.columns.shape), row.shape)


def _folded(
    columns: Columns, row: ColumnView, sizes: Sequence[int], dim: int, size: int, step: int
) -> ColumnView:
    """The backward of unfold: windows added up where they came from."""
    shape = tuple(sizes)
    start = columns.constant(0, shape)
    with _disable_current_modes():
        places = torch.arange(start.columns.size).view(start.columns.shape).unfold(dim, size, step).numpy()
    return _placed(columns, ColumnView(start.columns.copy(), shape), places, row.columns, accumulate=True)


def _gathered(columns: Columns, row: ColumnView, dim: int, index: Any, **_: Any) -> ColumnView:
    shape = tuple(columns.node.meta["val"].shape)
    known = _feature_index(columns, row, dim, index)
    if known is not None:
        with _disable_current_modes():
            return _row(torch.gather(_array(row.columns), dim, known), shape)
    here = columns.pointwise(aten.eq.Tensor, index, columns.numbers(row.shape, dim))
    found = columns.pointwise(aten.where.self, here, row, 0.0)
    return columns.reshape(total(columns, found, [dim]), shape)


def _scattered(accumulate: bool) -> Callable[..., ColumnView]:
    def rule(columns: Columns, row: ColumnView, dim: int, index: Any, source: Any) -> ColumnView:
        known = _feature_index(columns, row, dim, index)
        if known is not None:
            with _disable_current_modes():
                places = torch.arange(row.columns.size).view(row.columns.shape)
                where = torch.gather(places, dim, known).numpy()
            given = columns.names(source)
            if given.ndim:  # the part of the source that the index covers
                given = given[tuple(slice(0, size) for size in where.shape)]
            return _placed(columns, row, where, np.broadcast_to(given, where.shape), accumulate)
        here = columns.pointwise(aten.eq.Tensor, index, columns.numbers(row.shape, dim))
        new = columns.pointwise(aten.add.Tensor, row, source) if accumulate else source
        return columns.pointwise(aten.where.self, here, new, row)

    return rule


def _feature_index(columns: Columns, row: ColumnView, dim: int, index: Any) -> Tensor | None:
    """The numbers of an index along the features; None where it is one number for each row."""
    if (
        not isinstance(index, ColumnView)
        or not isinstance(row, ColumnView)
        or dim % len(row.shape) == row.axis
    ):
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    known = columns.known(index.columns)
    if known is not None:
        return _array(known.astype(np.int64))
    dim %= len(row.shape)
    if index.shape != tuple(1 if d == dim else size for d, size in enumerate(row.shape)):
        raise UnsupportedError(f"{columns.node.target} has several places that differ from row to row")
    return None


def _strided_places(columns: Columns, size: Any, stride: Any, offset: Any) -> tuple[Names, tuple[int, ...]]:
    """Which columns of a value a view by strides has: their places in its names, in the view's shape."""
    base = columns.node.args[0].meta["val"]  # type: ignore[union-attr]
    start = base.storage_offset() if offset is None else offset
    batch, where = _addresses(base.shape, base.stride(), base.storage_offset())
    batch_seen, view = _addresses(size, stride, start)
    if batch != batch_seen:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    place = {int(address): k for k, address in enumerate(where.flatten())}
    if len(place) != where.size or not place.keys() >= set(view.flatten().tolist()):
        raise UnsupportedError(f"{columns.node.target} views a value in a way of its own")
    return np.vectorize(place.__getitem__, otypes=[np.int64])(view).reshape(without_batch(size)), tuple(size)


def _addresses(size: Any, stride: Any, start: int) -> tuple[list[int], Names]:
    """The stride of the batch, and where the columns of the first row lie."""
    batch = [
        step * (n // BATCH_SYMBOL)
        for n, step in zip(size, stride, strict=True)
        if n and n % BATCH_SYMBOL == 0
    ]
    grids = np.indices(without_batch(size))
    return batch, np.asarray(start + sum(grid * step for grid, step in zip(grids, stride, strict=True)))


def _strided(columns: Columns, row: ColumnView, size: Any, stride: Any, offset: Any = None) -> ColumnView:
    places, shape = _strided_places(columns, size, stride, offset)
    return ColumnView(row.columns.flatten()[places], shape)


def _put_strided(
    columns: Columns, row: ColumnView, source: Any, size: Any, stride: Any, offset: Any = None
) -> ColumnView:
    places, _ = _strided_places(columns, size, stride, offset)
    names = np.broadcast_to(columns.names(source), places.shape)
    return _placed(columns, row, places, names, accumulate=False)


PLACES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _indexed,
    aten.index_select.default: _selected,
    aten.index_put.default: _put,
    aten._unsafe_index.Tensor: _indexed,
    aten._unsafe_index_put.default: _put,
    aten.unfold_backward.default: _folded,
    aten.as_strided.default: _strided,
    aten.as_strided_scatter.default: _put_strided,
    aten.gather.default: _gathered,
    aten.scatter.src: _scattered(accumulate=False),
    aten.scatter.value: _scattered(accumulate=False),
    aten.scatter_add.default: _scattered(accumulate=True),
}

"""What reduces the features of a row: sums, extremes and where they are, products, running sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns, ColumnView, without_batch

aten, prims = torch.ops.aten, torch.ops.prims


def reduce(columns: Columns, row: ColumnView, dims: Sequence[int], pair: Any, whole: Any) -> ColumnView:
    """Reduce features to one, along axes that stay with size 1.

    Args:
        columns: all columns.
        row: what is reduced.
        dims: along which axes, not that of the batch.
        pair: joins two values.
        whole: joins the columns of a value.
    """
    rank = len(row.shape)
    dims = sorted({d % rank for d in dims})
    if row.axis in dims:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    kept = [d for d in range(rank) if d not in dims]
    shape = tuple(1 if d in dims else size for d, size in enumerate(row.shape))
    grid = row.columns.transpose(*kept, *dims)
    grid = grid.reshape(math.prod(without_batch([row.shape[d] for d in kept])), -1)
    if columns.runs(grid.T) < columns.runs(grid):  # what is joined lies in runs side by side
        parts = [ColumnView(part.reshape(without_batch(shape)), shape) for part in grid.T]
        return functools.reduce(functools.partial(columns.pointwise, pair), parts)
    names = []
    for line in grid:
        joined: ColumnView | None = None
        at = 0
        for length, [(name, repeats)] in columns.pieces([line]):
            if repeats or length == 1:
                part = ColumnView(np.array([[name]]), (BATCH_SYMBOL, 1))
                if length > 1 and pair in _REPEATED:
                    part = columns.pointwise(_REPEATED[pair], part, float(length))
            else:
                piece = line[at : at + length]
                part = columns.row(whole(columns.whole(piece)), columns.moving(piece))
            joined = part if joined is None else columns.pointwise(pair, joined, part)
            at += length
        assert joined is not None
        names.append(joined.columns.flatten())
    return ColumnView(np.concatenate(names).reshape(without_batch(shape)), shape)


_REPEATED = {aten.add.Tensor: aten.mul.Tensor, aten.mul.Tensor: aten.pow.Tensor_Tensor}


def total(columns: Columns, row: ColumnView, dims: Sequence[int]) -> ColumnView:
    """The sum along axes that stay with size 1."""
    return reduce(columns, row, dims, aten.add.Tensor, lambda v: torch.sum(v, 1, keepdim=True))


def _highest(columns: Columns, row: ColumnView, dims: Sequence[int]) -> ColumnView:
    return reduce(columns, row, dims, aten.maximum.default, lambda v: torch.amax(v, 1, keepdim=True))


def _lowest(columns: Columns, row: ColumnView, dims: Sequence[int]) -> ColumnView:
    return reduce(columns, row, dims, aten.minimum.default, lambda v: torch.amin(v, 1, keepdim=True))


def _product(columns: Columns, row: ColumnView, dims: Sequence[int]) -> ColumnView:
    return reduce(columns, row, dims, aten.mul.Tensor, lambda v: torch.prod(v, 1, keepdim=True))


def _axes(row: ColumnView, dims: Any) -> list[int]:
    rank = len(row.shape)
    given = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in given] if given else list(range(rank))


def _rule(reduction: Callable[[Columns, ColumnView, Sequence[int]], ColumnView]) -> Callable[..., ColumnView]:
    def rule(
        columns: Columns, row: ColumnView, dims: Any = None, keepdim: bool = False, **_: Any
    ) -> ColumnView:
        return columns.reshape(reduction(columns, row, _axes(row, dims)), columns.node.meta["val"].shape)

    return rule


def _sum(columns: Columns, row: ColumnView, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    shape, dims = columns.node.meta["val"].shape, _axes(row, dims)
    axis = row.axis
    if axis not in dims:
        return columns.reshape(total(columns, row, dims), shape)
    place = columns.node.meta.get("place")
    if place is None or not place.backward:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    many = row.shape[axis] // BATCH_SYMBOL  # the batch may be one axis with features behind it
    row = columns.reshape(row, (*row.shape[:axis], BATCH_SYMBOL, many, *row.shape[axis + 1 :]))
    features = [d + (d > axis) for d in dims if d != axis] + [axis + 1] * (many > 1)
    if features:
        row = total(columns, row, features)
    whole = columns.whole(row.columns.flatten())  # the gradient of what all rows share
    return torch.sum(whole, 0).view(shape)


def _variance(columns: Columns, row: ColumnView, dims: Any, correction: float = 1, **_: Any) -> ColumnView:
    dims = _axes(row, dims)
    count = math.prod(row.shape[d] for d in dims)
    mean = columns.pointwise(aten.div.Tensor, total(columns, row, dims), float(count))
    away = columns.pointwise(aten.sub.Tensor, row, mean)
    squares = total(columns, columns.pointwise(aten.mul.Tensor, away, away), dims)
    free = max(count - (1 if correction is None else correction), 0)
    found = columns.pointwise(aten.div.Tensor, squares, float(free))
    return columns.reshape(found, columns.node.meta["val"].shape)


def _any(columns: Columns, row: ColumnView, dims: Sequence[int]) -> ColumnView:
    return _highest(columns, columns.pointwise(aten.ne.Scalar, row, 0), dims)


def _place(columns: Columns, row: ColumnView, top: ColumnView, dim: int) -> ColumnView:
    """The first place along an axis that holds a value."""
    found = columns.pointwise(aten.eq.Tensor, row, top)
    places = columns.pointwise(aten.where.self, found, columns.numbers(row.shape, dim), math.inf)
    return _lowest(columns, places, [dim])


def _with_place(extreme: Callable[..., ColumnView]) -> Callable[..., tuple[ColumnView, ColumnView]]:
    def rule(
        columns: Columns, row: ColumnView, dim: int, keepdim: bool = False
    ) -> tuple[ColumnView, ColumnView]:
        [dim] = _axes(row, dim)
        top = extreme(columns, row, [dim])
        index = _place(columns, row, top, dim)
        shapes = [v.shape for v in columns.node.meta["val"]]
        return columns.reshape(top, shapes[0]), columns.reshape(index, shapes[1])

    return rule


def _only_place(extreme: Callable[..., ColumnView]) -> Callable[..., ColumnView]:
    def rule(columns: Columns, row: ColumnView, dim: int | None = None, keepdim: bool = False) -> ColumnView:
        if dim is None:
            raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
        [dim] = _axes(row, dim)
        index = _place(columns, row, extreme(columns, row, [dim]), dim)
        return columns.reshape(index, columns.node.meta["val"].shape)

    return rule


_MANY = 4096  # columns whose running sum can count two kinds of them in a number of 24 bits


def _running_sum(columns: Columns, row: ColumnView, dim: int, **_: Any) -> ColumnView:
    """``cumsum`` as a product with ones: the sums run in torch's order.

    A product takes infinity times 0 for the columns before it. So what is not finite is left out, and
    counted: a second product says in which columns infinity of either sign, or NaN, is reached.
    """
    [dim] = _axes(row, dim)
    if dim == row.axis:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    size = row.shape[dim]
    if size >= _MANY:
        raise UnsupportedError(f"{columns.node.target} of {_MANY} columns or more")
    pointwise = columns.pointwise
    with _disable_current_modes():
        ones = torch.ones(size, size, dtype=columns.dtype).triu()

    def run(value: ColumnView) -> ColumnView:
        last = np.moveaxis(value.columns, dim, -1)
        lines = [columns.times(line, ones) for line in last.reshape(-1, size)]
        moved = np.stack([line.columns.flatten() for line in lines]).reshape(last.shape)
        return ColumnView(np.moveaxis(moved, -1, dim), row.shape)

    finite = pointwise(aten.lt.Scalar, pointwise(aten.abs.default, row), math.inf)
    above = pointwise(aten.where.self, pointwise(aten.eq.Scalar, row, math.inf), 1.0, float(_MANY + 1))
    below = pointwise(aten.where.self, pointwise(aten.eq.Scalar, row, -math.inf), float(_MANY), above)
    counts = run(pointwise(aten.where.self, finite, 0.0, below))
    many_below = pointwise(aten.floor.default, pointwise(aten.mul.Tensor, counts, 1 / _MANY))
    up = pointwise(aten.gt.Tensor, counts, pointwise(aten.mul.Tensor, many_below, float(_MANY)))
    down = pointwise(aten.gt.Scalar, many_below, 0)
    sums = run(pointwise(aten.where.self, finite, row, 0.0))
    sums = pointwise(aten.where.self, up, math.inf, sums)
    falling = pointwise(aten.where.self, up, math.nan, -math.inf)
    return pointwise(aten.where.self, down, falling, sums)


REDUCTIONS: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    prims.sum.default: _sum,
    prims.var.default: _variance,
    aten.amax.default: _rule(_highest),
    aten.amin.default: _rule(_lowest),
    aten.prod.dim_int: _rule(_product),
    aten.any.dim: _rule(_any),
    aten.any.dims: _rule(_any),
    aten.any.default: _rule(_any),
    aten.max.dim: _with_place(_highest),
    aten.min.dim: _with_place(_lowest),
    aten.argmax.default: _only_place(_highest),
    aten.argmin.default: _only_place(_lowest),
    aten.cumsum.default: _running_sum,
}

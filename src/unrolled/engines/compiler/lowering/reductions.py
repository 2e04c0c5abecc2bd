"""Lowering rules for reductions over features: sum, product, extrema and their indices, cumulative sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from unrolled.engines._torch_private import disable_current_modes
from unrolled.engines.compiler.ir import BATCH_SYMBOL, MIXES_ROWS, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns, ColumnView, without_batch

aten, prims = torch.ops.aten, torch.ops.prims

_REPEATED_OPS = {aten.add.Tensor: aten.mul.Tensor, aten.mul.Tensor: aten.pow.Tensor_Tensor}
# Results for no columns. torch has none for amax and amin; the maximum of booleans is any.
_EMPTY_RESULTS = {aten.add.Tensor: 0, aten.mul.Tensor: 1, aten.maximum.default: 0}
_MAX_CUMSUM = 4096  # columns; float32 has 24 bits, enough for two counts below this


def reduce_dims(
    columns: Columns, x: ColumnView, dims: Sequence[int], combine: Any, reduce_row: Any
) -> ColumnView:
    """Reduce a value along feature dimensions, which keep size 1.

    Args:
        columns: Table of all columns.
        x: Value to reduce.
        dims: Dimensions to reduce; the batch can't be one of them.
        combine: Elementwise operation that combines two values.
        reduce_row: Function that reduces ``(batch, width)`` to ``(batch, 1)``.

    Raises:
        UnsupportedError: If ``dims`` has the batch dimension.
    """
    rank = len(x.shape)
    dims = sorted({d % rank for d in dims})
    if x.batch_axis in dims:
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    remaining = [d for d in range(rank) if d not in dims]
    shape = tuple(1 if d in dims else size for d, size in enumerate(x.shape))
    if x.ids.size == 0:
        return columns.constant(_EMPTY_RESULTS[combine], shape)
    grid = x.ids.transpose(*remaining, *dims)  # one line for each result
    grid = grid.reshape(math.prod(without_batch([x.shape[d] for d in remaining])), -1)
    if columns.count_runs(grid.T) < columns.count_runs(grid):  # combine whole runs, elementwise
        parts = [ColumnView(part.reshape(without_batch(shape)), shape) for part in grid.T]
        return functools.reduce(functools.partial(columns.pointwise, combine), parts)
    results = []
    for line in grid:
        result: ColumnView | None = None
        start = 0
        for length, [(column, repeats)] in columns.pieces([line]):
            if repeats or length == 1:
                part = ColumnView(np.array([[column]]), (BATCH_SYMBOL, 1))
                if length > 1 and combine in _REPEATED_OPS:
                    part = columns.pointwise(_REPEATED_OPS[combine], part, float(length))
            else:
                piece = line[start : start + length]
                part = columns.add(reduce_row(columns.to_tensor(piece)), columns.is_recurrent(piece))
            result = part if result is None else columns.pointwise(combine, result, part)
            start += length
        assert result is not None
        results.append(result.ids.flatten())
    return ColumnView(np.concatenate(results).reshape(without_batch(shape)), shape)


def sum_dims(columns: Columns, x: ColumnView, dims: Sequence[int]) -> ColumnView:
    """Sum a value along feature dimensions, which keep size 1."""
    return reduce_dims(columns, x, dims, aten.add.Tensor, lambda v: torch.sum(v, 1, keepdim=True))


def amax(columns: Columns, x: ColumnView, dims: Sequence[int]) -> ColumnView:
    """Return the maximum along feature dimensions, which keep size 1."""
    return reduce_dims(columns, x, dims, aten.maximum.default, lambda v: torch.amax(v, 1, keepdim=True))


def amin(columns: Columns, x: ColumnView, dims: Sequence[int]) -> ColumnView:
    """Return the minimum along feature dimensions, which keep size 1."""
    return reduce_dims(columns, x, dims, aten.minimum.default, lambda v: torch.amin(v, 1, keepdim=True))


def _prod(columns: Columns, x: ColumnView, dims: Sequence[int]) -> ColumnView:
    return reduce_dims(columns, x, dims, aten.mul.Tensor, lambda v: torch.prod(v, 1, keepdim=True))


def _normalize_dims(x: ColumnView, dims: Any) -> list[int]:
    """Return dimensions as a list of non-negative numbers; none means all."""
    rank = len(x.shape)
    dim_list = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in dim_list] if dim_list else list(range(rank))


def _reduction_rule(
    reduction: Callable[[Columns, ColumnView, Sequence[int]], ColumnView],
) -> Callable[..., ColumnView]:
    def rule(
        columns: Columns, x: ColumnView, dims: Any = None, keepdim: bool = False, **_: Any
    ) -> ColumnView:
        result = reduction(columns, x, _normalize_dims(x, dims))
        return columns.reshape(result, columns.node.meta["val"].shape)

    return rule


def _sum(columns: Columns, x: ColumnView, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    """Lower ``sum``. A sum over the batch is allowed in the backward only: the gradient of a shared value."""
    shape, dims = columns.node.meta["val"].shape, _normalize_dims(x, dims)
    axis = x.batch_axis
    if axis not in dims:
        return columns.reshape(sum_dims(columns, x, dims), shape)
    columns.check_sum_over_batch()
    # The batch dimension may be flattened together with features: split them into two dimensions.
    features = x.shape[axis] // BATCH_SYMBOL
    x = columns.reshape(x, (*x.shape[:axis], BATCH_SYMBOL, features, *x.shape[axis + 1 :]))
    feature_dims = [d + (d > axis) for d in dims if d != axis] + [axis + 1] * (features > 1)
    if feature_dims:
        x = sum_dims(columns, x, feature_dims)
    if x.ids.size == 0:
        return torch.zeros(shape, dtype=columns.dtype)
    return torch.sum(columns.to_tensor(x.ids.flatten()), 0).view(shape)


def _var(columns: Columns, x: ColumnView, dims: Any, correction: float = 1, **_: Any) -> ColumnView:
    dims = _normalize_dims(x, dims)
    count = math.prod(x.shape[d] for d in dims)
    mean = columns.pointwise(aten.div.Tensor, sum_dims(columns, x, dims), float(count))
    centered = columns.pointwise(aten.sub.Tensor, x, mean)
    squares = sum_dims(columns, columns.pointwise(aten.mul.Tensor, centered, centered), dims)
    degrees_of_freedom = max(count - (1 if correction is None else correction), 0)
    variance = columns.pointwise(aten.div.Tensor, squares, float(degrees_of_freedom))
    return columns.reshape(variance, columns.node.meta["val"].shape)


def _any(columns: Columns, x: ColumnView, dims: Sequence[int]) -> ColumnView:
    return amax(columns, columns.pointwise(aten.ne.Scalar, x, 0), dims)


def _first_index(columns: Columns, x: ColumnView, value: ColumnView, dim: int) -> ColumnView:
    """Return the first index along a dimension at which ``x`` equals ``value``, or is NaN."""
    is_equal = columns.pointwise(aten.eq.Tensor, x, value)
    found = columns.pointwise(aten.logical_or.default, is_equal, columns.pointwise(aten.isnan.default, x))
    indices = columns.pointwise(aten.where.self, found, columns.arange(x.shape, dim), math.inf)
    return amin(columns, indices, [dim])


def _extremum_with_index(extremum: Callable[..., ColumnView]) -> Callable[..., tuple[ColumnView, ColumnView]]:
    """Return the rule of ``max.dim`` or ``min.dim``."""

    def rule(
        columns: Columns, x: ColumnView, dim: int, keepdim: bool = False
    ) -> tuple[ColumnView, ColumnView]:
        [dim] = _normalize_dims(x, dim)
        value = extremum(columns, x, [dim])
        index = _first_index(columns, x, value, dim)
        shapes = [v.shape for v in columns.node.meta["val"]]
        return columns.reshape(value, shapes[0]), columns.reshape(index, shapes[1])

    return rule


def _index_of_extremum(extremum: Callable[..., ColumnView]) -> Callable[..., ColumnView]:
    """Return the rule of ``argmax`` or ``argmin``."""

    def rule(columns: Columns, x: ColumnView, dim: int | None = None, keepdim: bool = False) -> ColumnView:
        if dim is None:
            raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
        [dim] = _normalize_dims(x, dim)
        index = _first_index(columns, x, extremum(columns, x, [dim]), dim)
        return columns.reshape(index, columns.node.meta["val"].shape)

    return rule


def _cumsum(columns: Columns, x: ColumnView, dim: int, **_: Any) -> ColumnView:
    """Lower ``cumsum`` to a product with a triangle of ones, which adds in torch's order.

    The product multiplies later columns by 0, and infinity or NaN in one of them would make earlier results
    NaN. So only finite values are summed. A second product counts, for each column, the values up to there
    that are not finite: with weight 1 for infinity, 4096 for minus infinity, and 4097 for NaN.
    """
    [dim] = _normalize_dims(x, dim)
    if dim == x.batch_axis:
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    size = x.shape[dim]
    if x.ids.size == 0:
        return x
    if size >= _MAX_CUMSUM:
        raise UnsupportedError(f"{columns.node.target} supports fewer than {_MAX_CUMSUM} columns, got {size}")
    pointwise = columns.pointwise
    with disable_current_modes():
        triangle = torch.ones(size, size, dtype=columns.dtype).triu()

    def cumulate(value: ColumnView) -> ColumnView:
        last = np.moveaxis(value.ids, dim, -1)
        sums = [columns.matmul(line, triangle) for line in last.reshape(-1, size)]
        stacked = np.stack([line.ids.flatten() for line in sums]).reshape(last.shape)
        return ColumnView(np.moveaxis(stacked, -1, dim), x.shape)

    is_finite = pointwise(aten.lt.Scalar, pointwise(aten.abs.default, x), math.inf)
    nan_or_inf = pointwise(
        aten.where.self, pointwise(aten.eq.Scalar, x, math.inf), 1.0, float(_MAX_CUMSUM + 1)
    )
    weights = pointwise(
        aten.where.self, pointwise(aten.eq.Scalar, x, -math.inf), float(_MAX_CUMSUM), nan_or_inf
    )
    counts = cumulate(pointwise(aten.where.self, is_finite, 0.0, weights))
    minus_count = pointwise(aten.floor.default, pointwise(aten.mul.Tensor, counts, 1 / _MAX_CUMSUM))
    has_plus = pointwise(aten.gt.Tensor, counts, pointwise(aten.mul.Tensor, minus_count, float(_MAX_CUMSUM)))
    has_minus = pointwise(aten.gt.Scalar, minus_count, 0)
    sums = cumulate(pointwise(aten.where.self, is_finite, x, 0.0))
    sums = pointwise(aten.where.self, has_plus, math.inf, sums)
    sums_with_minus = pointwise(aten.where.self, has_plus, math.nan, -math.inf)
    return pointwise(aten.where.self, has_minus, sums_with_minus, sums)


REDUCTION_RULES: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    prims.sum.default: _sum,
    prims.var.default: _var,
    aten.amax.default: _reduction_rule(amax),
    aten.amin.default: _reduction_rule(amin),
    aten.prod.dim_int: _reduction_rule(_prod),
    aten.any.dim: _reduction_rule(_any),
    aten.any.dims: _reduction_rule(_any),
    aten.any.default: _reduction_rule(_any),
    aten.max.dim: _extremum_with_index(amax),
    aten.min.dim: _extremum_with_index(amin),
    aten.argmax.default: _index_of_extremum(amax),
    aten.argmin.default: _index_of_extremum(amin),
    aten.cumsum.default: _cumsum,
}

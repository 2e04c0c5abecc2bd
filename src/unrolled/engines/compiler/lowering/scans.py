"""Lowering rules for cumulative operations and for sorting.

A cumulative operation combines columns in log2(n) rounds. Sorting selects one extremum after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from unrolled.engines.compiler.ir import BATCH_SYMBOL, MIXES_ROWS, UnsupportedError
from unrolled.engines.compiler.lowering.columns import ColumnIds, Columns, ColumnView
from unrolled.engines.compiler.lowering.reductions import amax, amin
from unrolled.engines.compiler.replacements import linear_recurrence

aten = torch.ops.aten

MAX_SELECTED = 16  # extrema of a row that are selected one by one
Values = tuple[ColumnView, ...]


def feature_dim(columns: Columns, x: ColumnView, dim: int) -> int:
    """Return a dimension as a non-negative number.

    Raises:
        UnsupportedError: If it is the batch dimension.
    """
    dim %= len(x.shape)
    if dim == x.batch_axis:
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    return dim


def _scan(columns: Columns, values: Values, dim: int, combine: Callable[[Values, Values], Values]) -> Values:
    """Return, for each position of a dimension, the combination of all values up to there.

    Args:
        columns: Table of all columns.
        values: Values of the same shape that are combined together.
        dim: Feature dimension.
        combine: Associative function of the later and the earlier values.
    """
    moved = [np.moveaxis(value.ids, dim, -1) for value in values]
    size, shift = values[0].shape[dim], 1
    is_flipped = columns.count_runs(moved[0][..., ::-1]) < columns.count_runs(moved[0])
    order = -1 if is_flipped else 1  # flipped values are combined in their original order
    moved = [ids[..., ::order] for ids in moved]

    def part(ids: ColumnIds) -> ColumnView:
        return ColumnView(ids.reshape(1, -1), (BATCH_SYMBOL, ids.size))

    while shift < size:
        later = tuple(part(ids[..., shift:]) for ids in moved)
        earlier = tuple(part(ids[..., :-shift]) for ids in moved)
        if is_flipped:
            later, earlier = earlier, later
        for k, result in enumerate(combine(later, earlier)):
            new_ids = result.ids.reshape(moved[k][..., shift:].shape)
            if is_flipped:
                joined = np.concatenate([new_ids, moved[k][..., -shift:]], -1)
            else:
                joined = np.concatenate([moved[k][..., :shift], new_ids], -1)
            joined_view = ColumnView(joined.reshape(1, -1), (BATCH_SYMBOL, joined.size))
            moved[k] = columns.stored(joined_view).ids.reshape(joined.shape)
        shift *= 2
    return tuple(
        ColumnView(np.moveaxis(ids[..., ::order], -1, dim), value.shape)
        for ids, value in zip(moved, values, strict=True)
    )


def _cumprod(columns: Columns, x: ColumnView, dim: int, **_: Any) -> ColumnView:
    dim = feature_dim(columns, x, dim)
    [result] = _scan(
        columns, (x,), dim, lambda late, early: (columns.pointwise(aten.mul.Tensor, late[0], early[0]),)
    )
    return result


def _logcumsumexp(columns: Columns, x: ColumnView, dim: int) -> ColumnView:
    pointwise = columns.pointwise

    def add_exponentials(late: Values, early: Values) -> Values:
        high = pointwise(aten.maximum.default, late[0], early[0])
        low = pointwise(aten.minimum.default, late[0], early[0])
        ratio = pointwise(aten.exp.default, pointwise(aten.sub.Tensor, low, high))
        total = pointwise(aten.add.Tensor, high, pointwise(aten.log1p.default, ratio))
        return (pointwise(aten.where.self, pointwise(aten.isinf.default, high), high, total),)

    [result] = _scan(columns, (x,), feature_dim(columns, x, dim), add_exponentials)
    return result


def _cumulative_extremum(is_better: Any) -> Callable[..., Values]:
    """Return the rule of ``cummax`` or ``cummin``. NaN counts as the extremum; later indices win ties."""

    def rule(columns: Columns, x: ColumnView, dim: int) -> Values:
        pointwise, dim = columns.pointwise, feature_dim(columns, x, dim)

        def choose(late: Values, early: Values) -> Values:
            take_late = pointwise(
                aten.logical_or.default,
                pointwise(is_better, late[0], early[0]),
                pointwise(aten.isnan.default, late[0]),
            )
            pairs = zip(late, early, strict=True)
            return tuple(pointwise(aten.where.self, take_late, a, b) for a, b in pairs)

        return _scan(columns, (x, _positions(columns, x, dim)), dim, choose)

    return rule


def _positions(columns: Columns, x: ColumnView, dim: int) -> ColumnView:
    """Return the position of each column along a dimension."""
    return ColumnView(np.broadcast_to(columns.ids_of(columns.arange(x.shape, dim)), x.ids.shape), x.shape)


def _select(columns: Columns, x: ColumnView, dim: int, count: int, largest: bool) -> Values:
    """Return the ``count`` largest or smallest values along a dimension, in order, and their indices.

    NaN is larger than any number. Of equal values, the one with the lowest index comes first.

    Raises:
        UnsupportedError: If there are too many.
    """
    if count > MAX_SELECTED:
        raise UnsupportedError(
            f"{columns.node.target} supports up to {MAX_SELECTED} sorted values per row, got {count}"
        )
    shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
    if 0 in shape:
        return columns.constant(0, shape), columns.constant(0, shape)
    pointwise, positions = columns.pointwise, _positions(columns, x, dim)
    x = columns.stored(x)
    is_nan = pointwise(aten.isnan.default, x)
    taken: ColumnView = columns.constant(0, x.shape)
    results: list[Values] = []
    for _ in range(count):
        free = pointwise(aten.logical_not.default, taken)
        if largest:
            value = amax(columns, pointwise(aten.where.self, taken, -math.inf, x), [dim])
            matches = pointwise(aten.logical_or.default, pointwise(aten.eq.Tensor, x, value), is_nan)
        else:
            ignored = pointwise(aten.logical_or.default, taken, is_nan)
            value = amin(columns, pointwise(aten.where.self, ignored, math.inf, x), [dim])
            matches = pointwise(aten.eq.Tensor, x, value)
        candidates = pointwise(aten.logical_and.default, matches, free)
        index = amin(columns, pointwise(aten.where.self, candidates, positions, math.inf), [dim])
        if not largest:  # without a match, only NaN is left
            only_nan = pointwise(aten.isinf.default, index)
            first_free = amin(columns, pointwise(aten.where.self, free, positions, math.inf), [dim])
            index = pointwise(aten.where.self, only_nan, first_free, index)
            value = pointwise(aten.where.self, only_nan, math.nan, value)
        results.append((value, index))
        taken = pointwise(aten.logical_or.default, taken, pointwise(aten.eq.Tensor, positions, index))
        taken = columns.stored(taken)
    values, indices = ([r[k].ids for r in results] for k in (0, 1))
    return tuple(ColumnView(np.concatenate(parts, dim), shape) for parts in (values, indices))


def _topk(
    columns: Columns, x: ColumnView, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Values:
    return _select(columns, x, feature_dim(columns, x, dim), k, largest)


def _sort(columns: Columns, x: ColumnView, dim: int = -1, descending: bool = False, **_: Any) -> Values:
    dim = feature_dim(columns, x, dim)
    return _select(columns, x, dim, x.shape[dim], descending)


def _kth_value(columns: Columns, x: ColumnView, k: int, dim: int = -1, keepdim: bool = False) -> Values:
    dim = feature_dim(columns, x, dim)
    results = _select(columns, x, dim, k, largest=False)
    last = (ColumnView(v.ids.take([k - 1], dim), (*x.shape[:dim], 1, *x.shape[dim + 1 :])) for v in results)
    shapes = [v.shape for v in columns.node.meta["val"]]
    return tuple(columns.reshape(v, shape) for v, shape in zip(last, shapes, strict=True))


def _median(columns: Columns, x: ColumnView, dim: int = -1, keepdim: bool = False) -> Values:
    """Lower ``median``: the lower one of two; of a row with NaN, the first NaN."""
    dim = feature_dim(columns, x, dim)
    value, index = _kth_value(columns, x, (x.shape[dim] + 1) // 2, dim)
    is_nan = columns.pointwise(aten.isnan.default, x)
    first_nan = amin(
        columns,
        columns.pointwise(aten.where.self, is_nan, _positions(columns, x, dim), math.inf),
        [dim],
    )
    first_nan = columns.reshape(first_nan, index.shape)
    has_nan = columns.pointwise(aten.lt.Scalar, first_nan, math.inf)
    return (
        columns.pointwise(aten.where.self, has_nan, math.nan, value),
        columns.pointwise(aten.where.self, has_nan, first_nan, index),
    )


def _linear_recurrence(columns: Columns, factors: ColumnView, x: ColumnView, dim: int) -> ColumnView:
    pointwise = columns.pointwise

    def compose(late: Values, early: Values) -> Values:
        factor = pointwise(aten.mul.Tensor, late[0], early[0])
        return factor, pointwise(aten.add.Tensor, pointwise(aten.mul.Tensor, late[0], early[1]), late[1])

    return _scan(columns, (factors, x), feature_dim(columns, x, dim), compose)[1]


SCAN_RULES: dict[Any, Callable[..., Any]] = {
    aten.cumprod.default: _cumprod,
    aten.logcumsumexp.default: _logcumsumexp,
    linear_recurrence: _linear_recurrence,
    aten.cummax.default: _cumulative_extremum(aten.ge.Tensor),
    aten.cummin.default: _cumulative_extremum(aten.le.Tensor),
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: lambda columns, x, *, stable=None, dim=-1, descending=False: _sort(
        columns, x, dim, descending
    ),
    aten.kthvalue.default: _kth_value,
    aten.median.dim: _median,
}

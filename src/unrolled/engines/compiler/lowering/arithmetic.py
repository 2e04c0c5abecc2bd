"""What computes in a step besides functions of an element and reductions: products, and odd operations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns, ColumnView, without_batch
from unrolled.engines.compiler.lowering.reductions import total

aten, prims = torch.ops.aten, torch.ops.prims


def _broadcast(columns: Columns, row: ColumnView, shape: Sequence[int], dims: Sequence[int]) -> ColumnView:
    between = [1] * len(shape)
    for size, d in zip(without_batch(row.shape), dims, strict=True):
        between[d] = size
    return ColumnView(np.broadcast_to(row.columns.reshape(between), without_batch(shape)), tuple(shape))


def _product(columns: Columns, left: Any, right: Any) -> Any:
    """``mm`` of a value of the batch and a matrix that all rows share, or of two values over the batch."""
    shape = tuple(columns.node.meta["val"].shape)[-2:]
    return _matmul(columns, left, right, shape)


def _matmul(columns: Columns, left: Any, right: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(left, ColumnView) and isinstance(right, ColumnView):
        if left.axis == 1 and right.axis == 0:  # a sum over the batch: the gradient of a matrix
            parts = []
            for a, b in zip(
                left.columns.reshape(left.shape[0], -1).T,
                right.columns.reshape(-1, right.shape[1]),
                strict=True,
            ):
                parts.append(torch.mm(columns.whole(a).t(), columns.whole(b)))
            return sum(parts[1:], parts[0])
    elif isinstance(left, ColumnView) and left.axis == 0:
        lines = left.columns.reshape(-1, left.shape[1])
        made = [columns.times(line, right) for line in lines]
        return ColumnView(
            np.concatenate([m.columns.flatten() for m in made]).reshape(without_batch(shape)), shape
        )
    elif isinstance(right, ColumnView) and right.axis == 1 and right.shape[1] == BATCH_SYMBOL:
        names = right.columns.flatten()
        return ColumnView(columns.times(names, left.t()).columns.reshape(without_batch(shape)), shape)
    raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")


def _added(columns: Columns, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _product(columns, left, right)
    if not isinstance(product, ColumnView):
        return torch.add(bias if beta == 1 else bias * beta, product, alpha=alpha)
    if not isinstance(bias, ColumnView):
        start = bias if beta == 1 else bias * beta
    else:
        start = columns.pointwise(aten.mul.Tensor, bias, float(beta))
    factor = columns.pointwise(aten.mul.Tensor, product, float(alpha))
    return columns.pointwise(aten.add.Tensor, factor, start)


def _heads(columns: Columns, left: Any, right: Any) -> Any:
    """``bmm``: a matrix for each head; or, with the batch in front, products of two values of a row."""
    shape = tuple(columns.node.meta["val"].shape)
    rows = [v for v in (left, right) if isinstance(v, ColumnView)]
    if all(v.axis == 0 for v in rows):
        if not all(isinstance(v, ColumnView) for v in (left, right)):
            raise UnsupportedError(f"{columns.node.target} has a matrix for each row of the batch")
        heads = shape[0] // BATCH_SYMBOL
        (m, k), n = left.shape[1:], right.shape[2]
        wide = columns.pointwise(
            aten.mul.Tensor,
            columns.reshape(left, (BATCH_SYMBOL, heads, m, k, 1)),
            columns.reshape(right, (BATCH_SYMBOL, heads, 1, k, n)),
        )
        return columns.reshape(total(columns, wide, [3]), shape)

    def head(value: Any, k: int) -> Any:
        return ColumnView(value.columns[k], value.shape[1:]) if isinstance(value, ColumnView) else value[k]

    if any(v.axis == 0 for v in rows):
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    made = [_matmul(columns, head(left, k), head(right, k), shape[1:]) for k in range(shape[0])]
    if isinstance(made[0], ColumnView):
        return ColumnView(np.stack([m.columns for m in made]), shape)
    return torch.stack(made)


def _same(columns: Columns, value: Any, *_: Any, **__: Any) -> Any:
    return value


def _copied(columns: Columns, value: Any, source: Any, *_: Any) -> Any:
    shape = tuple(columns.node.meta["val"].shape)
    return ColumnView(np.broadcast_to(columns.names(source), without_batch(shape)), shape)


def _filled_like(columns: Columns, row: ColumnView, *args: Any, **_: Any) -> ColumnView:
    return columns.constant(args[0] if args else 0, columns.node.meta["val"].shape)


def _clamped(columns: Columns, row: Any, low: Any = None, high: Any = None) -> Any:
    for bound, target in ((low, aten.maximum.default), (high, aten.minimum.default)):
        if bound is not None:
            given = bound if isinstance(bound, (ColumnView, Tensor)) else float(bound)
            row = columns.pointwise(target, row, given)
    return row


def _shrunk(columns: Columns, gradient: ColumnView, row: ColumnView, bound: float) -> ColumnView:
    inside = columns.pointwise(aten.le.Tensor, columns.pointwise(aten.abs.default, row), bound)
    return columns.pointwise(aten.where.self, inside, 0.0, gradient)


def _cast(columns: Columns, row: ColumnView, *, dtype: Any = None, **_: Any) -> ColumnView:
    given = columns.node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if dtype is torch.bool and given is not torch.bool:
        return columns.pointwise(aten.ne.Scalar, row, 0)
    if dtype is torch.int64 and given.is_floating_point:
        return columns.pointwise(aten.trunc.default, row)
    return row


def _divided(columns: Columns, left: Any, right: Any, *, rounding_mode: str | None = None) -> ColumnView:
    """Division to whole numbers; rounded down as torch does it, by what is left of it."""
    pointwise = columns.pointwise
    if rounding_mode != "floor":
        found = pointwise(aten.div.Tensor, left, right)
        return found if rounding_mode is None else pointwise(aten.trunc.default, found)
    rest = pointwise(aten.fmod.Tensor, left, right)
    quotient = pointwise(aten.div.Tensor, pointwise(aten.sub.Tensor, left, rest), right)
    apart = pointwise(aten.lt.Tensor, pointwise(aten.mul.Tensor, rest, right), 0.0)
    quotient = pointwise(aten.where.self, apart, pointwise(aten.sub.Tensor, quotient, 1.0), quotient)
    down = pointwise(aten.floor.default, quotient)
    more = pointwise(aten.gt.Tensor, pointwise(aten.sub.Tensor, quotient, down), 0.5)
    infinite = pointwise(aten.div.Tensor, left, right)
    zero = (
        pointwise(aten.eq.Tensor, right, 0.0)
        if isinstance(right, (ColumnView, Tensor))
        else float(right == 0)
    )
    return pointwise(aten.where.self, zero, infinite, pointwise(aten.add.Tensor, down, more))


def _rounded(columns: Columns, row: ColumnView, *, decimals: int) -> ColumnView:
    scale, there, back = float(10 ** abs(decimals)), aten.mul.Tensor, aten.div.Tensor
    if decimals < 0:
        there, back = back, there
    whole = columns.pointwise(aten.round.default, columns.pointwise(there, row, scale))
    return columns.pointwise(back, whole, scale)


RULES: dict[Any, Callable[..., Any]] = {
    prims.div.default: lambda columns, row, other: columns.pointwise(aten.div.Tensor, row, other),
    prims.broadcast_in_dim.default: _broadcast,
    aten.mm.default: _product,
    aten.addmm.default: _added,
    aten.bmm.default: _heads,
    operator.getitem: lambda columns, values, index: values[index],
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.copy.default: _copied,
    aten.full_like.default: _filled_like,
    aten.zeros_like.default: _filled_like,
    aten.empty_like.default: _filled_like,
    aten.new_zeros.default: lambda columns, row, *_, **__: _filled_like(columns, row),
    aten.new_empty.default: lambda columns, row, *_, **__: _filled_like(columns, row),
    aten.new_empty_strided.default: lambda columns, row, *_, **__: _filled_like(columns, row),
    aten.new_full.default: lambda columns, row, size, fill, **_: _filled_like(columns, row, fill),
    aten.new_ones.default: lambda columns, row, *_, **__: _filled_like(columns, row, 1),
    aten.ones_like.default: lambda columns, row, **_: _filled_like(columns, row, 1),
    aten.clamp.default: _clamped,
    aten.clamp.Tensor: _clamped,
    aten.clamp_min.Tensor: lambda columns, row, low: _clamped(columns, row, low),
    aten.clamp_max.Tensor: lambda columns, row, high: _clamped(columns, row, None, high),
    aten.hardtanh.default: lambda columns, row, low=-1.0, high=1.0: _clamped(columns, row, low, high),
    aten.div.Tensor_mode: _divided,
    aten.div.Scalar_mode: _divided,
    aten.round.decimals: _rounded,
    aten.hardshrink_backward.default: _shrunk,
    aten.softshrink_backward.default: _shrunk,
    aten._to_copy.default: _cast,
    prims.convert_element_type.default: lambda columns, row, dtype: _cast(columns, row, dtype=dtype),
}

"""What computes in a step besides functions of an element: reductions, products, and a few odd operations."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.engines.native.columns import Columns, Names, Row, small
from unrolled.engines.native.program import ROWS, UnsupportedError

aten, prims = torch.ops.aten, torch.ops.prims


def _reduce(columns: Columns, row: Row, dims: Sequence[int] | None, pair: Any, whole: Any) -> Row:
    """Reduce features: ``pair`` joins two values, ``whole`` the columns of one."""
    rank = len(row.shape)
    dims = sorted({d % rank for d in (dims if dims else range(rank))})
    kept = [d for d in range(rank) if d not in dims]
    shape = tuple(1 if d in dims else size for d, size in enumerate(row.shape))
    grid = row.columns.transpose(*kept, *dims)
    grid = grid.reshape(math.prod(small([row.shape[d] for d in kept])), -1)
    outer, inner = grid.shape
    if inner <= outer and inner <= 16 and outer > 1:
        parts = [Row(grid[:, k].reshape(small(shape)), shape) for k in range(inner)]
        return functools.reduce(functools.partial(columns.pointwise, pair), parts)
    names = []
    for line in grid:
        total: Row | None = None
        for length, [(name, repeats)] in columns.pieces([line]):
            moving = columns.moving(np.array([name]))
            if repeats or length == 1:
                part = Row(np.array([[name]]), (ROWS, 1))
                if repeats and pair is aten.add.Tensor:
                    part = columns.pointwise(aten.mul.Tensor, part, float(length))
            else:
                value = columns.take(name, length)
                if not isinstance(value, Tensor) or value.dim() == 1:
                    raise UnsupportedError("it reduces what is no value of the batch")
                part = columns.row(whole(value), moving)
            total = part if total is None else columns.pointwise(pair, total, part)
        assert total is not None
        names.append(total.columns.flatten())
    return Row(np.concatenate(names).reshape(small(shape)), shape)


def _sum(columns: Columns, row: Row, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    rank, shape = len(row.shape), columns.node.meta["val"].shape
    dims = [d % rank for d in dims] if dims else list(range(rank))
    features = [d for d in dims if d != row.axis]
    if features:
        row = _reduce(columns, row, features, aten.add.Tensor, lambda v: torch.sum(v, 1, keepdim=True))
    if row.axis not in dims:
        return columns.reshape(row, shape)
    whole = columns.whole(row.columns.flatten())  # the gradient of what all rows share
    return torch.sum(whole, 0).view(shape)


def _extreme(pair: Any, whole: Callable[[Tensor], Tensor]) -> Callable[..., Row]:
    def rule(columns: Columns, row: Row, dims: Any = None, keepdim: bool = False) -> Row:
        rank = len(row.shape)
        chosen = [d % rank for d in dims] if dims else list(range(rank))
        if row.axis in chosen:
            raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
        return columns.reshape(_reduce(columns, row, chosen, pair, whole), columns.node.meta["val"].shape)

    return rule


def _count(row: Row, dims: Any) -> int:
    return math.prod(row.shape[d] for d in dims)


def _variance(columns: Columns, row: Row, dims: Any, correction: float = 1, **_: Any) -> Row:
    rank = len(row.shape)
    dims = [d % rank for d in dims]
    if row.axis in dims:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")

    def total(v: Row) -> Row:
        return _reduce(columns, v, dims, aten.add.Tensor, lambda w: torch.sum(w, 1, keepdim=True))

    count = _count(row, dims)
    mean = columns.pointwise(aten.mul.Tensor, total(row), 1 / count)
    away = columns.pointwise(aten.sub.Tensor, row, mean)
    squares = total(columns.pointwise(aten.mul.Tensor, away, away))
    free = max(count - (1 if correction is None else correction), 0)
    found = columns.pointwise(aten.div.Tensor, squares, float(free))
    return columns.reshape(found, columns.node.meta["val"].shape)


def _broadcast(columns: Columns, row: Row, shape: Sequence[int], dims: Sequence[int]) -> Row:
    between = [1] * len(shape)
    for size, d in zip(small(row.shape), dims, strict=True):
        between[d] = size
    return Row(np.broadcast_to(row.columns.reshape(between), small(shape)), tuple(shape))


def _times(columns: Columns, names: Names, matrix: Tensor) -> Tensor:
    """Columns ``(k)`` of the batch with a matrix ``(k, n)``: what moves in the loop apart from the rest."""
    moving = [source.moving or source.shared for source in map(columns.source, names.tolist())]
    cuts = [0, *(k for k in range(1, len(names)) if moving[k] != moving[k - 1]), len(names)]
    total = None
    for start, end in itertools.pairwise(cuts):
        rows = matrix if end - start == len(names) else matrix[start:end]
        part = torch.mm(columns.whole(names[start:end]), rows)
        total = part if total is None else total + part
    assert total is not None
    return total


def _product(columns: Columns, left: Any, right: Any) -> Any:
    """``mm`` of a value of the batch and a matrix that all rows share, or of two values over the batch."""
    shape = tuple(columns.node.meta["val"].shape)[-2:]
    return _matmul(columns, left, right, shape)


def _matmul(columns: Columns, left: Any, right: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(left, Row) and isinstance(right, Row):
        if left.axis == 1 and right.axis == 0:  # a sum over the batch: the gradient of a matrix
            parts = []
            for a, b in zip(
                left.columns.reshape(left.shape[0], -1).T,
                right.columns.reshape(-1, right.shape[1]),
                strict=True,
            ):
                parts.append(torch.mm(columns.whole(a).t(), columns.whole(b)))
            return sum(parts[1:], parts[0])
    elif isinstance(left, Row) and left.axis == 0:
        lines = left.columns.reshape(-1, left.shape[1])
        made = [columns.row(_times(columns, line, right), columns.moving(line)) for line in lines]
        return Row(np.concatenate([m.columns.flatten() for m in made]).reshape(small(shape)), shape)
    elif isinstance(right, Row) and right.axis == 1 and right.shape[1] == ROWS:
        names = right.columns.flatten()
        value = _times(columns, names, left.t())
        return Row(columns.row(value, columns.moving(names)).columns.reshape(small(shape)), shape)
    raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")


def _added(columns: Columns, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if (beta, alpha) != (1, 1):
        raise UnsupportedError(f"{columns.node.target} with factors is not in the compiler's vocabulary")
    product = _product(columns, left, right)
    return columns.pointwise(aten.add.Tensor, product, bias) if isinstance(product, Row) else product + bias


def _heads(columns: Columns, left: Any, right: Any) -> Any:
    """``bmm``: a matrix for each head; or, with the batch in front, products of two values of a row."""
    shape = tuple(columns.node.meta["val"].shape)
    rows = [v for v in (left, right) if isinstance(v, Row)]
    if all(v.axis == 0 for v in rows) and shape[0] == ROWS:
        if not all(isinstance(v, Row) for v in (left, right)):
            raise UnsupportedError(f"{columns.node.target} has a matrix for each row of the batch")
        b, m, k, n = ROWS, left.shape[1], left.shape[2], right.shape[2]
        wide = columns.pointwise(
            aten.mul.Tensor,
            columns.reshape(left, (b, m, k, 1)),
            columns.reshape(right, (b, 1, k, n)),
        )
        total = _reduce(columns, wide, [2], aten.add.Tensor, lambda v: torch.sum(v, 1, keepdim=True))
        return columns.reshape(total, shape)

    def head(value: Any, k: int) -> Any:
        return Row(value.columns[k], value.shape[1:]) if isinstance(value, Row) else value[k]

    if any(v.axis == 0 for v in rows):
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    made = [_matmul(columns, head(left, k), head(right, k), shape[1:]) for k in range(shape[0])]
    if isinstance(made[0], Row):
        return Row(np.stack([m.columns for m in made]), shape)
    return torch.stack(made)


def _largest(columns: Columns, row: Row, dim: int, keepdim: bool = False) -> tuple[Row, Row]:
    """``max`` with its index: the first column that holds it."""
    rank = len(row.shape)
    dim %= rank
    if dim == row.axis:
        raise UnsupportedError(f"{columns.node.target} mixes rows of the batch")
    top = _reduce(columns, row, [dim], aten.maximum.default, lambda v: torch.amax(v, 1, keepdim=True))
    places = columns.numbers(row.shape, dim)
    found = columns.pointwise(aten.eq.Tensor, row, top)
    numbered = columns.pointwise(aten.where.self, found, places, math.inf)
    index = _reduce(columns, numbered, [dim], aten.minimum.default, lambda v: torch.amin(v, 1, keepdim=True))
    shapes = [v.shape for v in columns.node.meta["val"]]
    return columns.reshape(top, shapes[0]), columns.reshape(index, shapes[1])


def _scatter(columns: Columns, row: Row, dim: int, index: Row, source: Row) -> Row:
    """Values put in place of others, by an index of :func:`_largest`."""
    rank = len(row.shape)
    dim %= rank
    if dim == row.axis or not isinstance(index, Row) or index.shape[dim] != 1:
        raise UnsupportedError(f"{columns.node.target} is not in the compiler's vocabulary")
    places = columns.numbers(row.shape, dim)
    here = columns.pointwise(aten.eq.Tensor, index, places)
    return columns.pointwise(aten.where.self, here, source, row)


def _same(columns: Columns, value: Any, *_: Any, **__: Any) -> Any:
    return value


def _copied(columns: Columns, value: Any, source: Any, *_: Any) -> Any:
    shape = tuple(columns.node.meta["val"].shape)
    return Row(np.broadcast_to(columns.names(source), small(shape)), shape)


def _filled_like(columns: Columns, row: Row, *args: Any, **_: Any) -> Row:
    return columns.constant(args[0] if args else 0, columns.node.meta["val"].shape)


def _clamped(columns: Columns, row: Row, low: Any = None, high: Any = None) -> Row:
    for bound, target in ((low, aten.maximum.default), (high, aten.minimum.default)):
        if bound is not None:
            row = columns.pointwise(target, row, float(bound))
    return row


def _strided(columns: Columns, row: Row, size: Any, stride: Any, offset: Any = 0) -> Row:
    dense = torch.empty(size, device="meta").stride()
    if offset or math.prod(size) != math.prod(row.shape) or tuple(stride) != tuple(dense):
        raise UnsupportedError("aten.as_strided.default is not in the compiler's vocabulary")
    return columns.reshape(row, columns.node.meta["val"].shape)


def _shrunk(columns: Columns, gradient: Row, row: Row, bound: float) -> Row:
    inside = columns.pointwise(aten.le.Tensor, columns.pointwise(aten.abs.default, row), bound)
    return columns.pointwise(aten.where.self, inside, 0.0, gradient)


def _cast(columns: Columns, row: Row, *, dtype: Any = None, **_: Any) -> Row:
    if dtype not in (None, torch.bool, columns.dtype):
        raise UnsupportedError(f"it changes to {dtype} in the step")
    return row


RULES: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    prims.sum.default: _sum,
    aten.amax.default: _extreme(aten.maximum.default, lambda v: torch.amax(v, 1, keepdim=True)),
    aten.amin.default: _extreme(aten.minimum.default, lambda v: torch.amin(v, 1, keepdim=True)),
    prims.div.default: lambda columns, row, other: columns.pointwise(aten.div.Tensor, row, other),
    prims.var.default: _variance,
    prims.broadcast_in_dim.default: _broadcast,
    aten.mm.default: _product,
    aten.addmm.default: _added,
    aten.bmm.default: _heads,
    aten.max.dim: _largest,
    aten.scatter.src: _scatter,
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
    aten.as_strided.default: _strided,
    aten.clamp.default: _clamped,
    aten.hardtanh.default: lambda columns, row, low=-1.0, high=1.0: _clamped(columns, row, low, high),
    aten.hardshrink_backward.default: _shrunk,
    aten.softshrink_backward.default: _shrunk,
    aten._to_copy.default: _cast,
    prims.convert_element_type.default: lambda columns, row, dtype: _cast(columns, row, dtype=dtype),
}

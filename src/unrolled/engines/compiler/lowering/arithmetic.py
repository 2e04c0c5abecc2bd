"""Lowering rules for matrix products, fills and casts, and for arithmetic made of elementwise operations."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.cells.quantized_products import quantized_mm
from unrolled.engines._torch_private import FakeTensor
from unrolled.engines.compiler.ir import BATCH_SYMBOL, MIXES_ROWS, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns, ColumnView, without_batch
from unrolled.engines.compiler.lowering.dtypes import INTEGER_DTYPES
from unrolled.engines.compiler.lowering.reductions import sum_dims

aten, prims = torch.ops.aten, torch.ops.prims

_MAX_INTEGER_POWER = 16
_ROOTS = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default}


def _mm(columns: Columns, left: Any, right: Any) -> Any:
    """Lower ``mm`` of a batched value and a matrix that all rows share, or of two batched values."""
    shape = tuple(columns.node.meta["val"].shape)[-2:]
    return _matmul(columns, left, right, shape)


def _matmul(columns: Columns, left: Any, right: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(left, ColumnView) and isinstance(right, ColumnView):
        if left.batch_axis == 1 and right.batch_axis == 0:  # a sum over the batch: the gradient of a matrix
            columns.check_sum_over_batch()
            if 0 in shape:
                return torch.zeros(shape, dtype=columns.dtype)
            parts = []
            for a, b in zip(
                left.ids.reshape(without_batch(left.shape)).T,
                right.ids.reshape(without_batch(right.shape)),
                strict=True,
            ):
                parts.append(torch.mm(columns.to_tensor(a).t(), columns.to_tensor(b)))
            return sum(parts[1:], parts[0])
    elif isinstance(left, ColumnView) and left.batch_axis == 0:
        rows = left.ids.reshape(without_batch(left.shape))
        products = [columns.matmul(ids, right) for ids in rows]
        return ColumnView(
            np.concatenate([p.ids.flatten() for p in products]).reshape(without_batch(shape)), shape
        )
    elif isinstance(right, ColumnView) and right.batch_axis == 1 and right.shape[1] == BATCH_SYMBOL:
        product = columns.matmul(right.ids.flatten(), left.t())
        return ColumnView(product.ids.reshape(without_batch(shape)), shape)
    raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")


def _quantized_mm(columns: Columns, left: Any, right: Any, weights: str, scale: float) -> ColumnView:
    """Lower a product with quantized weights. It is never split, because a row has one scale."""
    if columns.dtype is not torch.float32:
        raise UnsupportedError(f"it has {weights} weights, which need all values of the step to be float32")
    if not (isinstance(left, ColumnView) and left.batch_axis == 0 and isinstance(right, Tensor)):
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    shape = tuple(columns.node.meta["val"].shape)
    products = []
    for ids in left.ids.reshape(-1, left.shape[1]):
        product = quantized_mm(columns.to_tensor(ids), right, weights, scale)
        products.append(columns.add(product, columns.is_recurrent(ids)).ids.flatten())
    return ColumnView(np.concatenate(products).reshape(without_batch(shape)), shape)


def _addmm(columns: Columns, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _mm(columns, left, right)
    if not isinstance(product, ColumnView):
        return torch.add(bias if beta == 1 else bias * beta, product, alpha=alpha)
    if not isinstance(bias, ColumnView):
        scaled_bias = bias if beta == 1 else bias * beta
    else:
        scaled_bias = columns.pointwise(aten.mul.Tensor, bias, float(beta))
    scaled_product = columns.pointwise(aten.mul.Tensor, product, float(alpha))
    return columns.pointwise(aten.add.Tensor, scaled_product, scaled_bias)


def _bmm(columns: Columns, left: Any, right: Any) -> Any:
    """Lower ``bmm`` with one matrix per head, or of two values whose first dimension is the batch."""
    shape = tuple(columns.node.meta["val"].shape)
    views = [v for v in (left, right) if isinstance(v, ColumnView)]
    if all(v.batch_axis == 0 for v in views):
        if not all(isinstance(v, ColumnView) for v in (left, right)):
            raise UnsupportedError(f"{columns.node.target} has a matrix for each row of the batch")
        heads = shape[0] // BATCH_SYMBOL
        (m, k), n = left.shape[1:], right.shape[2]
        products = columns.pointwise(
            aten.mul.Tensor,
            columns.reshape(left, (BATCH_SYMBOL, heads, m, k, 1)),
            columns.reshape(right, (BATCH_SYMBOL, heads, 1, k, n)),
        )
        return columns.reshape(sum_dims(columns, products, [3]), shape)

    def head(value: Any, k: int) -> Any:
        return ColumnView(value.ids[k], value.shape[1:]) if isinstance(value, ColumnView) else value[k]

    if any(v.batch_axis == 0 for v in views):
        raise UnsupportedError(f"{columns.node.target} {MIXES_ROWS}")
    results = [_matmul(columns, head(left, k), head(right, k), shape[1:]) for k in range(shape[0])]
    if isinstance(results[0], ColumnView):
        return ColumnView(np.stack([result.ids for result in results]), shape)
    return torch.stack(results)


def _identity(columns: Columns, value: Any, *_: Any, **__: Any) -> Any:
    return value


def _copy(columns: Columns, value: Any, source: Any, *_: Any) -> Any:
    result, old = columns.node.meta["val"], columns.node.args[1]
    ids = np.broadcast_to(columns.ids_of(source), without_batch(result.shape))
    view = ColumnView(ids, tuple(result.shape))
    return _convert(columns, view, old.meta["val"].dtype, result.dtype)  # type: ignore[union-attr]


def _full_like(columns: Columns, x: ColumnView, *args: Any, **_: Any) -> ColumnView:
    result = columns.node.meta["val"]
    return columns.constant(args[0] if args else 0, result.shape, result.dtype)


def _clamp(columns: Columns, x: Any, low: Any = None, high: Any = None) -> Any:
    for bound, target in ((low, aten.maximum.default), (high, aten.minimum.default)):
        if bound is not None:
            operand = bound if isinstance(bound, (ColumnView, Tensor)) else float(bound)
            x = columns.pointwise(target, x, operand)
    return x


def _shrink_backward(columns: Columns, gradient: ColumnView, x: ColumnView, bound: float) -> ColumnView:
    inside = columns.pointwise(aten.le.Tensor, columns.pointwise(aten.abs.default, x), bound)
    return columns.pointwise(aten.where.self, inside, 0.0, gradient)


def _cast(columns: Columns, x: ColumnView, *, dtype: Any = None, **_: Any) -> ColumnView:
    return _convert(columns, x, columns.node.args[0].meta["val"].dtype, dtype)  # type: ignore[union-attr]


def _convert(columns: Columns, x: ColumnView, source_dtype: torch.dtype, dtype: Any) -> ColumnView:
    """Return the values that a cast gives. What computes with them converts them to the loop's dtype."""
    if dtype is torch.bool and source_dtype is not torch.bool:
        return columns.pointwise(aten.ne.Scalar, x, 0)
    if dtype in INTEGER_DTYPES and source_dtype.is_floating_point:
        return columns.pointwise(aten.trunc.default, x)
    return x


def _power(columns: Columns, x: ColumnView, exponent: float) -> ColumnView:
    """Lower ``pow``; a whole number is multiplied with itself, because C++'s ``pow`` may round."""
    if columns.node.meta["val"].dtype not in INTEGER_DTYPES:
        if exponent in _ROOTS:  # unlike pow, these are NaN for -inf, as in torch
            return columns.pointwise(_ROOTS[exponent], x)
        return columns.pointwise(aten.pow.Tensor_Scalar, x, exponent)
    if not 0 <= exponent <= _MAX_INTEGER_POWER:
        raise UnsupportedError(
            f"{columns.node.target} of integers needs an exponent from 0 to {_MAX_INTEGER_POWER}"
        )
    if exponent == 0:
        return columns.constant(1, x.shape)
    return functools.reduce(functools.partial(columns.pointwise, aten.mul.Tensor), [x] * int(exponent))


def _bitwise_and_number(columns: Columns, x: ColumnView, number: int) -> ColumnView:
    if columns.node.meta["val"].dtype is torch.bool:
        return columns.pointwise(aten.bitwise_and.Tensor, x, float(number))
    if number < 0 or number & (number + 1):
        raise UnsupportedError(f"{columns.node.target} needs a mask of the lowest bits, such as 7")
    return columns.pointwise(aten.remainder.Scalar, x, number + 1)


def _with_truth_value(op: Any) -> Callable[..., ColumnView]:
    """Return the lowering of an operation on booleans and a Python bool; whole numbers aren't supported."""
    return lambda columns, x, value: columns.pointwise(op, x, float(value))


def _shift_left(columns: Columns, x: ColumnView, bits: int) -> ColumnView:
    _check_shift(columns, bits)
    return columns.pointwise(aten.mul.Tensor, x, float(2**bits))


def _shift_right(columns: Columns, x: ColumnView, bits: int) -> ColumnView:
    _check_shift(columns, bits)
    return columns.pointwise(aten.floor.default, columns.pointwise(aten.mul.Tensor, x, 0.5**bits))


def _check_shift(columns: Columns, bits: int) -> None:
    if bits < 0:
        raise UnsupportedError(f"{columns.node.target} shifts by a negative number of bits, {bits}")


def _check_divisor(columns: Columns, divisor: Any) -> None:
    """Check that integers are divided only by nonzero constants, because torch raises an error for 0."""
    is_integer = columns.node.meta["val"].dtype in INTEGER_DTYPES
    if is_integer and (isinstance(divisor, (ColumnView, FakeTensor)) or not np.all(np.asarray(divisor))):
        raise UnsupportedError(f"{columns.node.target} of integers needs a constant divisor other than 0")


def _checked_division(op: Any) -> Callable[..., ColumnView]:
    """Return the lowering of an elementwise operation that divides by its second operand."""

    def rule(columns: Columns, left: Any, right: Any) -> ColumnView:
        _check_divisor(columns, right)
        return columns.pointwise(op, left, right)

    return rule


def _compare(columns: Columns, name: str, value: Any, number: float) -> Any:
    """Compare a value of the batch, a value made of parameters, or a number with a number."""
    op = getattr(aten, name).Scalar
    if isinstance(value, ColumnView):
        return columns.pointwise(op, value, number)
    return (
        columns.apply(op, value, number)
        if isinstance(value, Tensor)
        else float(getattr(operator, name)(value, number))
    )


def _div_mode(columns: Columns, left: Any, right: Any, *, rounding_mode: str | None = None) -> ColumnView:
    """Lower ``div`` with a rounding mode; floor uses the remainder, as torch does."""
    _check_divisor(columns, right)
    pointwise = columns.pointwise
    if rounding_mode != "floor":
        quotient = pointwise(aten.div.Tensor, left, right)
        return quotient if rounding_mode is None else pointwise(aten.trunc.default, quotient)
    remainder = pointwise(aten.fmod.Tensor, left, right)
    quotient = pointwise(aten.div.Tensor, pointwise(aten.sub.Tensor, left, remainder), right)
    signs_differ = pointwise(
        aten.logical_and.default,
        pointwise(aten.ne.Scalar, remainder, 0.0),
        pointwise(
            aten.logical_xor.default,
            pointwise(aten.lt.Scalar, remainder, 0.0),
            _compare(columns, "lt", right, 0.0),
        ),
    )
    quotient = pointwise(aten.where.self, signs_differ, pointwise(aten.sub.Tensor, quotient, 1.0), quotient)
    floored = pointwise(aten.floor.default, quotient)
    correction = pointwise(aten.gt.Tensor, pointwise(aten.sub.Tensor, quotient, floored), 0.5)
    unrounded = pointwise(aten.div.Tensor, left, right)
    corrected = pointwise(aten.add.Tensor, floored, correction)
    is_zero = pointwise(aten.eq.Scalar, quotient, 0.0)
    corrected = pointwise(
        aten.where.self, is_zero, pointwise(aten.copysign.Tensor, 0.0, unrounded), corrected
    )
    return pointwise(aten.where.self, _compare(columns, "eq", right, 0.0), unrounded, corrected)


def _round_decimals(columns: Columns, x: ColumnView, *, decimals: int) -> ColumnView:
    scale, scale_up, scale_down = float(10 ** abs(decimals)), aten.mul.Tensor, aten.div.Tensor
    if decimals < 0:
        scale_up, scale_down = scale_down, scale_up
    rounded = columns.pointwise(aten.round.default, columns.pointwise(scale_up, x, scale))
    return columns.pointwise(scale_down, rounded, scale)


ARITHMETIC_RULES: dict[Any, Callable[..., Any]] = {
    prims.div.default: lambda columns, x, other: columns.pointwise(aten.div.Tensor, x, other),
    aten.mm.default: _mm,
    torch.ops.unrolled.quantized_mm.default: _quantized_mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    operator.getitem: lambda columns, values, index: values[index],
    aten.clone.default: _identity,
    aten.alias.default: _identity,
    aten.detach.default: _identity,
    aten.lift_fresh_copy.default: _identity,
    aten.copy.default: _copy,
    aten.full_like.default: _full_like,
    aten.zeros_like.default: _full_like,
    aten.empty_like.default: _full_like,
    aten.new_zeros.default: lambda columns, x, *_, **__: _full_like(columns, x),
    aten.new_empty.default: lambda columns, x, *_, **__: _full_like(columns, x),
    aten.new_empty_strided.default: lambda columns, x, *_, **__: _full_like(columns, x),
    aten.new_full.default: lambda columns, x, size, fill, **_: _full_like(columns, x, fill),
    aten.new_ones.default: lambda columns, x, *_, **__: _full_like(columns, x, 1),
    aten.ones_like.default: lambda columns, x, **_: _full_like(columns, x, 1),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.pow.Tensor_Scalar: _power,
    aten.remainder.Scalar: _checked_division(aten.remainder.Scalar),
    aten.remainder.Tensor: _checked_division(aten.remainder.Tensor),
    aten.fmod.Scalar: _checked_division(aten.fmod.Scalar),
    aten.fmod.Tensor: _checked_division(aten.fmod.Tensor),
    aten.bitwise_and.Scalar: _bitwise_and_number,
    aten.bitwise_or.Scalar: _with_truth_value(aten.bitwise_or.Tensor),
    aten.bitwise_xor.Scalar: _with_truth_value(aten.bitwise_xor.Tensor),
    aten.__lshift__.Scalar: _shift_left,
    aten.__rshift__.Scalar: _shift_right,
    aten.clamp_min.Tensor: lambda columns, x, low: _clamp(columns, x, low),
    aten.clamp_max.Tensor: lambda columns, x, high: _clamp(columns, x, None, high),
    aten.hardtanh.default: lambda columns, x, low=-1.0, high=1.0: _clamp(columns, x, low, high),
    aten.copysign.Scalar: lambda columns, x, sign: columns.pointwise(aten.copysign.Tensor, x, float(sign)),
    aten.div.Tensor_mode: _div_mode,
    aten.div.Scalar_mode: _div_mode,
    aten.round.decimals: _round_decimals,
    aten.hardshrink_backward.default: _shrink_backward,
    aten.softshrink_backward.default: _shrink_backward,
    aten._to_copy.default: _cast,
    prims.convert_element_type.default: lambda columns, x, dtype: _cast(columns, x, dtype=dtype),
}

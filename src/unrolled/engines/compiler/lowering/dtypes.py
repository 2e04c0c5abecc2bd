"""Values whose dtype is not that of the loop.

A loop stores all values in one floating-point dtype. In a float64 loop, a float32 value is rounded after each
operation that computes it, so that it equals torch's. Whole numbers are exact as long as the dtype of the
loop can represent them. A float32 step with float64 values or larger whole numbers needs a float64 loop.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines._torch_private import disable_current_modes
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns, ColumnView
from unrolled.engines.compiler.lowering.movement import MOVEMENT_OPS

aten, prims = torch.ops.aten, torch.ops.prims

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}  # all integers up to there are exact
_UNKNOWN_INTEGER = 2**24  # assumed bound of a number that is cast to an integer

_library: Any = torch.library.Library("unrolled", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("round_to_float32(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
for _device_type in ("CPU", "CUDA"):
    _library.impl("round_to_float32", lambda x: x.float().to(x.dtype), _device_type)
torch.library.register_fake("unrolled::round_to_float32", torch.empty_like, lib=_library)
round_to_float32 = torch.ops.unrolled.round_to_float32.default


class NeedsFloat64Error(Exception):
    """A float32 loop can't represent a value of the step."""


def is_float32(node: fx.Node) -> bool:
    """Return whether an operation computes in float32: its result is, or for a comparison its operands."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    if value.dtype is torch.bool:
        operands = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if len(operands) == 2:
            return torch.result_type(*operands) is torch.float32
        return any(operand.dtype is torch.float32 for operand in operands)
    return value.dtype is torch.float32


class IntegerBounds:
    """Upper bounds of the absolute values of whole numbers.

    Args:
        dtype: Dtype of the loop.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._exact = _EXACT[dtype]
        self._is_float32 = dtype is torch.float32
        self._bounds: dict[fx.Node, int] = {}

    def of(self, value: Any) -> int:
        """Return the bound of an operand: a node, a number, or a list of them."""
        if isinstance(value, (list, tuple)):
            return max(map(self.of, value), default=0)
        if not isinstance(value, fx.Node):
            return math.ceil(abs(value)) if isinstance(value, (int, float)) else 0
        result = value.meta.get("val")
        if isinstance(result, Tensor) and result.dtype is torch.bool:
            return 1
        return self._bounds.get(value, _UNKNOWN_INTEGER)

    def add(self, node: fx.Node, result: Any) -> None:
        """Determine the bound of a node.

        Args:
            node: The node. Its result is an integer.
            result: Its result, if it doesn't depend on the batch.

        Raises:
            NeedsFloat64Error: If a float32 loop can't represent the result.
            UnsupportedError: If a float64 loop can't represent it either.
        """
        if isinstance(result, Tensor):
            if type(result) is Tensor and result.numel():
                with disable_current_modes():
                    self._bounds[node] = int(result.abs().max())
            return
        bound = self._bound_of_result(node)
        if bound > self._exact:
            if self._is_float32:
                raise NeedsFloat64Error
            raise UnsupportedError(
                f"{node.target} computes integers that may exceed 2^53; limit its operands with clamp"
            )
        self._bounds[node] = bound

    def limit(self, node: fx.Node, bound: int) -> None:
        """Lower the bound of a node."""
        self._bounds[node] = min(self._bounds[node], bound)

    def _bound_of_result(self, node: fx.Node) -> int:
        target, args = node.target, node.args
        if target in _BOUNDS:
            return _BOUNDS[target](self.of, node)
        if target is operator.getitem:  # values or indices
            [source] = node.all_input_nodes
            return max(self._bound_of_result(source), *map(_row_size, source.all_input_nodes))
        if target in MOVEMENT_OPS and target is not aten.constant_pad_nd.default:  # its numbers are positions
            return self.of(node.all_input_nodes)
        value = node.meta["val"]
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if any(n.meta["val"].dtype.is_floating_point for n in operands):
            is_cast = target in (aten._to_copy.default, prims.convert_element_type.default)
            if is_cast:
                return _UNKNOWN_INTEGER
            sizes = [n.meta["val"].shape for n in operands]  # indices, as of argmax
            return max((size for shape in sizes for size in shape if size % BATCH_SYMBOL), default=1)
        if isinstance(value, Tensor) and not operands:
            return self.of(list(args))
        return self.of([*args, *node.kwargs.values()])


def _reduced_count(node: fx.Node) -> int:
    """Return how many numbers of a row an operation may combine to one result."""
    [operand] = node.all_input_nodes
    return _row_size(operand)


def _row_size(node: fx.Node) -> int:
    """Return the number of elements of a value in each row."""
    return math.prod(size for size in node.meta["val"].shape if size % BATCH_SYMBOL)


def _raised(bound: int, exponent: int) -> int:
    """Return a bound to the power of an exponent, at most 2^200."""
    bound = max(bound, 1)
    return 2**200 if exponent * math.log2(bound) > 200 else bound**exponent


def _prod(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    return _raised(bound_of(node.args[0]), _reduced_count(node))


def _power(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    return _raised(bound_of(node.args[0]), bound_of(node.args[1]))


def _additive(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    return bound_of(node.args[0]) + bound_of(node.args[1]) * bound_of(node.kwargs.get("alpha", 1))


def _product(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    return bound_of(node.args[0]) * bound_of(node.args[1])


def _clamp(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    bounds = [value for value in (*node.args[1:], *node.kwargs.values()) if value is not None]
    return bound_of(bounds) if len(bounds) == 2 else bound_of([node.args[0], *bounds])


def _sum(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    return bound_of(node.args[0]) * _reduced_count(node)


def _matmul(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    left, right = node.args
    return bound_of(left) * bound_of(right) * int(left.meta["val"].shape[-1])  # type: ignore[union-attr]


def _addmm(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    beta, alpha = (bound_of(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    bias, left, right = node.args
    depth = int(left.meta["val"].shape[-1])  # type: ignore[union-attr]
    return bound_of(bias) * beta + bound_of(left) * bound_of(right) * depth * alpha


def _scatter_add(bound_of: Callable[[Any], int], node: fx.Node) -> int:
    count = _row_size(node.args[2])  # type: ignore[arg-type]
    return bound_of(node.args[0]) + count * bound_of(node.args[3])


_Bound = Callable[[Callable[[Any], int], fx.Node], int]
_BOUNDS: Mapping[Any, _Bound] = {
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar), _additive),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default, prims.sum.default, aten.cumsum.default), _sum),
    **dict.fromkeys((aten.clamp.default, aten.clamp.Tensor), _clamp),
    aten.pow.Tensor_Scalar: _power,
    **dict.fromkeys((aten.prod.dim_int, aten.cumprod.default), _prod),
    **dict.fromkeys((aten.mm.default, aten.bmm.default), _matmul),
    aten.addmm.default: _addmm,
    **dict.fromkeys((aten.argmax.default, aten.argmin.default), lambda bound_of, node: _reduced_count(node)),
    aten.scatter_add.default: _scatter_add,
    **dict.fromkeys(
        (aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor),
        lambda bound_of, node: bound_of(node.args[1]),
    ),
    **dict.fromkeys(
        (aten.div.Tensor_mode, aten.div.Scalar_mode, aten.__rshift__.Scalar),
        lambda bound_of, node: bound_of(node.args[0]) + 1,
    ),
    aten.__lshift__.Scalar: lambda bound_of, node: bound_of(node.args[0]) << bound_of(node.args[1]),
    aten.bitwise_and.Scalar: lambda bound_of, node: bound_of(node.args[1]),
    aten.sgn.default: lambda bound_of, node: 1,
    aten.sign.default: lambda bound_of, node: 1,
}


INTEGER_OPS = {
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar,
    aten.neg.default, aten.abs.default, aten.sgn.default, aten.sign.default, aten.where.self,
    aten.clone.default, aten.maximum.default, aten.minimum.default, aten.clamp.default, aten.clamp.Tensor,
    aten.clamp_min.default, aten.clamp_max.default, aten.remainder.Scalar, aten.remainder.Tensor,
    aten.fmod.Scalar, aten.fmod.Tensor,
    aten.div.Tensor_mode, aten.div.Scalar_mode, aten.pow.Tensor_Scalar, aten.bitwise_and.Scalar,
    aten.__lshift__.Scalar, aten.__rshift__.Scalar, aten._to_copy.default,
}  # fmt: skip


# Of an operand outside of the dtype's range, they use the last bits, as of a result.
WRAPPING_OPS = {
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar,
}  # fmt: skip


def check_numbers(node: fx.Node) -> None:
    """Check that the Python numbers in an integer operation are in the range of their dtype.

    Raises:
        UnsupportedError: If one isn't. torch would wrap it around, or raise an error.
    """
    dtypes = {v.dtype for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), Tensor)}
    for dtype in dtypes.intersection(INTEGER_DTYPES):
        info = torch.iinfo(dtype)
        for number in (*node.args, *node.kwargs.values()):
            if type(number) is int and not info.min <= number <= info.max:
                raise UnsupportedError(f"{node.target} uses {number}, which is outside the range of {dtype}")


def _may_be_negative(node: fx.Node) -> bool:
    """Return whether an operation on unsigned numbers or booleans may compute a negative number."""
    operand = node.args[0]
    is_bool = isinstance(operand, fx.Node) and operand.meta["val"].dtype is torch.bool
    return node.target in INTEGER_OPS and not (is_bool and node.target is aten._to_copy.default)


def wrap_integers(columns: Columns, x: ColumnView, dtype: torch.dtype, bounds: IntegerBounds) -> ColumnView:
    """Return whole numbers modulo the range of a dtype, as torch does on overflow.

    Args:
        columns: Table of all columns. Its node has the numbers as its result.
        x: The numbers.
        dtype: An integer dtype.
        bounds: Bounds of the numbers; that of the result is updated.
    """
    bound, info = bounds.of(columns.node), torch.iinfo(dtype)
    if dtype is torch.int64 or (bound <= info.max and (info.min < 0 or not _may_be_negative(columns.node))):
        return x
    size = float(info.max) - info.min + 1
    shifted = columns.pointwise(aten.sub.Tensor, x, float(info.min))
    overflows = columns.pointwise(aten.floor.default, columns.pointwise(aten.mul.Tensor, shifted, 1 / size))
    bounds.limit(columns.node, -info.min if info.min else info.max)
    return columns.pointwise(aten.sub.Tensor, x, columns.pointwise(aten.mul.Tensor, overflows, size))

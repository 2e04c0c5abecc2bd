"""The operations that GPU kernels support, each with its Triton expression on tiles.

Booleans are 1 or 0 in the dtype of the loop, written as ``DT``. The functions that expressions call are in
``device_functions.triton``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from unrolled.engines.compiler.generated_code import check_supported
from unrolled.engines.compiler.kernel_ir import Apply
from unrolled.engines.compiler.lowering.dtypes import round_to_float32

aten = torch.ops.aten


@dataclass(frozen=True)
class TritonOp:
    """An operation.

    Attributes:
        template: Its expression, with a replacement field for each operand.
        functions: Functions of ``device_functions.triton`` that the expression calls.
    """

    template: str
    functions: tuple[str, ...] = ()


def _call(name: str, operands: int = 1) -> TritonOp:
    """Return the call of a function of ``device_functions.triton``."""
    fields = ", ".join(f"{{{k}}}" for k in range(operands))
    return TritonOp(f"{name}({fields})", (name,))


_IS_FALSE = TritonOp("({0} == 0.0).to(DT)")
_AND, _XOR = TritonOp("({0} * {1})"), TritonOp("({0} != {1}).to(DT)")
_OR = TritonOp("tl.maximum({0}, {1})")
_SIGN = _call("sign")
_POWER, _REMAINDER, _FMOD = _call("power", 2), _call("remainder", 2), _call("fmod", 2)

TRITON_OPS: dict[object, TritonOp] = {
    aten.rsqrt.default: TritonOp("(1.0 / tl.sqrt({0}))"),
    aten.reciprocal.default: TritonOp("(1.0 / {0})"),
    aten.neg.default: TritonOp("(-{0})"),
    aten.abs.default: TritonOp("tl.abs({0})"),
    aten.sgn.default: _SIGN,
    aten.sign.default: _SIGN,
    round_to_float32: TritonOp("{0}.to(tl.float32).to(DT)"),
    aten.mul.Tensor: TritonOp("({0} * {1})"),
    aten.mul.Scalar: TritonOp("({0} * {1})"),
    aten.div.Tensor: TritonOp("({0} / {1})"),
    aten.div.Scalar: TritonOp("({0} / {1})"),
    aten.pow.Tensor_Scalar: _POWER,
    aten.pow.Tensor_Tensor: _POWER,
    aten.pow.Scalar: _POWER,
    aten.remainder.Scalar: _REMAINDER,
    aten.remainder.Tensor: _REMAINDER,
    aten.fmod.Scalar: _FMOD,
    aten.fmod.Tensor: _FMOD,
    aten.fmax.default: _call("fmax", 2),
    aten.fmin.default: _call("fmin", 2),
    aten.signbit.default: TritonOp("is_negative({0}).to(DT)", ("is_negative",)),
    aten.where.self: TritonOp("tl.where({0} != 0.0, {1}, {2})"),
    aten.isnan.default: TritonOp("({0} != {0}).to(DT)"),
    aten.isinf.default: TritonOp('(tl.abs({0}) == float("inf")).to(DT)'),
    aten.logical_not.default: _IS_FALSE,
    aten.bitwise_not.default: _IS_FALSE,
    aten.logical_and.default: _AND,
    aten.bitwise_and.Tensor: _AND,
    aten.logical_or.default: _OR,
    aten.bitwise_or.Tensor: _OR,
    aten.logical_xor.default: _XOR,
    aten.bitwise_xor.Tensor: _XOR,
    aten.copysign.Tensor: _call("copysign", 2),
}
for _name in ("exp", "exp2", "log", "log2", "sqrt", "sin", "cos", "erf", "floor", "ceil"):
    TRITON_OPS[getattr(aten, _name).default] = TritonOp(f"tl.{_name}({{0}})")
for _name in (
    "sigmoid", "tanh", "relu", "expm1", "log1p", "log10", "erfc", "tan", "asin", "acos", "atan", "sinh",
    "cosh", "asinh", "acosh", "atanh", "round", "trunc",
):  # fmt: skip
    TRITON_OPS[getattr(aten, _name).default] = _call({"round": "round_half_even"}.get(_name, _name))
for _name in ("maximum", "minimum", "atan2", "hypot"):
    TRITON_OPS[getattr(aten, _name).default] = _call(_name, 2)
for _name, _sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items():
    for _kind in ("Scalar", "Tensor"):
        TRITON_OPS[getattr(getattr(aten, _name), _kind)] = TritonOp(f"({{0}} {_sign} {{1}}).to(DT)")

ADDITIVE_OPS = {aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.add.Scalar: "+", aten.sub.Scalar: "-"}
_COPIES = (aten.expand.default, aten.clone.default, aten._to_copy.default)  # the IR has none of them


@dataclass(frozen=True)
class Reduction:
    """A reduction of the columns of a row.

    Attributes:
        whole: Reduces a tile to one column.
        join: Combines two columns.
        neutral: What the columns beyond the width are filled with.
    """

    whole: TritonOp
    join: TritonOp
    neutral: float


_PRODUCT_OF_ROW = TritonOp("tl.reduce({0}, 1, multiply, keep_dims=True)", ("multiply",))
REDUCTIONS: dict[object, Reduction] = {
    aten.sum.dim_IntList: Reduction(TritonOp("tl.sum({0}, 1, keep_dims=True)"), TritonOp("({0} + {1})"), 0.0),
    aten.prod.dim_int: Reduction(_PRODUCT_OF_ROW, TritonOp("({0} * {1})"), 1.0),
    aten.amax.default: Reduction(_call("row_maximum"), _call("maximum", 2), -math.inf),
    aten.amin.default: Reduction(_call("row_minimum"), _call("minimum", 2), math.inf),
}


_SUPPORTED = {*TRITON_OPS, *ADDITIVE_OPS, *_COPIES}


def check(node: fx.Node) -> None:
    """Check that GPU kernels support a node of the loop.

    Raises:
        UnsupportedError: If they don't. The message names the operation and its line in the step.
    """
    check_supported(node, _SUPPORTED, REDUCTIONS, "on a GPU", "gpu/triton_ops.py has no Triton")


def operation(instruction: Apply) -> TritonOp:
    """Return the Triton of an operation. Common powers become products."""
    if instruction.target in ADDITIVE_OPS:
        right = "{1}" if instruction.alpha == 1 else f"({{1}} * {literal(instruction.alpha)})"
        return TritonOp(f"({{0}} {ADDITIVE_OPS[instruction.target]} {right})")
    if instruction.target is aten.pow.Tensor_Scalar:
        return _POWERS.get(instruction.operands[1], _POWER)  # type: ignore[arg-type]
    return TRITON_OPS[instruction.target]


_POWERS = {
    0.5: TritonOp("tl.sqrt({0})"),
    -0.5: TritonOp("(1.0 / tl.sqrt({0}))"),
    -1.0: TritonOp("(1.0 / {0})"),
    1.0: TritonOp("{0}"),
    2.0: TritonOp("({0} * {0})"),
    3.0: TritonOp("({0} * {0} * {0})"),
}


def literal(number: float) -> str:
    """Return a number as a Python expression."""
    if math.isfinite(number):
        return repr(float(number))
    return 'float("nan")' if math.isnan(number) else f'float("{number}")'

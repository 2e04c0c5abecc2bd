"""The operations that the compiler supports, each with its C++ expression on vectors.

Booleans are 1 or 0 in the dtype of the loop.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from unrolled.engines.compiler.generated_code import check_supported
from unrolled.engines.compiler.ir import is_quantized
from unrolled.engines.compiler.kernel_ir import Apply
from unrolled.engines.compiler.lowering.dtypes import round_to_float32

aten = torch.ops.aten

CPP_OPS: dict[object, str] = {
    aten.rsqrt.default: "(splat(1) / sqrt({0}))",
    aten.reciprocal.default: "(splat(1) / {0})",
    aten.neg.default: "(-{0})",
    aten.abs.default: "absolute({0})",
    aten.sgn.default: "sign({0})",
    aten.clone.default: "{0}",
    aten._to_copy.default: "{0}",  # of a bool, to the dtype of the loop
    round_to_float32: "round_to_float({0})",
    aten.expand.default: "{0}",
    aten.mul.Tensor: "({0} * {1})",
    aten.mul.Scalar: "({0} * {1})",
    aten.div.Tensor: "({0} / {1})",
    aten.div.Scalar: "({0} / {1})",
    aten.pow.Tensor_Scalar: "pow({0}, {1})",
    aten.pow.Tensor_Tensor: "pow({0}, {1})",
    aten.pow.Scalar: "pow({0}, {1})",
    aten.remainder.Scalar: "remainder({0}, {1})",
    aten.remainder.Tensor: "remainder({0}, {1})",
    aten.fmod.Scalar: "fmod({0}, {1})",
    aten.fmod.Tensor: "fmod({0}, {1})",
    aten.fmax.default: "where(truth({0} != {0}), {1}, where(truth({1} != {1}), {0}, maximum({0}, {1})))",
    aten.fmin.default: "where(truth({0} != {0}), {1}, where(truth({1} != {1}), {0}, minimum({0}, {1})))",
    aten.copysign.Tensor: "sign_of(absolute({0}), {1})",
    aten.signbit.default: "truth(sign_of(splat(1), {0}) < V{{}})",
    aten.where.self: "where({0}, {1}, {2})",
    aten.isnan.default: "truth({0} != {0})",
    aten.isinf.default: "truth(absolute({0}) == splat(INFINITY))",
    aten.logical_not.default: "truth({0} == V{{}})",
    aten.bitwise_not.default: "truth({0} == V{{}})",
    aten.logical_and.default: "({0} * {1})",
    aten.bitwise_and.Tensor: "({0} * {1})",
    aten.logical_or.default: "maximum({0}, {1})",
    aten.bitwise_or.Tensor: "maximum({0}, {1})",
    aten.logical_xor.default: "truth({0} != {1})",
    aten.bitwise_xor.Tensor: "truth({0} != {1})",
}
for _name in (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sigmoid", "tanh", "relu", "erf", "erfc",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh",
    "sign", "floor", "ceil", "round", "trunc",
):  # fmt: skip
    CPP_OPS[getattr(aten, _name).default] = f"{_name}({{0}})"
for _name in ("maximum", "minimum", "atan2", "hypot"):
    CPP_OPS[getattr(aten, _name).default] = f"{_name}({{0}}, {{1}})"
for _name, _sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items():
    for _kind in ("Scalar", "Tensor"):
        CPP_OPS[getattr(getattr(aten, _name), _kind)] = f"truth({{0}} {_sign} {{1}})"

ADDITIVE_OPS = {aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.add.Scalar: "+", aten.sub.Scalar: "-"}

# Reductions of a row, and their classes in include/scalars.h.
CPP_REDUCTIONS: dict[object, str] = {
    aten.sum.dim_IntList: "Sum",
    aten.prod.dim_int: "Product",
    aten.amax.default: "Maximum",
    aten.amin.default: "Minimum",
}


def apply_template(instruction: Apply) -> str:
    """Return the C++ of an operation, with a replacement field for each operand."""
    if instruction.target not in ADDITIVE_OPS:
        return CPP_OPS[instruction.target]
    right = "{1}" if instruction.alpha == 1 else f"({{1}} * splat({literal(instruction.alpha)}))"
    return f"({{0}} {ADDITIVE_OPS[instruction.target]} {right})"


_SUPPORTED = {*CPP_OPS, *ADDITIVE_OPS}


def check(node: fx.Node) -> None:
    """Check that the compiler supports a node of the loop.

    Raises:
        UnsupportedError: If it doesn't. The message names the operation and its line in the step.
    """
    if is_quantized(node):
        return
    check_supported(node, _SUPPORTED, CPP_REDUCTIONS, "by the compiler", "native/cpp_ops.py has no C++")


def literal(value: object) -> str:
    """Return a number as a C++ literal."""
    number = float(value)  # type: ignore[arg-type]
    if math.isinf(number):
        return "-INFINITY" if number < 0 else "INFINITY"
    return "NAN" if math.isnan(number) else repr(number)

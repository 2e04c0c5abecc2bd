"""The C of the operations of a kernel: the C++ of the engine, with the functions of ``runtime/``."""

from __future__ import annotations

import re

import numpy

from unrolled.engines.compiler.kernel_ir import Apply
from unrolled.engines.native.cpp_ops import ADDITIVE_OPS, CPP_OPS, CPP_REDUCTIONS

# How two values are combined, and the neutral element, by the class of the reduction in C++.
_REDUCTIONS = {
    "Sum": ("v_add", "splat(0)"),
    "Product": ("v_multiply", "splat(1)"),
    "Maximum": ("v_maximum", "splat(-INFINITY)"),
    "Minimum": ("v_minimum", "splat(INFINITY)"),
}


def expression(instruction: Apply, operands: list[str]) -> str:
    """Return the C of an operation.

    Args:
        instruction: The operation.
        operands: The C of its operands.
    """
    if instruction.target in ADDITIVE_OPS:
        left, right = operands
        if instruction.alpha != 1:
            right = f"({right} * splat({literal(instruction.alpha)}))"
        return f"{left} {ADDITIVE_OPS[instruction.target]} {right}"
    return template(CPP_OPS[instruction.target]).format(*operands)


def template(cpp: str) -> str:
    """Return the C for an operation's C++: C has no overloads, so the functions have names of their own."""
    in_c = re.sub(r"\b(?!splat\b)([a-z]\w*)\(", r"v_\1(", cpp)
    return in_c.replace("V{{}}", "splat(0)")


def reduction(target: object) -> tuple[str, str]:
    """Return the C function that combines two values of a reduction, and the neutral element."""
    return _REDUCTIONS[CPP_REDUCTIONS[target]]


def literal(value: float) -> str:
    """Return a number as a C literal in float32."""
    with numpy.errstate(over="ignore"):
        return in_c(str(numpy.float32(value)))


def in_c(text: str) -> str:
    """Return a float32, as numpy prints it with all its bits, as a C literal."""
    special = {"nan": "NAN", "inf": "INFINITY", "-inf": "-INFINITY"}
    if text in special:
        return special[text]
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"

"""The C++ of the operations that the compiler supports."""

from __future__ import annotations

import math

from torch import fx

from unrolled.engines.compiler.generated_code import check_supported
from unrolled.engines.compiler.ir import is_quantized
from unrolled.engines.native.operations import ADDITIVE, OPERATIONS, REDUCTIONS, Language


def literal(value: object) -> str:
    """Return a number as a C++ literal."""
    number = float(value)  # type: ignore[arg-type]
    if math.isinf(number):
        return "-INFINITY" if number < 0 else "INFINITY"
    return "NAN" if math.isnan(number) else repr(number)


# Functions on vectors are overloaded for float and double.
CPP = Language(function=str, zero="V{}", number=literal)

_SUPPORTED = {*OPERATIONS, *ADDITIVE}


def check(node: fx.Node) -> None:
    """Check that the compiler supports a node of the loop.

    Raises:
        UnsupportedError: If it doesn't. The message names the operation and its line in the step.
    """
    if is_quantized(node):
        return
    check_supported(node, _SUPPORTED, REDUCTIONS, "by the compiler", "native/operations.py has no expression")

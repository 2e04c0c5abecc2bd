"""The C of the operations of a kernel, with the functions of ``runtime/``."""

from __future__ import annotations

import numpy

from unrolled.engines.native.operations import REDUCTIONS, Language


def function(name: str) -> str:
    """Return the name in C of a function on vectors: with a prefix, because math.h has many of them."""
    return f"v_{name}"


def reduction(target: object) -> tuple[str, str]:
    """Return the C function that combines two values of a reduction, and the neutral element."""
    one = REDUCTIONS[target]
    return function(one.combine), C.spell(one.neutral, [])


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


C = Language(function, "splat(0)", literal)

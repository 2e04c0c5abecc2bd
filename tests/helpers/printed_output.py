"""Comparison of printed output with a stored copy: equal words, and equal numbers up to rounding."""

from __future__ import annotations

import math
import re

NUMBER = r"-?\d+\.\d+(?:e[+-]?\d+)?"


def assert_same_output(stored: str, printed: str, absolute: float = 2e-4, relative: float = 1e-3) -> None:
    """Assert that two texts are equal up to white space and the rounding of decimal numbers.

    Args:
        stored: The stored output.
        printed: The output of this run.
        absolute, relative: Tolerances for each number.
    """
    assert re.sub(NUMBER, "", stored).split() == re.sub(NUMBER, "", printed).split()
    for expected, actual in zip(re.findall(NUMBER, stored), re.findall(NUMBER, printed), strict=True):
        close = math.isclose(float(expected), float(actual), abs_tol=absolute, rel_tol=relative)
        assert close, f"expected {expected}, but {actual} was printed"

"""What was printed once beside what is printed now: the same words, and numbers as near as rounding."""

from __future__ import annotations

import math
import re

NUMBER = r"-?\d+\.\d+(?:e[+-]?\d+)?"


def assert_as_printed(stored: str, now: str, absolute: float = 2e-4, relative: float = 1e-3) -> None:
    """Everything but decimal numbers is the same, white space aside, and those differ by so much at most."""
    assert re.sub(NUMBER, "", stored).split() == re.sub(NUMBER, "", now).split()
    for before, after in zip(re.findall(NUMBER, stored), re.findall(NUMBER, now), strict=True):
        near = math.isclose(float(before), float(after), abs_tol=absolute, rel_tol=relative)
        assert near, f"{before} was printed, and now it is {after}"

"""Engines run a cell over time; all of them give the numbers of the reference engine."""

from unrolled.engines import reference
from unrolled.engines.reference import run

__all__ = ["reference", "run"]

"""Notice that something else used the processors while a row was timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

MAX_SLOWDOWN = 1.3  # of the probe, beside its own shortest time
MAX_SPREAD = 0.3  # distance of the quartiles, as a share of the median
MAX_SHARE = 1.1  # of the machine's limit

_MATRIX_SIZE = 256  # a product on all threads takes a fraction of a millisecond
_SECONDS = 0.02  # longer than a time slice of the operating system


class Probe:
    """A fixed amount of work on all threads, which takes longer while other programs use the processors.

    Even on a busy machine, a few of its runs are not interrupted. The shortest one is the time on an idle
    machine.
    """

    def __init__(self) -> None:
        self._a, self._b = torch.randn(2, _MATRIX_SIZE, _MATRIX_SIZE).unbind()
        self._out = torch.empty_like(self._a)
        self._shortest = float("inf")
        for _ in range(5):
            self.slowdown()

    def slowdown(self) -> float:
        """Return how many times as long as the shortest run the probe takes now.

        This is a mean, because other programs interrupt few of the runs, but for long.
        """
        durations, end = [], time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(self._a, self._b, out=self._out)
            durations.append(time.perf_counter() - start)
        self._shortest = min(self._shortest, *durations)
        return statistics.mean(durations) / self._shortest


def disturbances(entry: Mapping[str, Any], slowdown: float) -> list[str]:
    """Return why the times of a row are not to be trusted, in words. Empty if they are.

    Args:
        entry: The row, as :func:`~unrolled.cli.bench.measure.measure` returns it.
        slowdown: The larger one of the probe's results before and after the row.
    """
    reasons = []
    if slowdown > MAX_SLOWDOWN:
        reasons.append(f"other work took {1 - 1 / slowdown:.0%} of the processors' time")
    spread, name = max(spreads(entry), default=(0.0, ""))
    if spread > MAX_SPREAD:
        reasons.append(f"the quartiles of {name} differ by {spread:.0%} of the median")
    share = entry["share_of_limit"] or 0.0
    if share > MAX_SHARE:
        reasons.append(f"{share:.0%} of the machine's limit")
    return reasons


def spreads(entry: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Return the distance of the quartiles as a share of the median, with the name, for each runtime."""
    return [
        ((runtime["quartiles"][1] - runtime["quartiles"][0]) / runtime["seconds"], name)
        for name, runtime in entry["runtimes"].items()
        if "seconds" in runtime
    ]

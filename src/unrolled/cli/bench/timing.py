"""Runtimes timed in turn: short blocks of calls, in an order that changes, and medians."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_ROUNDS = 5
_WARM = 3  # calls before the first that counts: TorchScript optimises at its second


@dataclass(frozen=True)
class Timing:
    """What calls took.

    Args:
        seconds: the median of a call.
        quartiles: the first and third quartile, seconds.
        calls: how many were timed.
    """

    seconds: float
    quartiles: tuple[float, float]
    calls: int


def interleave(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Time calls in turn: rounds of a block each, shuffled, so that all meet the same disturbances.

    Args:
        calls: what to call, by name.
        seconds: for each name, all rounds together; a call longer than a block's share is made once a
            round all the same.

    The first call of a block doesn't count where there are more: it finds another's data in the cache.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(_WARM):
            if _seconds(call) > seconds:
                break
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(_ROUNDS):
        shuffle(order)
        for name in order:
            taken[name] += _block(calls[name], seconds / _ROUNDS)
    return {name: _timing(values) for name, values in taken.items()}


def _block(call: Callable[[], object], seconds: float) -> list[float]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        taken = [_seconds(call)]
        while time.perf_counter() < end:
            taken.append(_seconds(call))
    finally:
        if collecting:
            gc.enable()
    return taken[1:] or taken


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timing(taken: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    return Timing(middle, (low, high), len(taken))


def shortest(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls made in this many seconds, at least twenty, in seconds."""
    end, taken = time.perf_counter() + seconds, [_seconds(call) for _ in range(20)]
    while time.perf_counter() < end:
        taken.append(_seconds(call))
    return min(taken)

"""Time several calls in turn: short blocks in shuffled order, reported as medians."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_ROUNDS = 5
_WARMUP_CALLS = 3  # TorchScript optimizes at its second call


@dataclass(frozen=True)
class Timing:
    """The durations of the timed calls.

    Args:
        seconds: The median duration of a call.
        quartiles: The first and third quartile in seconds.
        calls: The number of timed calls.
    """

    seconds: float
    quartiles: tuple[float, float]
    calls: int


def interleave(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    before_block: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Time calls in turn, in rounds of one block per call, shuffled so that disturbances affect all alike.

    The first call of a block is discarded if there are more, because the cache holds the data of another one.

    Args:
        calls: The functions to call, by name.
        seconds: The total time for each name. A call that is longer than its share of a round is still called
            once per round.
        before_block: Called with the name before each block of calls, and before the calls that warm up.
    """
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        before_block(name)
        for _ in range(_WARMUP_CALLS):
            if _time_call(call) > seconds:
                break
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(_ROUNDS):
        shuffle(order)
        for name in order:
            before_block(name)
            durations[name] += _time_block(calls[name], seconds / _ROUNDS)
    return {name: summarize(values) for name, values in durations.items()}


def _time_block(call: Callable[[], object], seconds: float) -> list[float]:
    gc_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        durations = [_time_call(call)]
        while time.perf_counter() < end:
            durations.append(_time_call(call))
    finally:
        if gc_enabled:
            gc.enable()
    return durations[1:] or durations


def _time_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summarize(durations: list[float]) -> Timing:
    """Return the median and the quartiles of durations."""
    low, median, high = statistics.quantiles(durations, n=4, method="inclusive")
    return Timing(median, (low, high), len(durations))


def shortest(call: Callable[[], object], seconds: float) -> float:
    """Return the shortest duration of a call in seconds, measured for this long and at least 20 times."""
    end, durations = time.perf_counter() + seconds, [_time_call(call) for _ in range(20)]
    while time.perf_counter() < end:
        durations.append(_time_call(call))
    return min(durations)

"""Time calls on a device: blocks of calls in shuffled order, timed with CUDA events."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from unrolled.cli.bench.timing import Timing, summarize

_ROUNDS = 5
_WARMUP_CALLS = 3
_MAX_CALLS = 500  # of a block: more would fill the queue of the device

Call = Callable[[], object]


def time_calls(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time calls in turn, as ``timing.interleave`` does on a CPU.

    Args:
        calls: The functions to call, by name.
        device: The device that they use.
        seconds: The total time for each name. A call that takes longer than its share of a round still runs
            once per round.

    Returns:
        For each name the median over the blocks of the mean time of a call.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(_WARMUP_CALLS):
            duration = _time_block(call, device, 1)
        counts[name] = max(1, min(_MAX_CALLS, int(seconds / _ROUNDS / max(duration, 1e-9))))
    durations: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(_ROUNDS):
        shuffle(order)
        for name in order:
            durations[name].append(_time_block(calls[name], device, counts[name]))
    return {name: summarize(values) for name, values in durations.items()}


def _time_block(call: Call, device: torch.device, count: int) -> float:
    """Return the mean time of a call, in seconds, including kernel launches."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count
    new_event: Any = torch.cuda.Event  # untyped
    start, end = new_event(enable_timing=True), new_event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3 / count


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Return the peak memory of one call in bytes. None if the device isn't a CUDA device."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak

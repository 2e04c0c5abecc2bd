"""Measure one row: check every runtime against torch, then time those that agree in turn."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from unrolled.cli.bench.disturbance import MAX_SHARE, Probe, disturbances, spreads
from unrolled.cli.bench.limits import Limits
from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.runtimes import FROZEN, OURS, TORCH, Runtime, without_warnings
from unrolled.cli.bench.timing import interleave
from unrolled.cli.bench.workload import TOLERANCE, Call, Workload, max_difference

ATTEMPTS = 3  # if a row is disturbed
_ERROR_FACTOR = 2  # accepted error, relative to torch's own error, for cells that amplify rounding errors


def measure(
    row: Row, runtimes: Mapping[str, Runtime], seconds: float, limits: Limits, probe: Probe
) -> dict[str, Any]:
    """Measure a row and return its entry in the results. If something disturbs it, measure it again.

    Args:
        row: The row to compute.
        runtimes: The runtimes by name, including torch.
        seconds: The time for each runtime.
        limits: The limits of the machine.
        probe: It notices other work on the processors.

    Returns:
        The sizes of the row and these keys: ``runtimes`` has for each runtime its median ``seconds``,
        ``quartiles``, ``calls`` and ``difference`` from torch, or its ``problem`` in words.
        ``ratio_to_torch`` and ``ratio_to_best_other`` are the times of torch and of ``best_other`` divided by
        ours, or None if one wasn't timed. ``limit_seconds``, ``limit`` and ``share_of_limit`` compare with
        the limits of the machine. In inference, ``ratio_to_best_other`` and ``share_of_limit`` are for our
        layer with frozen weights, because the other runtimes also get their weights in advance.
        ``disturbances`` says why the times are not to be trusted. It is empty if they are.
    """
    entries: dict[str, dict[str, Any]] = {}
    calls = check_runtimes(row, runtimes, entries)
    attempts: list[dict[str, Any]] = []
    for _ in range(ATTEMPTS):
        before = probe.slowdown()
        timings = without_warnings(lambda: interleave(calls, seconds))
        slowdown = max(before, probe.slowdown())
        timed = {
            name: entry | asdict(timings[name]) if name in timings else entry
            for name, entry in entries.items()
        }
        entry = _compare(row, timed, limits)
        if (entry["share_of_limit"] or 0) > MAX_SHARE:
            limits.measure_again(row)
            entry = _compare(row, timed, limits)
        entry["disturbances"] = disturbances(entry, slowdown)
        attempts.append(entry)
        if not entry["disturbances"]:
            break
    return min(attempts, key=lambda one: (len(one["disturbances"]), max(spreads(one), default=(0.0, ""))))


def _compare(row: Row, entries: dict[str, dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """Return the entry of a row from the times of its runtimes, see :func:`measure`."""
    times = {name: entry["seconds"] for name, entry in entries.items() if "seconds" in entry}
    others = {name: value for name, value in times.items() if name not in (OURS, FROZEN, TORCH)}
    best = min(others, key=others.__getitem__, default=None)
    bound, reason = limits.lower_bound(row)
    ours = times.get(OURS)
    # in streaming, our unrolled.Stream also has its weights in advance
    comparable = times.get(FROZEN, ours) if row.mode == "inference" else ours
    return {
        **asdict(row),
        "input": row.input,
        "runtimes": entries,
        "ratio_to_torch": times[TORCH] / ours if ours and TORCH in times else None,
        "best_other": best,
        "ratio_to_best_other": others[best] / comparable if comparable and best else None,
        "limit_seconds": bound,
        "limit": reason,
        "share_of_limit": bound / comparable if comparable else None,
    }


def check_runtimes(
    row: Row, runtimes: Mapping[str, Runtime], entries: dict[str, dict[str, Any]]
) -> dict[str, Call]:
    """Return the calls of the runtimes that agree with torch; add an entry for each runtime."""
    workload = Workload(row)
    calls: dict[str, Call] = {}
    expected = without_warnings(lambda: runtimes[TORCH].prepare(workload)())
    for name, runtime in runtimes.items():
        reason = runtime.unsupported(row)
        if reason is not None:
            entries[name] = {"problem": reason, "unsupported": True}
            continue
        try:
            call: Call = without_warnings(functools.partial(runtime.prepare, workload))
            result = without_warnings(call)
            difference = max_difference(result, expected)
            agrees = difference <= TOLERANCE[row.mode] or _is_as_accurate(result, expected, workload)
        except Exception as error:  # other libraries can raise anything
            entries[name] = {"problem": f"failed: {_first_line(error)}", "unsupported": False}
            continue
        if agrees:
            entries[name], calls[name] = {"difference": difference}, call
        else:
            amount = "NaN" if math.isnan(difference) else f"relative difference {difference:.0e}"
            entries[name] = {"problem": f"disagrees with torch: {amount}", "unsupported": False}
    return calls


def _is_as_accurate(result: Any, expected: Any, workload: Workload) -> bool:
    """Return whether a result is about as close to float64 as torch's; some cells amplify rounding errors."""
    exact = without_warnings(workload.float64_result)
    return max_difference(result, exact) <= _ERROR_FACTOR * max_difference(expected, exact)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"

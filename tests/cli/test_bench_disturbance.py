"""``unrolled bench`` notices that something else uses the processors."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest

import unrolled as ur
from unrolled.cli.bench import disturbance, limits, measure, report, results
from unrolled.cli.bench.disturbance import Probe
from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.runtimes import RUNTIMES

LIMITS = limits.Limits(1e11, 2**20, 1e11, 2**28, 1e10)


@pytest.fixture(autouse=True)
def _restored_engine() -> Any:
    """The benchmark selects an engine."""
    with ur.engine("auto"):
        yield


@pytest.mark.slow
def test_other_work_slows_the_probe_down() -> None:
    probe, busy = Probe(), "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(1)  # they have started
        slowdowns = [probe.slowdown() for _ in range(20)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert statistics.median(slowdowns) > disturbance.MAX_SLOWDOWN


def entry_with(quartiles: tuple[float, float], share: float = 0.5) -> dict[str, Any]:
    steady = {"seconds": 2.0, "quartiles": (1.9, 2.1)}
    uneven = {"seconds": 2.0, "quartiles": quartiles}
    return {
        "runtimes": {"torch": steady, "jax": {"problem": "no"}, "unrolled": uneven},
        "share_of_limit": share,
    }


@pytest.mark.parametrize(
    ("entry", "slowdown", "reasons"),
    [
        (entry_with((1.9, 2.2)), 1.1, []),
        (entry_with((1.9, 2.2)), 2.0, ["other work took 50% of the processors' time"]),
        (entry_with((1.9, 2.8)), 1.0, ["the quartiles of unrolled differ by 45% of the median"]),
        (entry_with((1.9, 2.1), 140.32), 1.0, ["14032% of the machine's limit"]),
    ],
)
def test_disturbances(entry: dict[str, Any], slowdown: float, reasons: list[str]) -> None:
    assert disturbance.disturbances(entry, slowdown) == reasons


class Slowdowns:
    """A probe that returns these results."""

    def __init__(self, *results: float) -> None:
        self.results = list(results)

    def slowdown(self) -> float:
        return self.results.pop(0)


@pytest.mark.slow
def test_disturbed_rows_are_repeated_and_reported(monkeypatch: Any) -> None:
    for name in ("MAX_SPREAD", "MAX_SHARE"):
        monkeypatch.setattr(disturbance, name, float("inf"))
    row, selected = Row("rnn", 2, 3, 8, "training"), {name: RUNTIMES[name] for name in ("unrolled", "torch")}
    twice, always = Slowdowns(1, 3, 2, 1, 1, 1), Slowdowns(*[2.0] * 6)
    repeated = measure.measure(row, selected, 0.001, LIMITS, twice)  # type: ignore[arg-type]
    assert (repeated["disturbances"], twice.results) == ([], [])
    disturbed = measure.measure(row, selected, 0.001, LIMITS, always)  # type: ignore[arg-type]
    assert (len(disturbed["disturbances"]), always.results) == (1, [])
    assert report.format_disturbances([repeated]) == []
    first, *lines = report.format_disturbances([repeated, disturbed])
    assert first.startswith("1 of 2 rows marked with ? can't be trusted")
    assert lines == ["  rnn 2×3×8, training: other work took 50% of the processors' time"]
    (mean,) = results.means([repeated, disturbed])
    assert (mean["rows"], mean["ratio_to_torch"]) == (1, pytest.approx(repeated["ratio_to_torch"]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [(Row("rnn", 64, 3, 128, "training"), "compute"), (Row("rnn", 1, 3, 8, "training"), "reading")],
)
def test_a_limit_that_was_exceeded_is_measured_again(row: Row, reason: str) -> None:
    slow, fast = 1.0, 1e18
    flops, rate = (slow, fast) if reason == "compute" else (fast, slow)
    measured = limits.Limits(flops, 2**20, rate, 2**28, rate, {2**20: rate})
    bound = measured.lower_bound(row)
    assert bound[1] == reason
    measured.measure_again(row)
    assert measured.lower_bound(row)[0] < bound[0] / 1e6

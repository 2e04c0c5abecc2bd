"""The number of threads: torch's, limited by the cores that the process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, use_threads
from unrolled.engines import threads
from unrolled.engines.native import kernel


@pytest.fixture(autouse=True)
def forget_the_limit() -> Iterator[None]:
    threads.core_limit.cache_clear()
    yield
    threads.core_limit.cache_clear()


def set_up_machine(
    patch: pytest.MonkeyPatch, folder: Path, groups: str, files: dict[str, str], cores: int = 64
) -> None:
    """Simulate a machine with control groups: the content of /proc/self/cgroup and of settings files."""
    (folder / "cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    patch.setattr(threads, "_GROUPS", folder / "cgroup")
    patch.setattr(threads, "_MOUNT", folder / "mount")
    patch.setattr(os, "cpu_count", lambda: cores)
    patch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)


V1 = "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n"


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, None),  # more than the machine has
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "800000 100000\n", "a/b/cpu.max": "50000 10000\n"}, 5),
        ("0::/of/the/host\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/a\n", {"unified/a/cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 6),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "70000\n", "cpu/docker/a/cpu.cfs_period_us": "10000\n"}, 7),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_quotas_of_control_groups_limit_the_cores(
    groups: str, files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_machine(monkeypatch, tmp_path, groups, files)
    assert threads.core_limit() == limit


def test_the_affinity_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_machine(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "900000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 9, 11})
    assert threads.core_limit() == 3


def test_a_system_without_control_groups_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_GROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert threads.core_limit() is None
    assert threads.thread_count() == torch.get_num_threads()


@NEEDS_COMPILER
def test_loops_use_no_more_threads_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, counts = ur.LSTM(8, 32), torch.randn(9, 16, 8), []
    original = kernel.Kernel.arguments

    def record(self: kernel.Kernel, layout: object, reverse: bool, count: int, *rest: object) -> object:
        counts.append(count)
        return original(self, layout, reverse, count, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel.Kernel, "arguments", record)
    set_up_machine(monkeypatch, tmp_path, "0::/\n", {"cpu.max": "300000 100000\n"})
    for requested, expected in ((8, 3), (2, 2)):
        with use_threads(requested), torch.no_grad(), ur.engine("native"):
            layer(x)
        assert set(counts) == {expected}
        counts.clear()


@pytest.mark.parametrize("work_for_two", [100, 16000, 80000])
def test_the_number_of_threads_grows_with_the_work(work_for_two: int) -> None:
    for factor in (0, 0.01, 0.99, 1, 1.5, 2, 3.9, 4, 10, 64, 1000):
        work = int(factor * work_for_two)
        # How long n threads take: their share of the work, and a time in proportion to n.
        times = {n: work / n + work_for_two * n / 4 for n in range(1, 100)}
        times[1] = work  # a single thread isn't started
        count = kernel._useful_threads(99, work, work_for_two)
        assert times[count] <= 1.1 * min(times.values())
        assert kernel._useful_threads(3, work, work_for_two) == min(count, 3)
        assert (count > 1) == (factor >= 1)


@NEEDS_COMPILER
@pytest.mark.parametrize(("threads", "hidden", "at_once"), [(2, 64, 1), (3, 8, 1), (8, 64, 1), (8, 320, 0)])
def test_small_directions_run_at_the_same_time(
    threads: int, hidden: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = ur.GRU(3, hidden, bidirectional=True), torch.randn(9, 1, 3)
    pairs: list[object] = []
    launch_pair = kernel.launch_pair
    monkeypatch.setattr(kernel, "launch_pair", lambda *calls: pairs.append(calls) or launch_pair(*calls))
    with torch.no_grad(), ur.engine("native"):
        previous = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected = layer(x)[0]
            assert not pairs
            torch.set_num_threads(threads)
            assert layer(x)[0].equal(expected)
            with ur.frozen(layer):
                assert layer(x)[0].equal(expected)
        finally:
            torch.set_num_threads(previous)
    assert len(pairs) == 2 * at_once

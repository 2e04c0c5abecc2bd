"""The thread pool: concurrent callers, forked children, its own threads, and contention."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, use_threads
from unrolled.engines.native.toolchain import build

pytestmark = NEEDS_COMPILER


def test_concurrent_python_threads() -> None:
    layer = ur.LSTM(16, 32)
    inputs = [torch.randn(40, 3, 16) for _ in range(8)]
    with torch.no_grad(), ur.engine("native"):
        expected = [layer(x)[0] for x in inputs]
    is_equal: dict[int, bool] = {}

    def work(k: int) -> None:
        with torch.no_grad(), ur.engine("native"):
            is_equal[k] = all(torch.equal(layer(inputs[k])[0], expected[k]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_equal == dict.fromkeys(range(8), True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child_has_its_own_pool() -> None:
    """A child doesn't have the workers of the parent's OpenMP runtime, and must not wait for them."""
    layer, x = ur.LSTM(9, 40), torch.randn(20, 6, 9)
    with use_threads(2), torch.no_grad(), ur.engine("native"):
        expected = layer(x)[0]
        child = os.fork()
        if child == 0:
            same = all(torch.equal(layer(x)[0], expected) for _ in range(3))  # too small for torch's threads
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(layer(x)[0], expected)


@pytest.mark.slow
def test_own_threads_give_the_same_bits_as_openmp(tmp_path: Path) -> None:
    """The pool uses its own threads if torch's OpenMP runtime can't be found."""
    code = (
        "import ctypes, sys, torch, unrolled as ur\n"
        "from unrolled.engines.native import matmul\n"
        "from unrolled.engines.native.tuning import constants\n"
        "constants().update(STEP_WORK_FOR_TWO_THREADS=1, CALL_WORK_FOR_TWO_THREADS=1)\n"
        "torch.set_num_threads(3)\n"
        "if sys.argv[1] == 'own':\n"
        "    matmul._thread_pool().thread_pool_use_openmp(None, None, None)\n"
        "torch.manual_seed(0)\n"
        "ur.engine('native')\n"
        "layer, x = ur.GRU(9, 40, bidirectional=True), torch.randn(12, 6, 9)\n"
        "for _ in range(3):\n"
        "    output = layer(x)[0]\n"
        "    gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))\n"
        "torch.save([output.detach(), *gradients], sys.argv[2])\n"
    )
    results = []
    for threads in ("own", "openmp"):
        path = tmp_path / f"{threads}.pt"
        subprocess.run([sys.executable, "-c", code, threads, str(path)], check=True, timeout=900)
        results.append(torch.load(path))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


MONITOR = """
#include "contention_monitor.h"
ContentionMonitor monitor;
extern "C" bool should_measure() { return monitor.should_measure(); }
extern "C" bool is_contended(int64_t now) { return monitor.is_contended(now); }
extern "C" void record(int64_t start, int64_t end, bool measured, int64_t stolen) {
  monitor.record(start, end, measured, stolen);
}
"""


def test_contention_disables_threads_for_a_while() -> None:
    """With a simulated clock. For measurements on a busy machine see benchmarks/RESULTS.md."""
    monitor = build.load(MONITOR)
    monitor.should_measure.restype = monitor.is_contended.restype = ctypes.c_bool
    clock, ms = 0, 1_000_000

    def call(duration: int, stolen: int) -> None:
        nonlocal clock
        measured = monitor.should_measure()
        times = map(ctypes.c_int64, (clock, clock + duration))
        monitor.record(*times, measured, ctypes.c_int64(stolen))
        clock += duration

    def is_contended(delay: int = 0) -> bool:
        return bool(monitor.is_contended(ctypes.c_int64(clock + delay)))

    call(ms // 10, ms)  # short calls and the first long call are not measured
    assert not monitor.should_measure()
    call(10 * ms, 10 * ms)
    assert monitor.should_measure()
    for _ in range(2):  # one or two contended calls may be chance
        call(10 * ms, 10 * ms)
        assert not is_contended()
    call(10 * ms, 10 * ms)
    assert is_contended()
    assert is_contended(79 * ms)
    assert not is_contended(80 * ms)
    for _ in range(3):  # after more contended calls: at most sixteen times the duration of a call
        clock += 200 * ms
        call(10 * ms, 10 * ms)
        assert is_contended(159 * ms)
        assert not is_contended(160 * ms)
    clock += 200 * ms
    call(10 * ms, 3 * ms)  # the cores are free again, so counting contended calls starts anew
    assert not is_contended()
    for _ in range(2):
        call(10 * ms, 10 * ms)
        assert not is_contended()

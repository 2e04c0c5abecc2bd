"""Measurements that need a fresh process: peak memory in training, and compile time at the first call."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch

from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.runtimes import RUNTIMES
from unrolled.cli.bench.workload import Workload

if sys.platform != "win32":
    import resource

_STATUS = Path("/proc/self/status")
_TIMEOUT = 900  # seconds


def peak_memory(row: Row, runtime: str) -> int:
    """Measure by how many bytes one call raises the peak resident memory of a fresh process.

    Raises:
        RuntimeError: If the process fails. The message is the last line of its error output.
    """
    return int(_run_in_subprocess("memory", row, runtime, {}))


def first_use(row: Row, runtime: str) -> float:
    """Measure how many seconds longer the first call takes than the second, with empty kernel caches.

    Raises:
        RuntimeError: If the process fails. The message is the last line of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, name)) for name in ("UNROLLED_CACHE", "TORCHINDUCTOR_CACHE_DIR")}
        return _run_in_subprocess("compile", row, runtime, caches)


def _run_in_subprocess(measurement: str, row: Row, runtime: str, environment: dict[str, str]) -> float:
    arguments = json.dumps(
        {
            "measurement": measurement,
            "row": asdict(row),
            "runtime": runtime,
            "threads": torch.get_num_threads(),
        }
    )
    try:
        process = subprocess.run(
            [sys.executable, "-m", "unrolled.cli.bench.in_subprocess", arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result after {_TIMEOUT} s") from None
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"failed with exit code {process.returncode}"]
        raise RuntimeError(lines[-1][:200])
    return float(process.stdout.splitlines()[-1])


def _measure_memory(row: Row, runtime: str) -> float:
    prepare = RUNTIMES[runtime].prepare
    prepare(Workload(replace(row, time=2)))()  # load and compile everything that the first call needs
    call = prepare(Workload(row))
    _reset_peak()
    before = _resident_memory()
    result = call()
    peak = _peak_memory()
    del result
    return peak - before


def _measure_compile_time(row: Row, runtime: str) -> float:
    workload = Workload(row)
    start = time.perf_counter()
    call = RUNTIMES[runtime].prepare(workload)
    call()
    first = time.perf_counter()
    call()
    return first - start - (time.perf_counter() - first)


def _reset_peak() -> None:
    """Reset the peak memory of this process to its current memory, if the system supports it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_memory() -> int:
    return _read_status("VmRSS") or _peak_memory()


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    ]


def _peak_memory() -> int:
    if sys.platform == "win32":
        counters = _MemoryCounters(size=ctypes.sizeof(_MemoryCounters))
        kernel32 = ctypes.WinDLL("kernel32")
        kernel32.GetCurrentProcess.restype = ctypes.c_void_p
        kernel32.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32]
        process = kernel32.GetCurrentProcess()
        kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
        return int(counters.peak_working_set)
    unit = 1 if sys.platform == "darwin" else 1024
    return _read_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read_status(name: str) -> int:
    """Read a size in bytes from Linux's status file of this process; 0 if there is none."""
    if not _STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines.get(name, "0").split()[0]) * 1024


def _main(arguments: str) -> None:
    warnings.simplefilter("ignore")
    options = json.loads(arguments)
    torch.set_num_threads(options["threads"])
    measure = {"memory": _measure_memory, "compile": _measure_compile_time}[options["measurement"]]
    print(measure(Row(**options["row"]), options["runtime"]))


if __name__ == "__main__":
    _main(sys.argv[1])

"""What needs a process of its own: the peak of memory in training, and compiling at the first use."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch

from unrolled.cli.bench.grid import Row
from unrolled.cli.bench.peers import PEERS
from unrolled.cli.bench.work import Work

_STATUS = Path("/proc/self/status")
_PATIENCE = 900  # seconds


def peak_memory(row: Row, runtime: str) -> int:
    """Bytes by which one call of a row raises the peak of a fresh process's resident memory.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    return int(_apart("memory", row, runtime, {}))


def first_use(row: Row, runtime: str) -> float:
    """Seconds that the first call of a row takes longer than the second, every cache being empty.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        empty = {name: str(Path(folder, name)) for name in ("UNROLLED_CACHE", "TORCHINDUCTOR_CACHE_DIR")}
        return _apart("compile", row, runtime, empty)


def _apart(what: str, row: Row, runtime: str, environment: dict[str, str]) -> float:
    order = json.dumps(
        {"what": what, "row": asdict(row), "runtime": runtime, "threads": torch.get_num_threads()}
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "unrolled.cli.bench.apart", order],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not ready after {_PATIENCE} s") from None
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        raise RuntimeError(words[-1][:200])
    return float(done.stdout.splitlines()[-1])


def _memory(row: Row, runtime: str) -> float:
    peer = PEERS[runtime]
    peer.prepare(Work(replace(row, time=2)))()  # loads and compiles what the first call needs
    call = peer.prepare(Work(row))
    _forget_peak()
    before = _resident()
    held = call()
    peak = _peak()
    del held
    return peak - before


def _compile(row: Row, runtime: str) -> float:
    work = Work(row)
    start = time.perf_counter()
    call = PEERS[runtime].prepare(work)
    call()
    first = time.perf_counter()
    call()
    return first - start - (time.perf_counter() - first)


def _forget_peak() -> None:
    """Set the kernel's peak of this process to what it holds now, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident() -> int:
    return _status("VmRSS") or _peak()


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A line of Linux's report on this process, bytes; 0 where there is none."""
    if not _STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines.get(name, "0").split()[0]) * 1024


def _main(order: str) -> None:
    warnings.simplefilter("ignore")
    given = json.loads(order)
    torch.set_num_threads(given["threads"])
    measured = {"memory": _memory, "compile": _compile}[given["what"]]
    print(measured(Row(**given["row"]), given["runtime"]))


if __name__ == "__main__":
    _main(sys.argv[1])

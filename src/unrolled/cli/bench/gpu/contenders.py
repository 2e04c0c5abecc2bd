"""The implementations that are timed on a GPU: our layer, torch.nn, a Python loop, and other libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import unrolled
from unrolled.cli.bench.gpu import custom
from unrolled.cli.bench.gpu.clock import peak_memory, time_calls
from unrolled.cli.bench.gpu.peers import prepare_flashrnn, prepare_torchrl
from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.runtimes import Runtime, without_warnings
from unrolled.cli.bench.workload import Call, Loop, Step, Workload, max_difference

OURS, KERNELS, TORCH, LOOP, COMPILE = "unrolled", "kernels", "torch.nn", "loop", "compile"
COMPILED_ROW = Row(custom.TIMED_WITH_COMPILE, 32, 32, 256, "inference")
"""The row that is also timed with ``torch.compile``, which unrolls the loop: that takes a minute."""

# Products of all contenders may be rounded to TF32, in different orders.
_TOLERANCE = {"inference": 2e-2, "training": 1e-1}


def _with_engine(engine: str, call: Call) -> Call:
    def run() -> Sequence[Any]:
        with unrolled.engine(engine):
            return call()

    return run


def _prepare_ours(engine: str, workload: Workload) -> Call:
    return _with_engine(engine, workload.call(workload.ours, workload.ours.parameters()))


def _prepare_torch(workload: Workload) -> Call:
    return workload.call(workload.theirs, workload.theirs.parameters())


def _prepare_loop(workload: Workload) -> Call:
    return workload.call(Loop(Step(workload.ours)), workload.ours.parameters())


def _prepare_compile(workload: Workload) -> Call:
    torch.compiler.reset()
    compiled: Any = torch.compile(Loop(Step(workload.ours)), fullgraph=True, dynamic=False)
    return workload.call(compiled, workload.ours.parameters())


def _needs_standard_cell(row: Row) -> str | None:
    return None if row.standard else "torch.nn has no such cell"


def _needs_cell(*cells: str) -> Callable[[Row], str | None]:
    return lambda row: None if row.cell in cells else f"supports {' and '.join(cells)} only"


CONTENDERS: dict[str, Runtime] = {
    OURS: Runtime(functools.partial(_prepare_ours, "auto")),
    KERNELS: Runtime(functools.partial(_prepare_ours, "native"), _needs_standard_cell),
    TORCH: Runtime(_prepare_torch, _needs_standard_cell),
    LOOP: Runtime(_prepare_loop),
    COMPILE: Runtime(_prepare_compile, lambda row: None if row == COMPILED_ROW else "timed for one row only"),
    "torchrl": Runtime(prepare_torchrl, _needs_cell(*custom.OF_TORCHRL), ("torchrl", "tensordict")),
    "flashrnn": Runtime(prepare_flashrnn, _needs_cell(*custom.OF_FLASHRNN), ("flashrnn",)),
}


def warm_up(row: Row, device: torch.device) -> None:
    """Compile the kernels of a row and cache them on disk, by calling our layer with few steps."""
    workload = Workload(Row(row.cell, row.batch, 2, row.hidden, row.mode), device)
    _prepare_ours("native", workload)()


def measure(
    row: Row, device: torch.device, seconds: float, contenders: Mapping[str, Runtime] = CONTENDERS
) -> dict[str, Any]:
    """Time a row.

    Args:
        row: The row.
        device: The device.
        seconds: The time for each contender.
        contenders: The contenders, by name.

    Returns:
        The sizes of the row; ``contenders``, a dictionary for each; and ``ratios``, the times of the others
        divided by that of our layer. The dictionary has the median ``seconds``, ``us_per_step``, in training
        the ``bytes`` that a call allocates, and the ``difference`` from the Python loop. For a contender that
        wasn't timed, ``problem`` is the reason, and ``unsupported`` says whether it doesn't support this row.
    """
    workload = Workload(row, device)
    expected = without_warnings(_prepare_loop(workload))
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, contender in contenders.items():
        missing = contender.missing_packages()
        reason = contender.unsupported(row) or (f"not installed: {missing[0]}" if missing else None)
        if reason is not None:
            entries[name] = {"problem": reason, "unsupported": True}
            continue
        try:
            call: Call = without_warnings(functools.partial(contender.prepare, workload))
            difference = max_difference(without_warnings(call), expected)
        except Exception as error:  # other libraries can raise anything
            lines = str(error).strip().splitlines() or [""]
            problem = f"{type(error).__name__}: {lines[0][:160]}"
            entries[name] = {"problem": problem, "unsupported": False}
            continue
        if difference <= _TOLERANCE[row.mode]:
            calls[name], entries[name] = call, {"difference": difference}
        else:
            entries[name] = {"problem": f"differs from the loop by {difference:.1e}", "unsupported": False}
    del expected
    timings = without_warnings(lambda: time_calls(calls, device, seconds))
    for name, timing in timings.items():
        entry = entries[name]
        entry |= {"seconds": timing.seconds, "quartiles": timing.quartiles}
        entry["us_per_step"] = timing.seconds / row.time * 1e6
        if row.mode == "training":
            entry["bytes"] = peak_memory(calls[name], device)
    ours = entries.get(OURS, {}).get("seconds")
    ratios = {name: one.seconds / ours for name, one in timings.items() if ours and name != OURS}
    sizes = {"cell": row.cell, "batch": row.batch, "time": row.time, "hidden": row.hidden, "mode": row.mode}
    return {**sizes, "contenders": entries, "ratios": ratios}

"""``unrolled bench --device cuda``: check the kernels, then time them, within a time limit."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from unrolled._version import __version__
from unrolled.cli.arguments import UsageError, check_output_files
from unrolled.cli.bench.gpu import chart, checks, parity, report
from unrolled.cli.bench.gpu.contenders import COMPILE, COMPILED_ROW, CONTENDERS, measure
from unrolled.cli.bench.gpu.rows import select_rows
from unrolled.cli.bench.gpu.workers import run_tasks
from unrolled.cli.bench.rows import Row
from unrolled.engines.gpu.backend import BACKEND
from unrolled.engines.gpu.tuning import LARGE_BATCH
from unrolled.io import files

VERSION = 1
MINUTES = 10.0  # how long the default rows and checks take on an H200 (an estimate)
_SECONDS = 0.2  # for each contender of a row
_CHECKS_SHARE = 0.4  # of the time limit, for checks and the first calls of all rows
_MAX_PROCESSES = 12
_PACKAGES = ("triton", "torchrl", "flashrnn")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: If there is no such device, or an option only works on the CPU.
        SystemExit: With code 1, after the report, if a comparison or a check failed.
    """
    _check_options(options)
    device = _find_device(options.device)
    check_output_files(options.json, options.plot)
    torch.cuda.set_device(device)
    rows = select_rows(options.cells, options.batch, options.hidden, options.time, options.mode)
    if report.count_failures(run_benchmark(options, device, rows)):
        raise SystemExit(1)


def run_benchmark(options: argparse.Namespace, device: torch.device, rows: list[Row]) -> dict[str, Any]:
    """Check and time, print the report, and return the results."""
    minutes = options.minutes or MINUTES
    end = time.monotonic() + 60 * minutes
    console = Console(highlight=False, markup=False, emoji=False)
    document = new_document(device)
    console.print(report.format_setup(document["setup"]))
    _run_checks(document, device, rows, 60 * minutes * _CHECKS_SHARE)
    report.print_checks(console, document)

    def save() -> None:
        if options.json:
            files.write_json(document, options.json)

    contenders = {name: one for name, one in CONTENDERS.items() if name != COMPILE}
    for row in rows:
        if time.monotonic() > end:
            document["left_out"].append(asdict(row))
            continue
        document["rows"].append(measure(row, device, options.seconds or _SECONDS, contenders))
        save()
    if options.mode is None and options.cells is None and time.monotonic() + 60 < end:
        document["rows"].append(measure(COMPILED_ROW, device, options.seconds or _SECONDS))
    save()
    report.print_rows(console, document)
    if options.plot:
        chart.draw(document, options.plot)
    written = [str(path) for path in (options.json, options.plot) if path]
    console.print(
        f"Wrote {', '.join(written)}" if written else "To save the results, use --json FILE or --plot FILE."
    )
    return document


def _run_checks(document: dict[str, Any], device: torch.device, rows: list[Row], seconds: float) -> None:
    """Compare kernels, run the checks, and compile the kernels of all rows, in several processes."""
    compared = parity.tasks()
    names = list(checks.CHECKS) if device.type == "cuda" else []
    # Large batches may use other kernels.
    kernels = {(row.cell, row.hidden, row.mode, row.batch > LARGE_BATCH): row for row in rows}
    first_calls = kernels.values()
    tasks: list[dict[str, Any]] = [
        *({"parity": asdict(task)} for task in compared),
        *({"check": name} for name in names),
        *({"row": asdict(row)} for row in first_calls),
    ]
    for task in tasks:
        task["device"] = str(device)
    processes = max(1, min(_MAX_PROCESSES, (os.cpu_count() or 2) - 1))
    results = run_tasks(tasks, processes, seconds)
    for task, result in zip(tasks, results, strict=True):
        kind = next(iter(task))
        name = {"check": task[kind]} if kind == "check" else task[kind]
        document[kind + "_tasks"].append({**name, **result})


def new_document(device: torch.device) -> dict[str, Any]:
    """Return a document without results. Its keys contain the units."""
    versions = {"torch": str(torch.__version__)}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    setup: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "unrolled": __version__,
        "device": str(device),
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        setup |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    keys = ("parity_tasks", "check_tasks", "row_tasks", "rows", "left_out")
    return {"version": VERSION, "setup": setup, **{key: [] for key in keys}}


def _find_device(text: str) -> torch.device:
    device = torch.device(text)
    count = torch.cuda.device_count()
    if torch.cuda.is_available() and (device.index or 0) >= count:
        raise UsageError(f"--device {text}: torch finds {count} CUDA devices, so use a number below {count}")
    reason = BACKEND.runtime.unavailable(device)
    if reason is not None:
        raise UsageError(f"--device {text}: {reason}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for options that only work on the CPU."""
    for name in ("full", "quick", "resume", "peers", "threads"):
        if getattr(options, name):
            raise UsageError(f"--{name} only works on the CPU: remove it, or remove --device")
    if options.mode == "streaming":
        raise UsageError("--mode streaming only works on the CPU: use inference or training")

"""``unrolled bench``: parse its arguments and run the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import unrolled
from unrolled.cli.arguments import (
    check_output_files,
    comma_separated,
    parse_device,
    positive_float,
    positive_int,
)
from unrolled.cli.bench import chart, in_subprocess, report, results, scaling
from unrolled.cli.bench.disturbance import Probe
from unrolled.cli.bench.gpu import command as gpu
from unrolled.cli.bench.limits import Limits
from unrolled.cli.bench.measure import measure
from unrolled.cli.bench.rows import CELLS, MODES, STANDARD, Row, default_cells, select_rows
from unrolled.cli.bench.runtimes import ALWAYS, CHECKPOINT, OURS, RUNTIMES, TORCH, select_runtimes
from unrolled.cli.progress import Task, run_tasks
from unrolled.io import files

_SECONDS = {False: 0.15, True: 1.0}  # for each row and runtime: quick, full
_MEMORY_STEPS = 1000  # sequence length of the rows whose memory is measured
_MEMORY_SIZES = {False: (8, 256), True: (32, 256)}  # their batch size and hidden size: quick, full
_FIRST_USE_RUNTIMES = ("compile-step", "compile")  # compared with ours, if they are timed at all
_FIRST_USE_SIZES = (1, 100, 128)  # batch, time, hidden


def add(commands: Any) -> None:
    """Add the command to the subparsers of an argument parser."""
    parser = commands.add_parser(
        "bench",
        help="compare the speed of unrolled, torch.nn and other runtimes",
        description="Compare the speed of unrolled, torch.nn and other runtimes on this machine, and report "
        "how close unrolled comes to the limits of this machine in computing and reading memory. "
        "Runtimes whose results differ from those of torch by more than rounding errors are not timed.",
        allow_abbrev=False,
    )
    quick_cells = default_cells(False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="time a few sizes, in under a minute (default)")
    size.add_argument(
        "--full", action="store_true", help="time every combination of sizes except the largest; takes hours"
    )
    parser.add_argument(
        "--cells",
        type=_names_parser(list(CELLS)),
        metavar="LIST",
        help=f"cells to time: one or more of {', '.join(CELLS)} (default: {', '.join(quick_cells)}; with "
        f"--full also {', '.join(name for name in default_cells(True) if name not in quick_cells)})",
    )
    for name, description in (
        ("batch", "batch sizes, such as 1,32"),
        ("hidden", "hidden sizes, such as 128,256"),
        ("time", "sequence lengths, such as 100,1000"),
    ):
        parser.add_argument(f"--{name}", type=_positive_ints, metavar="LIST", help=description)
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="time only this mode (default: all); streaming means one time step per call",
    )
    parser.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help="seconds to time each runtime, for each combination of cell, sizes and mode (default: 0.15, or "
        "1 with --full)",
    )
    selectable = ", ".join(name for name in RUNTIMES if name not in ALWAYS)
    parser.add_argument(
        "--peers",
        type=comma_separated,
        metavar="LIST",
        help=f"other runtimes to time: one or more of {selectable}, or none (default: all that are "
        "installed; without --full, not compile and compile-step, which apply torch.compile to a layer and "
        "to the step of a custom cell)",
    )
    parser.add_argument(
        "--threads",
        type=_positive_ints,
        metavar="LIST",
        help="number of threads for every runtime (default: torch.get_num_threads()). With several numbers, "
        "such as 1,2,4, time ours and torch with each of them, and show how the speed grows",
    )
    parser.add_argument(
        "--device",
        type=parse_device,
        default="cpu",
        metavar="D",
        help="cpu (default), cuda or cuda:N. With cuda, compare the GPU kernels with the reference engine, "
        "then time them",
    )
    parser.add_argument(
        "--minutes",
        type=positive_float,
        metavar="M",
        help=f"time limit with --device cuda (default: {gpu.MINUTES:g}); rows that don't fit are skipped",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a JSON file")
    parser.add_argument("--resume", action="store_true", help="skip what the file of --json already contains")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="chart to write: .png, .svg or .pdf")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: If the arguments can't be used.
        OSError: If a file can't be written.
    """
    if options.device != "cpu":
        gpu.run(options)
        return
    if options.minutes is not None:
        raise ValueError("--minutes needs --device cuda")
    if len(options.threads or ()) > 1:
        _run_scaling(options)
        return
    names = [] if options.peers == ["none"] else options.peers
    runtimes, missing = select_runtimes(names, options.full)
    if options.resume and options.json is None:
        raise ValueError("--resume needs --json FILE")
    check_output_files(options.json, options.plot)
    rows = _select_rows(options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads[0] if options.threads else threads)
        saved_rows = results.load_rows(options.json) if options.resume else []
        with unrolled.engine("native"):
            _run_benchmark(options, rows, runtimes, missing, saved_rows)
    finally:
        torch.set_num_threads(threads)


def _select_rows(options: argparse.Namespace) -> list[Row]:
    rows = select_rows(options.full, options.cells, options.batch, options.hidden, options.time, options.mode)
    if not rows:
        raise ValueError("these sizes are too large; to time them anyway, set --batch, --hidden and --time")
    return rows


def _run_scaling(options: argparse.Namespace) -> None:
    """Time the rows with several numbers of threads.

    Raises:
        ValueError: If the other arguments can't be used with them.
        OSError: If a file can't be written.
    """
    for name in ("peers", "resume"):
        if getattr(options, name):
            raise ValueError(f"--{name} needs a single number of threads, got {len(options.threads)}")
    check_output_files(options.json, options.plot)
    threads, seconds = list(dict.fromkeys(options.threads)), options.seconds or _SECONDS[options.full]
    with unrolled.engine("native"):
        scaling.run(_select_rows(options), threads, seconds, options.json, options.plot)


def _run_benchmark(
    options: argparse.Namespace,
    rows: list[Row],
    runtimes: dict[str, Any],
    missing: list[str],
    saved_rows: list[dict[str, Any]],
) -> None:
    seconds = options.seconds or _SECONDS[options.full]
    console = Console(highlight=False, markup=False, emoji=False)
    limits, probe = Limits.measure(min(seconds, 0.3)), Probe()
    document = results.new_document(limits.as_data(), missing)
    document["rows"] = saved_rows
    console.print(report.format_limits(document["limits"]))

    def save() -> None:
        document["means"] = results.means(document["rows"])
        if options.json:
            files.write_json(document, options.json)

    def measure_row(row: Row) -> None:
        document["rows"].append(measure(row, runtimes, seconds, limits, probe))

    save()
    tasks: list[Task] = []
    for row in rows:
        if not results.contains(saved_rows, row):
            label = f"{row.cell} {row.batch}×{row.time}×{row.hidden} {row.mode}"
            tasks.append((label, partial(measure_row, row)))
    tasks += _memory_tasks(options, rows, document["memory"])
    tasks += _first_use_tasks(rows, runtimes, document["first_use"])
    run_tasks([(label, partial(_run_and_save, task, save)) for label, task in tasks])
    document["limits"] = limits.as_data()
    save()
    report.print_report(console, document)
    if options.plot:
        chart.draw(document, options.plot)
    written = [str(path) for path in (options.json, options.plot) if path]
    console.print(
        f"Wrote {', '.join(written)}" if written else "To save the results, use --json FILE or --plot FILE."
    )


def _run_and_save(task: Callable[[], object], save: Callable[[], None]) -> None:
    task()
    save()


def _memory_tasks(options: argparse.Namespace, rows: list[Row], entries: list[dict[str, Any]]) -> list[Task]:
    """Return tasks that measure the peak memory in training, ours and torch's, for each trained cell."""
    batch, hidden = _MEMORY_SIZES[options.full]
    batch, hidden = max(options.batch or [batch]), max(options.hidden or [hidden])

    def task(cell: str) -> None:
        row = Row(cell, batch, _MEMORY_STEPS, hidden, "training")
        entry: dict[str, Any] = {"cell": cell, "batch": batch, "time": _MEMORY_STEPS, "hidden": hidden}
        for name in (OURS, CHECKPOINT, TORCH):
            try:
                entry[f"{name}_bytes"] = in_subprocess.peak_memory(row, name)
            except RuntimeError as error:
                entry |= {f"{name}_bytes": None, f"{name}_problem": str(error)}
        entries.append(entry)

    cells = _trained_cells(rows)
    if not options.full:
        cells = [cell for cell in cells if cell in STANDARD][-1:]
    return [(f"memory, {cell}", partial(task, cell)) for cell in cells]


def _first_use_tasks(rows: list[Row], runtimes: dict[str, Any], entries: list[dict[str, Any]]) -> list[Task]:
    """Return tasks that measure the compile time at the first call, for each custom cell that is trained."""

    def task(row: Row, name: str) -> None:
        entry: dict[str, Any] = {"cell": row.cell, "time": row.time, "hidden": row.hidden, "runtime": name}
        try:
            entries.append({**entry, "seconds": in_subprocess.first_use(row, name)})
        except RuntimeError as error:
            entries.append({**entry, "seconds": None, "problem": str(error)})

    batch, time, hidden = _FIRST_USE_SIZES
    return [
        (f"first use, {cell}, {name}", partial(task, Row(cell, batch, time, hidden, "training"), name))
        for cell in _trained_cells(rows)
        if cell not in STANDARD
        for name in (OURS, *(name for name in _FIRST_USE_RUNTIMES if name in runtimes))
    ]


def _trained_cells(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.cell for row in rows if row.mode == "training"))


def _names_parser(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for name in (names := comma_separated(text)):
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(known)}, got {name!r}")
        return names

    return parse


def _positive_ints(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]

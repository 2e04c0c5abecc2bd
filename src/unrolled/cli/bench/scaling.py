"""Measure how the speed of rows grows with the number of threads: ``unrolled bench --threads 1,2,4``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unrolled.cli.bench.disturbance import Probe, disturbances
from unrolled.cli.bench.measure import ATTEMPTS, check_runtimes
from unrolled.cli.bench.report import (
    format_disturbances,
    format_failures,
    format_setup,
    format_time,
    new_table,
)
from unrolled.cli.bench.results import VERSION, is_disturbed, setup
from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.runtimes import OURS, RUNTIMES, TORCH, without_warnings
from unrolled.cli.bench.timing import interleave
from unrolled.cli.progress import run_tasks
from unrolled.io import files

_CAPTION = (
    "Median time per call, and the speedup over the first column. B×T×H: batch size, sequence length, hidden "
    "size. For custom cells, torch is a Python loop over the time steps."
)


def run(
    rows: Sequence[Row], threads: Sequence[int], seconds: float, json: Path | None, plot: Path | None
) -> None:
    """Time rows with several numbers of threads, print a table, and write files.

    Args:
        rows: The rows.
        threads: The numbers of threads.
        seconds: The time for each row, runtime and number of threads.
        json: File for the results, or None.
        plot: File for the chart, or None.

    Raises:
        ValueError: If there is nothing to plot.
        OSError: If a file can't be written.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    probe = Probe()
    document: dict[str, Any] = {"version": VERSION, "setup": setup() | {"threads": list(threads)}, "rows": []}

    def measure_row(row: Row) -> None:
        document["rows"].append(measure(row, threads, seconds, probe))
        if json:
            files.write_json(document, json)

    def task(row: Row) -> Callable[[], None]:
        return lambda: measure_row(row)

    run_tasks([(f"{row.cell} {row.batch}×{row.time}×{row.hidden} {row.mode}", task(row)) for row in rows])
    _print_report(console, document)
    if plot:
        draw(document, plot)


def measure(row: Row, threads: Sequence[int], seconds: float, probe: Probe) -> dict[str, Any]:
    """Time a row on our engine and on torch with several numbers of threads, in turn.

    Args:
        row: The row.
        threads: The numbers of threads.
        seconds: The time for each runtime and number of threads.
        probe: It notices other work on the processors.

    Returns:
        The sizes of the row and these keys: ``runtimes`` has an entry for each runtime and number of threads,
        such as ``"unrolled, 2 threads"``, with its median ``seconds``, ``quartiles`` and ``calls``.
        ``speedups`` has for each runtime the time with the first number of threads divided by that with each
        number. ``disturbances`` says why the times are not to be trusted. It is empty if they are.
    """
    checked: dict[str, dict[str, Any]] = {}
    calls = check_runtimes(row, {name: RUNTIMES[name] for name in (OURS, TORCH)}, checked)
    named = {_label(name, count): (call, count) for name, call in calls.items() for count in threads}
    before_threads = torch.get_num_threads()
    attempts: list[dict[str, Any]] = []
    for _ in range(ATTEMPTS):
        slowdown = probe.slowdown()
        try:
            timings = without_warnings(
                lambda: interleave(
                    {label: call for label, (call, _) in named.items()},
                    seconds,
                    before_block=lambda label: torch.set_num_threads(named[label][1]),
                )
            )
        finally:
            torch.set_num_threads(before_threads)
        entry: dict[str, Any] = {
            **asdict(row),
            "input": row.input,
            "runtimes": {label: asdict(timing) for label, timing in timings.items()},
            "share_of_limit": None,
        }
        entry["runtimes"] |= {name: one for name, one in checked.items() if "problem" in one}
        entry["speedups"] = {name: _speedups(entry["runtimes"], name, threads) for name in calls}
        entry["disturbances"] = disturbances(entry, max(slowdown, probe.slowdown()))
        attempts.append(entry)
        if not entry["disturbances"]:
            break
    return min(attempts, key=lambda one: len(one["disturbances"]))


def _label(name: str, count: int) -> str:
    return f"{name}, {count} thread{'' if count == 1 else 's'}"


def _speedups(runtimes: Mapping[str, Any], name: str, threads: Sequence[int]) -> list[float]:
    times = [runtimes[_label(name, count)]["seconds"] for count in threads]
    return [times[0] / one for one in times]


def _print_report(console: Console, document: dict[str, Any]) -> None:
    threads, rows = document["setup"]["threads"], document["rows"]
    console.print(format_setup(document["setup"] | {"threads": ", ".join(map(str, threads))}))
    console.print(_table(rows, threads))
    console.print(f"\n{_CAPTION}\n")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if max(threads) > cores:
        console.print(f"This process may use {cores} cores: more threads than that take turns.")
    for line in (*format_failures(rows), *format_disturbances(rows, "can't be trusted")):
        console.print(line)


def _table(rows: Sequence[dict[str, Any]], threads: Sequence[int]) -> Table:
    table = new_table("Time by number of threads")
    for heading in ("cell", "mode", "B×T×H", ""):
        table.add_column(heading, no_wrap=True)
    for count in threads:
        table.add_column(str(count), justify="right", no_wrap=True)
    for row in rows:
        mark = "?" if is_disturbed(row) else ""
        heads = [row["cell"], row["mode"], "×".join(str(row[name]) for name in ("batch", "time", "hidden"))]
        for name, speedups in row["speedups"].items():
            times = [format_time(row["runtimes"][_label(name, count)]["seconds"]) for count in threads]
            texts = [f"{one} {ratio:.2f}{mark}" for one, ratio in zip(times, speedups, strict=True)]
            table.add_row(*heads, "ours" if name == OURS else name, times[0], *texts[1:])
            heads = ["", "", ""]
    return table


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each cell and mode: the speedup over the smallest number of threads.

    Raises:
        ValueError: If nothing was timed.
        OSError: If the file can't be written.
    """
    from matplotlib.figure import Figure

    threads = document["setup"]["threads"]
    rows = [row for row in document["rows"] if OURS in row["speedups"]]
    panels = list(dict.fromkeys((row["cell"], row["mode"]) for row in rows))
    if not panels:
        raise ValueError("--plot: nothing was timed, so there is nothing to plot")
    columns = min(3, len(panels))
    figure = Figure((3.6 * columns, 3.2 * -(-len(panels) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False).flat
    for ax, panel in zip(axes, panels, strict=False):
        for row in (row for row in rows if (row["cell"], row["mode"]) == panel):
            sizes = f"{row['batch']}×{row['time']}×{row['hidden']}"
            [line] = ax.plot(threads, row["speedups"][OURS], "o-", label=sizes, markersize=4)
            if TORCH in row["speedups"]:
                ax.plot(threads, row["speedups"][TORCH], ":", color=line.get_color())
        ax.plot(threads, [count / threads[0] for count in threads], color="0.7", linewidth=0.8, zorder=0)
        ax.set(title=", ".join(panel), xlabel="threads", xticks=threads)
        ax.legend(fontsize=7, frameon=False)
    for ax in list(figure.axes)[len(panels) :]:
        ax.set_axis_off()
    figure.axes[0].set_ylabel(f"speedup over {threads[0]} (dotted: torch)")
    figure.savefig(path, dpi=120)

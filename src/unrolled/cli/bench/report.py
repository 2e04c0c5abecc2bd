"""Print the results as tables."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unrolled.cli.bench.results import is_disturbed
from unrolled.cli.bench.rows import MODES
from unrolled.cli.bench.runtimes import CHECKPOINT, FROZEN, OURS, TORCH

_MIB = 2**20
_CAPTION = (
    "Median time per call. B×T×H: batch size, sequence length, hidden size. ours: unrolled. ×torch and "
    "×best: speedup over torch and over the fastest other runtime (above 1: ours is faster). For custom "
    "cells, torch is a Python loop over the time steps. frozen: ours inside unrolled.frozen. limit: the "
    "speed as a percentage of the machine's limit. In inference, ×best and limit use the time of frozen, "
    "because the other runtimes also prepare their weights in advance. Streaming: T calls with one time "
    "step each; ours uses unrolled.Stream.\n"
)


def print_report(console: Console, document: dict[str, Any]) -> None:
    """Print the whole document: rows, means, memory, first use, failures and missing packages."""
    console.print(format_setup(document["setup"]))
    for mode in MODES:
        if any(row["mode"] == mode for row in document["rows"]):
            _print_table(console, _rows_table(document, mode))
    console.print(_CAPTION)
    if document["means"]:
        _print_table(console, _means_table(document["means"]))
    if document["memory"]:
        _print_table(console, _memory_table(document["memory"]))
    if document["first_use"]:
        _print_table(console, _first_use_table(document["first_use"]))
    for line in (*format_failures(document["rows"]), *format_disturbances(document["rows"])):
        console.print(line)
    if document["missing"]:
        console.print(format_missing(document["missing"]))


def format_limits(data: dict[str, float]) -> str:
    """Format the limits of the machine in one sentence."""
    cache, memory = (f"{data[f'{kind}_bytes_per_second'] / 1e9:.0f} GB/s" for kind in ("cache", "memory"))
    return (
        f"Limits of this machine: {data['operations_per_second'] / 1e9:.0f} GFLOP/s for matrix products; "
        f"weights are read at {cache} from cache ({data['cache_bytes'] / _MIB:.0f} MiB) and at {memory} "
        f"from memory ({data['memory_bytes'] / _MIB:.0f} MiB)."
    )


def format_missing(packages: list[str]) -> str:
    """Format the list of missing packages and the command that installs them."""
    names = ", ".join(packages)
    return f"Not installed, so not timed: {names}. To install: pip install {' '.join(packages)}"


def format_failures(rows: list[dict[str, Any]]) -> list[str]:
    """Format a line for each runtime that failed or disagreed, with the rows where it did.

    Rows that a runtime is known not to support aren't listed.
    """
    failures: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, entry in row["runtimes"].items():
            if "problem" in entry and not entry["unsupported"]:
                sizes = f"{row['batch']}×{row['time']}×{row['hidden']}"
                key = (row["cell"], row["mode"], f"{name} {entry['problem']}")
                failures.setdefault(key, []).append(sizes)
    return [
        f"{cell}, {mode}: {message} (batch × time × hidden: {', '.join(sizes)})"
        for (cell, mode, message), sizes in failures.items()
    ]


def format_disturbances(
    rows: list[dict[str, Any]], effect: str = "can't be trusted, and the means leave them out"
) -> list[str]:
    """Format the rows that are not to be trusted, a line for each, with the reasons."""
    disturbed = [row for row in rows if is_disturbed(row)]
    if not disturbed:
        return []
    count = f"{len(disturbed)} of {len(rows)} rows" if len(rows) > 1 else "The row"
    return [
        f"{count} marked with ? {effect}. Stop other programs, and run the benchmark again:",
        *(
            f"  {row['cell']} {row['batch']}×{row['time']}×{row['hidden']}, {row['mode']}: "
            f"{'; '.join(row['disturbances'])}"
            for row in disturbed
        ),
    ]


def _rows_table(document: dict[str, Any], mode: str) -> Table:
    table = new_table(mode.capitalize())
    table.add_column("cell", no_wrap=True)
    frozen = [FROZEN] if mode != "training" else []
    for heading in ("B×T×H", "ours", *frozen, "torch", "best other", "", "×torch", "×best", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        if row["mode"] != mode:
            continue
        times = {name: entry.get("seconds") for name, entry in row["runtimes"].items()}
        best, mark = row["best_other"], "?" if is_disturbed(row) else ""
        table.add_row(
            row["cell"],
            "×".join(str(row[name]) for name in ("batch", "time", "hidden")),
            format_time(times[OURS]),
            *(format_time(times.get(name)) for name in frozen),
            format_time(times[TORCH]),
            best or "–",
            format_time(times[best]) if best else "",
            _format_ratio(row["ratio_to_torch"], mark),
            _format_ratio(row["ratio_to_best_other"], mark),
            _format_percent(row["share_of_limit"]),
        )
    return table


def _means_table(means: list[dict[str, Any]]) -> Table:
    table = new_table("Geometric means")
    for heading in ("cell", "mode"):
        table.add_column(heading)
    for heading in ("rows", "× torch", "× best other"):
        table.add_column(heading, justify="right")
    for entry in means:
        ratios = _format_ratio(entry["ratio_to_torch"]), _format_ratio(entry["ratio_to_best_other"])
        table.add_row(entry["cell"], entry["mode"], str(entry["rows"]), *ratios)
    return table


def _memory_table(entries: list[dict[str, Any]]) -> Table:
    table = new_table("Peak memory of a training step")
    for heading in ("cell", "batch", "time", "hidden", "ours", "checkpointed", "torch", "ours / torch"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for entry in entries:
        ours, theirs = entry[f"{OURS}_bytes"], entry[f"{TORCH}_bytes"]
        ratio = f"{ours / theirs:.2f}" if ours and theirs else "–"
        sizes = [str(entry[name]) for name in ("cell", "batch", "time", "hidden")]
        checkpointed = entry.get(f"{CHECKPOINT}_bytes")
        table.add_row(*sizes, _format_mib(ours), _format_mib(checkpointed), _format_mib(theirs), ratio)
    return table


def _first_use_table(entries: list[dict[str, Any]]) -> Table:
    table = new_table("First call of a custom cell in training: compile time in seconds")
    for heading in ("cell", "time", "hidden", "runtime", "seconds"):
        table.add_column(heading, justify="right" if heading in ("time", "hidden", "seconds") else "left")
    for entry in entries:
        seconds = entry["seconds"]
        text = entry["problem"] if seconds is None else f"{seconds:.1f}"
        table.add_row(entry["cell"], str(entry["time"]), str(entry["hidden"]), entry["runtime"], text)
    return table


def new_table(title: str) -> Table:
    """Return an empty table in the style of the report."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)


def _print_table(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def format_setup(setup: dict[str, Any]) -> str:
    """Format the versions, the processor and the number of threads."""
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return f"\nunrolled {setup['unrolled']} on {setup['processor']}, {setup['threads']} threads; {versions}\n"


def format_time(seconds: float | None) -> str:
    """Format a time with three digits and its unit."""
    if seconds is None:
        return "–"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or name == "µs":
            return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:.0f} {name}"
    raise AssertionError(seconds)


def _format_ratio(value: float | None, mark: str = "") -> str:
    return "–" if value is None else f"{value:.2f}{mark}" if value < 10 else f"{value:.0f}{mark}"


def _format_percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _format_mib(size: int | None) -> str:
    return "–" if size is None else f"{size / _MIB:.0f} MiB"

"""The results as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unrolled.cli.bench.grid import MODES
from unrolled.cli.bench.peers import CHECKPOINT, FROZEN, OURS, TORCH

_MIB = 2**20
_CAPTION = (
    "Medians of a call on a batch of B sequences, T time steps, H hidden units. × torch, × best: how many "
    "times as long as ours torch and the best other runtime take; for a custom cell torch is a Python "
    "loop. limit: the share of what the machine allows that ours reaches. frozen: ours inside "
    "unrolled.frozen; the other runtimes take the weights before the call, so × best and limit are of that. "
    "Streaming: T calls of one step each, the states carried on (ours: unrolled.Stream).\n"
)


def say(console: Console, document: dict[str, Any]) -> None:
    """Print everything: the rows, the means, memory, first use, what disagreed, and what is missing."""
    console.print(_title(document["setup"]))
    for mode in MODES:
        if any(row["mode"] == mode for row in document["rows"]):
            _tabled(console, _rows(document, mode))
    console.print(_CAPTION)
    _tabled(console, _means(document["means"]))
    if document["memory"]:
        _tabled(console, _memory(document["memory"]))
    if document["first_use"]:
        _tabled(console, _first_use(document["first_use"]))
    for line in troubles(document["rows"]):
        console.print(line)
    if document["missing"]:
        console.print(missing(document["missing"]))


def limits(data: dict[str, float]) -> str:
    """The machine's limits in one line."""
    cache, memory = (f"{data[f'{place}_bytes_per_second'] / 1e9:.0f} GB/s" for place in ("cache", "memory"))
    return (
        f"This machine's limits: {data['operations_per_second'] / 1e9:.0f} GFLOP/s in a matrix product; "
        f"weights are read at {cache} from cache ({data['cache_bytes'] / _MIB:.0f} MiB) and {memory} "
        f"from memory ({data['memory_bytes'] / _MIB:.0f} MiB)."
    )


def missing(packages: list[str]) -> str:
    """Which packages are not installed, and how to get them."""
    get = f"pip install {' '.join(packages)}"
    return f"Not timed, for they are not installed: {', '.join(packages)}. To get them: {get}"


def troubles(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every runtime and trouble that kept it from being timed, but those known beforehand."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, entry in row["runtimes"].items():
            if "trouble" in entry and not entry["refused"]:
                place = f"{row['batch']}×{row['time']}×{row['hidden']}"
                found.setdefault((row["cell"], row["mode"], f"{name} {entry['trouble']}"), []).append(place)
    return [
        f"{cell}, {mode}: {words} (batch × time × hidden: {', '.join(places)})"
        for (cell, mode, words), places in found.items()
    ]


def _rows(document: dict[str, Any], mode: str) -> Table:
    table = _table(mode.capitalize())
    table.add_column("cell", no_wrap=True)
    frozen = [FROZEN] if mode != "training" else []
    for heading in ("B×T×H", "ours", *frozen, "torch", "best other", "", "×torch", "×best", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        if row["mode"] != mode:
            continue
        took = {name: entry.get("seconds") for name, entry in row["runtimes"].items()}
        best = row["best_other"]
        table.add_row(
            row["cell"],
            "×".join(str(row[name]) for name in ("batch", "time", "hidden")),
            _time(took[OURS]),
            *(_time(took.get(name)) for name in frozen),
            _time(took[TORCH]),
            best or "–",
            _time(took[best]) if best else "",
            _ratio(row["ratio_to_torch"]),
            _ratio(row["ratio_to_best_other"]),
            _share(row["share_of_limit"]),
        )
    return table


def _means(means: list[dict[str, Any]]) -> Table:
    table = _table("Geometric means")
    for heading in ("cell", "mode"):
        table.add_column(heading)
    for heading in ("rows", "× torch", "× best other"):
        table.add_column(heading, justify="right")
    for entry in means:
        ratios = _ratio(entry["ratio_to_torch"]), _ratio(entry["ratio_to_best_other"])
        table.add_row(entry["cell"], entry["mode"], str(entry["rows"]), *ratios)
    return table


def _memory(entries: list[dict[str, Any]]) -> Table:
    table = _table("Peak memory of a training step")
    for heading in ("cell", "batch", "time", "hidden", "ours", "in segments", "torch", "ours / torch"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for entry in entries:
        ours, theirs = entry[f"{OURS}_bytes"], entry[f"{TORCH}_bytes"]
        ratio = f"{ours / theirs:.2f}" if ours and theirs else "–"
        sizes = [str(entry[name]) for name in ("cell", "batch", "time", "hidden")]
        table.add_row(*sizes, _mib(ours), _mib(entry.get(f"{CHECKPOINT}_bytes")), _mib(theirs), ratio)
    return table


def _first_use(entries: list[dict[str, Any]]) -> Table:
    table = _table("First use of a custom cell, training: seconds until it is compiled")
    for heading in ("cell", "time", "hidden", "runtime", "seconds"):
        table.add_column(heading, justify="right" if heading in ("time", "hidden", "seconds") else "left")
    for entry in entries:
        seconds = entry["seconds"]
        shown = entry["trouble"] if seconds is None else f"{seconds:.1f}"
        table.add_row(entry["cell"], str(entry["time"]), str(entry["hidden"]), entry["runtime"], shown)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)


def _tabled(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _title(setup: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    return f"\nunrolled {setup['unrolled']} on {setup['processor']}, {setup['threads']} threads; {versions}\n"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or name == "µs":
            return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:.0f} {name}"
    raise AssertionError(seconds)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / _MIB:.0f} MiB"

"""Print the results of the benchmark on a GPU."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unrolled.cli.bench.gpu.contenders import CONTENDERS, OURS

_CAPTION = (
    "µs per time step, for batch size B and hidden size H. unrolled: engine auto, which runs cuDNN for the "
    "cells of torch.nn. kernels: our Triton kernels. ×best: speedup over the fastest of the others (above 1: "
    "unrolled is faster). MiB: memory that a training step of unrolled allocates. others: the least of them."
)


def format_setup(setup: dict[str, Any]) -> str:
    """Format the device and the versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    device = setup.get("name", setup["device"])
    if "capability" in setup:
        device += f" (compute capability {setup['capability']}, CUDA {setup['cuda']}, cuDNN {setup['cudnn']})"
    return f"unrolled {setup['unrolled']} on {device}; {versions}"


def count_failures(document: dict[str, Any]) -> int:
    """Return how many comparisons, checks and first calls failed."""
    return len(_failures(document))


def _failures(document: dict[str, Any]) -> list[str]:
    lines = []
    for entry in document["parity_tasks"]:
        strategy = f", {entry['strategy']}" if entry["strategy"] else ""
        name = f"{entry['cell']}, {entry['kind']}, {entry['hidden']} units{strategy}"
        if "problem" in entry:
            lines.append(f"{name}: {entry['problem']}")
        elif not entry["agrees"]:
            value = entry["difference"]
            amount = "has NaN" if value is None else f"differs from the reference engine by {value:.1e}"
            lines.append(f"{name}: {amount}")
    lines += [f"{one['check']}: {one['problem']}" for one in document["check_tasks"] if "problem" in one]
    for entry in document["row_tasks"]:
        if "problem" in entry:
            lines.append(
                f"first call of {entry['cell']} {entry['hidden']}, {entry['mode']}: {entry['problem']}"
            )
    return lines


def print_checks(console: Console, document: dict[str, Any]) -> None:
    """Print the number of passed comparisons and checks, the largest differences, and all failures."""
    compared = document["parity_tasks"]
    agreeing = [entry for entry in compared if entry.get("agrees")]
    console.print(f"{len(agreeing)} of {len(compared)} comparisons with the reference engine agree.")
    for kind in dict.fromkeys(entry["kind"] for entry in agreeing):
        largest = max(entry["difference"] for entry in agreeing if entry["kind"] == kind)
        console.print(f"  {kind}: largest relative difference {largest:.1e}")
    passed = sum("problem" not in entry for entry in document["check_tasks"])
    console.print(f"{passed} of {len(document['check_tasks'])} checks pass.")
    for line in _failures(document):
        console.print(f"Failed: {line}")


def print_rows(console: Console, document: dict[str, Any]) -> None:
    """Print a table for each mode, the failures, and the number of skipped rows."""
    for mode in dict.fromkeys(row["mode"] for row in document["rows"]):
        console.print(_table([row for row in document["rows"] if row["mode"] == mode], mode))
    console.print(_CAPTION)
    for row in document["rows"]:
        for name, entry in row["contenders"].items():
            if "problem" in entry and not entry["unsupported"]:
                sizes = f"{row['cell']} B={row['batch']} H={row['hidden']}, {row['mode']}"
                console.print(f"{sizes}: {name}: {entry['problem']}")
    if document["left_out"]:
        console.print(f"{len(document['left_out'])} rows skipped (time limit). Raise --minutes to run them.")


def _table(rows: list[dict[str, Any]], mode: str) -> Table:
    names = [
        name
        for name in CONTENDERS
        if any("seconds" in row["contenders"][name] for row in rows if name in row["contenders"])
    ]
    table = Table(title=mode.capitalize(), title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("cell", no_wrap=True)
    memory = ["MiB", "others"] if mode == "training" else []
    for heading in ("B", "H", *names, "×best", *memory):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda one: (one["cell"], one["hidden"], one["batch"])):
        entries = row["contenders"]
        times = [entries.get(name, {}).get("us_per_step") for name in names]
        cells = ["–" if value is None else f"{value:.3g}" for value in times]
        best = min((ratio for name, ratio in row["ratios"].items() if name != "kernels"), default=None)
        cells.append("–" if best is None else f"{best:.2f}")
        if memory:
            ours = entries.get(OURS, {}).get("bytes")
            others = [
                entry["bytes"] for name, entry in entries.items() if name != OURS and entry.get("bytes")
            ]
            cells += [_mib(ours), _mib(min(others, default=None))]
        table.add_row(row["cell"], str(row["batch"]), str(row["hidden"]), *cells)
    return table


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f}"

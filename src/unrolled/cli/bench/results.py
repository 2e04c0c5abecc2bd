"""The results as one JSON document: create it, resume it, and compute means from its rows."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unrolled._version import __version__
from unrolled.cli.bench.rows import MODES, Row
from unrolled.cli.bench.runtimes import versions

VERSION = 1
_RATIOS = ("ratio_to_torch", "ratio_to_best_other")
_SETUP_KEYS = ("machine", "processor", "threads", "unrolled", "versions")  # must match to resume a run


def new_document(limits: dict[str, float], missing: list[str]) -> dict[str, Any]:
    """Create a document without rows. Its keys contain the units.

    Args:
        limits: The limits of the machine, as data.
        missing: The packages that aren't installed.
    """
    return {
        "version": VERSION,
        "setup": setup(),
        "limits": limits,
        "missing": missing,
        "rows": [],
        "means": [],
        "memory": [],
        "first_use": [],
    }


def setup() -> dict[str, Any]:
    """Describe what the results depend on: machine, threads, versions and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "unrolled": __version__,
        "versions": versions(),
    }


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Load the rows of an interrupted run; an empty list if the file doesn't exist.

    Raises:
        ValueError: If the file isn't a document of ``unrolled bench``, or was written with another setup.
    """
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text())
        saved_setup, rows = document["setup"], document["rows"]
        version = document["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a result file of unrolled bench") from None
    current = setup()
    for name in _SETUP_KEYS if version == VERSION else ("version",):
        if saved_setup.get(name) != current.get(name):
            raise ValueError(
                f"{path} can't be resumed: {name} was {saved_setup.get(name)}, but is now {current.get(name)}"
            )
    return list(rows)


def contains(rows: Iterable[dict[str, Any]], row: Row) -> bool:
    """Return whether the results have an entry for a row."""
    return any(asdict(row).items() <= entry.items() for entry in rows)


def is_disturbed(row: dict[str, Any]) -> bool:
    """Whether something disturbed a row, so that its times are not to be trusted."""
    return bool(row.get("disturbances"))


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute the geometric means of the ratios over the undisturbed rows of each cell and mode."""
    entries, rows = [], [row for row in rows if not is_disturbed(row)]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        for mode in MODES:
            matching = [row for row in rows if (row["cell"], row["mode"]) == (cell, mode)]
            entry: dict[str, Any] = {"cell": cell, "mode": mode, "rows": len(matching)}
            for name in _RATIOS:
                values = [row[name] for row in matching if row[name]]
                entry[name] = statistics.geometric_mean(values) if values else None
            if matching:
                entries.append(entry)
    return entries


def _processor() -> str:
    """Return the name of the processor, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

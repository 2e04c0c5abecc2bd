"""The results as one JSON document, written after every row, and what is computed from its rows."""

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
from unrolled.cli.bench.grid import MODES, Row
from unrolled.cli.bench.peers import versions

VERSION = 1
_RATIOS = ("ratio_to_torch", "ratio_to_best_other")
_SAME = ("machine", "processor", "threads", "unrolled", "versions")  # of a run that can be continued


def start(limits: dict[str, float], missing: list[str]) -> dict[str, Any]:
    """A document without rows. Its keys carry their units.

    Args:
        limits: of the machine, as data.
        missing: packages that are not installed.
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
    """What the figures hang on: the machine, the threads, the versions, and the day."""
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


def resumed(path: Path) -> list[dict[str, Any]]:
    """The rows of a document that a run with this set-up has begun; none where there is no file.

    Raises:
        ValueError: the file is no such document, or its set-up differs.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        before, rows = found["setup"], found["rows"]
        version = found["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no results of unrolled bench") from None
    now = setup()
    for name in _SAME if version == VERSION else ("version",):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} can't be continued: its {name} was {before.get(name)}, not {now.get(name)}"
            )
    return list(rows)


def done(rows: Iterable[dict[str, Any]], row: Row) -> bool:
    """Whether a row is among these."""
    return any(asdict(row).items() <= entry.items() for entry in rows)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The geometric means of the ratios, for each cell and mode, with the number of rows behind each."""
    found = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        for mode in MODES:
            these = [row for row in rows if (row["cell"], row["mode"]) == (cell, mode)]
            entry: dict[str, Any] = {"cell": cell, "mode": mode, "rows": len(these)}
            for name in _RATIOS:
                values = [row[name] for row in these if row[name]]
                entry[name] = statistics.geometric_mean(values) if values else None
            if these:
                found.append(entry)
    return found


def _processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

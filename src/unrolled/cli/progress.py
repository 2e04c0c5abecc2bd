"""A progress bar for tasks that take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Task = tuple[str, Callable[[], object]]
"""A label and a function to call."""


def run_tasks(tasks: Iterable[Task]) -> None:
    """Call the functions in order. In a terminal, show a bar with the label of the one that runs."""
    tasks = list(tasks)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(tasks))
        for label, task in tasks:
            progress.update(bar, description=label)
            progress.refresh()
            task()
            progress.advance(bar)

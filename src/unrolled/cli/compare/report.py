"""The results: as data, and as tables in the terminal."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unrolled.cli.compare.runs import VERSION, VERSIONS, Run

_NEAR = 0.05  # of the budget: how far away parameters may be without being told


def document(runs: list[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    """Everything as one JSON document.

    Args:
        runs: each with what is kept of it.
    """
    tasks = []
    for name, one in {run.name: run for run, _ in runs}.items():
        words, value = one.task.baseline
        tasks.append(
            {
                "task": name,
                "length": one.length,
                "steps": one.budget.steps,
                "budget": one.budget.parameters,
                "measure": one.task.measure,
                "higher_is_better": one.task.higher,
                "baseline": {"name": words, "score": value},
                "cells": _cells([kept for run, kept in runs if run.name == name], one.task.higher),
            }
        )
    return {
        "version": VERSION,
        "versions": VERSIONS,
        "tasks": tasks,
        "runs": [kept for _, kept in runs],
    }


def _cells(runs: list[dict[str, Any]], higher: bool) -> list[dict[str, Any]]:
    """The cells of one task, the best first: the median of the scores and their spread over seeds."""
    found = []
    for name in dict.fromkeys(run["cell"] for run in runs):
        these = [run for run in runs if run["cell"] == name]
        worst = float("-inf") if higher else float("inf")  # a run that diverged
        scores = sorted((worst if run["score"] is None else run["score"] for run in these), reverse=higher)
        best, middle, last = scores[0], statistics.median(scores), scores[-1]
        finite = {"best": best, "median": middle, "worst": last}
        found.append(
            {
                "cell": name,
                "units": these[0]["units"],
                "parameters": these[0]["parameters"],
                "seeds": len(these),
                "diverged": sum(run["score"] is None for run in these),
                **{word: value if abs(value) != float("inf") else None for word, value in finite.items()},
            }
        )

    def place(entry: dict[str, Any]) -> tuple[bool, float]:
        median = entry["median"]
        return median is None, 0.0 if median is None else -median if higher else median

    return sorted(found, key=place)


def say(console: Console, data: dict[str, Any]) -> None:
    """Print a table for each task, and what is to be known of it."""
    for task in data["tasks"]:
        console.print(_table(task))
        for entry in task["cells"]:
            away = entry["parameters"] / task["budget"] - 1
            if abs(away) > _NEAR:
                console.print(
                    f"{entry['cell']} has {abs(away):.0%} {'more' if away > 0 else 'fewer'} parameters."
                )
            if entry["diverged"]:
                some = f"{entry['diverged']} of {entry['seeds']} seeds"
                console.print(f"{entry['cell']} diverged with {some}: try a lower --rate.")
        console.print()


def _table(task: dict[str, Any]) -> Table:
    order = "higher" if task["higher_is_better"] else "lower"
    what = f"{task['task']}, length {task['length']}, {task['steps']} steps"
    title = f"{what}: {task['measure']}, {order} is better"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("cell")
    for heading in ("units", "parameters", "seeds", "median", "best", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in task["cells"]:
        sizes = (str(entry[name]) for name in ("units", "parameters", "seeds"))
        table.add_row(entry["cell"], *sizes, *(_number(entry[name]) for name in ("median", "best", "worst")))
    baseline = task["baseline"]
    table.add_row(baseline["name"], "", "", "", _number(baseline["score"]), "", "", style="dim")
    return table


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3g}"

"""Collect the results as data, and print them as tables."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unrolled.cli.compare.runs import VERSION, VERSIONS, Run

_TOLERANCE = 0.05  # relative deviation from the parameter budget that gets no note


def document(runs: list[tuple[Run, dict[str, Any]]]) -> dict[str, Any]:
    """Return all results as one JSON document.

    Args:
        runs: The runs, each with its stored settings and result.
    """
    tasks = []
    for name, run in {run.task_name: run for run, _ in runs}.items():
        baseline, baseline_score = run.task.baseline
        higher = run.task.higher_is_better
        tasks.append(
            {
                "task": name,
                "length": run.length,
                "steps": run.budget.steps,
                "budget": run.budget.parameters,
                "measure": run.task.measure,
                "higher_is_better": higher,
                "baseline": {"name": baseline, "score": baseline_score},
                "cells": _rank_cells([stored for other, stored in runs if other.task_name == name], higher),
            }
        )
    return {
        "version": VERSION,
        "versions": VERSIONS,
        "tasks": tasks,
        "runs": [stored for _, stored in runs],
    }


def _rank_cells(runs: list[dict[str, Any]], higher_is_better: bool) -> list[dict[str, Any]]:
    """Return an entry for each cell of a task, best median score first."""
    entries = []
    for name in dict.fromkeys(run["cell"] for run in runs):
        cell_runs = [run for run in runs if run["cell"] == name]
        diverged_score = float("-inf") if higher_is_better else float("inf")
        scores = sorted(
            (diverged_score if run["score"] is None else run["score"] for run in cell_runs),
            reverse=higher_is_better,
        )
        summary = {"best": scores[0], "median": statistics.median(scores), "worst": scores[-1]}
        entries.append(
            {
                "cell": name,
                "units": cell_runs[0]["units"],
                "parameters": cell_runs[0]["parameters"],
                "seeds": len(cell_runs),
                "diverged": sum(run["score"] is None for run in cell_runs),
                **{key: value if abs(value) != float("inf") else None for key, value in summary.items()},
            }
        )

    def sort_key(entry: dict[str, Any]) -> tuple[bool, float]:
        median = entry["median"]
        return median is None, 0.0 if median is None else -median if higher_is_better else median

    return sorted(entries, key=sort_key)


def print_report(console: Console, data: dict[str, Any]) -> None:
    """Print a table for each task, with notes on parameter counts and diverged runs."""
    for task in data["tasks"]:
        console.print(_task_table(task))
        for entry in task["cells"]:
            deviation = entry["parameters"] / task["budget"] - 1
            if abs(deviation) > _TOLERANCE:
                direction = "more" if deviation > 0 else "fewer"
                console.print(
                    f"{entry['cell']} has {abs(deviation):.0%} {direction} parameters than the budget."
                )
            if entry["diverged"]:
                seeds = f"{entry['diverged']} of {entry['seeds']} seeds"
                console.print(f"{entry['cell']} diverged for {seeds}. Try a lower --rate.")
        console.print()


def _task_table(task: dict[str, Any]) -> Table:
    order = "higher" if task["higher_is_better"] else "lower"
    setting = f"{task['task']}, length {task['length']}, {task['steps']} steps"
    title = f"{setting}: {task['measure']}, {order} is better"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("cell")
    for heading in ("units", "parameters", "seeds", "median", "best", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in task["cells"]:
        sizes = (str(entry[name]) for name in ("units", "parameters", "seeds"))
        scores = (_format_score(entry[name]) for name in ("median", "best", "worst"))
        table.add_row(entry["cell"], *sizes, *scores)
    baseline = task["baseline"]
    score = _format_score(baseline["score"])
    table.add_row(f"baseline: {baseline['name']}", "", "", "", score, "", "", style="dim")
    return table


def _format_score(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3g}"

"""The chart of the results: the score of each cell during training, with its range over seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_LINE = 4.8, 3.2, 0.18  # inches
_LOG_RATIO = 10  # use a logarithmic scale if the scores differ by more than this factor


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a line for the median over seeds of each cell, and a band from the best to the worst seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tasks = document["tasks"]
    cells = list(dict.fromkeys(run["cell"] for run in document["runs"]))
    use_turbo = len(cells) > 10  # tab10 has only ten colors
    colors = [
        colormaps["turbo"](k / len(cells)) if use_turbo else colormaps["tab10"](k) for k in range(len(cells))
    ]
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    legend_columns = min(len(cells), 3 * columns)
    legend_height = _LEGEND_LINE * -(-len(cells) // legend_columns)
    size = (_PANEL_WIDTH * columns, _PANEL_HEIGHT * rows + legend_height + 0.2)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, task in zip(axes, tasks, strict=False):
        for cell, color in zip(cells, colors, strict=False):
            runs = [run for run in document["runs"] if (run["task"], run["cell"]) == (task["task"], cell)]
            curves = [dict(run["curve"]) for run in runs]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            scores = [[curve[step] for curve in curves] for step in steps]
            ax.plot(steps, list(map(statistics.median, scores)), color=color, label=cell)
            ax.fill_between(
                steps, list(map(min, scores)), list(map(max, scores)), color=color, alpha=0.2, lw=0
            )
        baseline = task["baseline"]
        ax.axhline(baseline["score"], color="0.4", linestyle="--", linewidth=0.8)
        ax.annotate(
            baseline["name"], (1, baseline["score"]), xycoords=("axes fraction", "data"), xytext=(-2, 2),
            textcoords="offset points", ha="right", fontsize=7, color="0.4",
        )  # fmt: skip
        ax.set(title=f"{task['task']}, length {task['length']}", xlabel="step", ylabel=task["measure"])
        plotted = [score for line in ax.lines for score in np.asarray(line.get_ydata())]
        if min(plotted) > 0 and max(plotted) > _LOG_RATIO * min(plotted):
            ax.set_yscale("log")
    for ax in figure.axes[len(tasks) :]:
        ax.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=legend_columns, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=120)

"""The results as a picture: for each task the score while cells were trained, with its spread over seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _LINE = 4.8, 3.2, 0.18  # inches: of a panel, and of a line of the key
_FAR = 10  # times: scores so far apart are drawn on a logarithmic scale


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw for each cell the median over seeds as a line, from the best to the worst as a band."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tasks = document["tasks"]
    cells = list(dict.fromkeys(run["cell"] for run in document["runs"]))
    several = len(cells) > 10  # tab10 has so many
    shades = [
        colormaps["turbo"](k / len(cells)) if several else colormaps["tab10"](k) for k in range(len(cells))
    ]
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    abreast = min(len(cells), 3 * columns)
    key = _LINE * -(-len(cells) // abreast)
    figure = Figure((_WIDTH * columns, _HEIGHT * lines + key + 0.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for ax, task in zip(axes, tasks, strict=False):
        for cell, color in zip(cells, shades, strict=False):
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
        seen = [score for line in ax.lines for score in np.asarray(line.get_ydata())]
        if min(seen) > 0 and max(seen) > _FAR * min(seen):
            ax.set_yscale("log")
    for ax in figure.axes[len(tasks) :]:
        ax.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=abreast, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

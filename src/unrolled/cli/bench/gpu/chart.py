"""The chart of the results on a GPU: µs per time step by hidden size."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a panel for each cell, mode and batch size, with a line for each contender.

    Raises:
        ValueError: If nothing was timed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rows = document["rows"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    columns = list(dict.fromkeys((row["mode"], row["batch"]) for row in rows))
    if not cells:
        raise ValueError("--plot: no row was timed, so there is nothing to plot; raise --minutes")
    names = list(
        dict.fromkeys(name for row in rows for name, one in row["contenders"].items() if "seconds" in one)
    )
    figure = Figure((2.6 * len(columns) + 0.6, 2.3 * len(cells) + 0.8), layout="constrained")
    setup = document["setup"]
    figure.suptitle(f"µs per time step, {setup.get('name', setup['device'])}", fontsize=11)
    axes = figure.subplots(len(cells), len(columns), squeeze=False, sharex=True)
    for cell, line_of_axes in zip(cells, axes, strict=True):
        for (mode, batch), ax in zip(columns, line_of_axes, strict=True):
            chosen = [row for row in rows if (row["cell"], row["mode"], row["batch"]) == (cell, mode, batch)]
            if not chosen:
                ax.set_axis_off()
                continue
            chosen.sort(key=lambda row: int(row["hidden"]))
            for index, name in enumerate(names):
                points = [
                    (row["hidden"], row["contenders"][name]["us_per_step"])
                    for row in chosen
                    if "us_per_step" in row["contenders"].get(name, {})
                ]
                xs, ys = zip(*points, strict=True) if points else ((), ())
                ax.plot(xs, ys, "osD^vP*"[index % 7] + "-", label=name, markersize=4, linewidth=1)
            ax.set(xscale="log", yscale="log")
            ax.set_title(f"{cell}, {mode}, batch {batch}", fontsize=8)
            sizes = sorted({row["hidden"] for row in rows})
            ax.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_tick_params(labelsize=7)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

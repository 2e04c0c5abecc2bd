"""The chart of the results: for each row, the time of each runtime relative to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unrolled.cli.bench.runtimes import OURS

_ROW_WIDTH, _PANEL_HEIGHT = 0.32, 3.2  # inches


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a panel for each cell and mode, with a column for each row and a marker for each runtime."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in document["rows"] if "seconds" in row["runtimes"].get(OURS, {})]
    panels = list(dict.fromkeys((row["cell"], row["mode"]) for row in rows))
    if not panels:
        raise ValueError("--plot: nothing was timed, so there is nothing to plot")
    names = list(dict.fromkeys(name for row in rows for name in row["runtimes"] if name != OURS))
    widest = max(sum((row["cell"], row["mode"]) == panel for row in rows) for panel in panels)
    grid_rows = -(-len(panels) // 2)
    figure = Figure(
        (2 * max(3.5, _ROW_WIDTH * widest + 1), _PANEL_HEIGHT * grid_rows + 0.6), layout="constrained"
    )
    figure.suptitle("Time relative to ours (above 1: ours is faster)", fontsize=11)
    axes = figure.subplots(grid_rows, min(2, len(panels)), sharey=True, squeeze=False).flat
    for ax, panel in zip(axes, panels, strict=False):
        panel_rows = [row for row in rows if (row["cell"], row["mode"]) == panel]
        for index, name in enumerate(names):
            points = [
                (x, row["runtimes"][name]["seconds"] / row["runtimes"][OURS]["seconds"])
                for x, row in enumerate(panel_rows)
                if "seconds" in row["runtimes"].get(name, {})
            ]
            marker = "osD^vP*X"[index % 8]
            ax.plot(*zip(*points, strict=True) if points else ((), ()), marker, label=name, markersize=5)
        ax.axhline(1, color="0.4", linewidth=0.8)
        ax.set(yscale="log", title=", ".join(panel), xlabel="batch × time × hidden")
        labels = [f"{row['batch']}×{row['time']}×{row['hidden']}" for row in panel_rows]
        ax.set_xticks(range(len(panel_rows)), labels, rotation=90 if len(panel_rows) > 4 else 0, fontsize=7)
        ax.set_xlim(-0.5, len(panel_rows) - 0.5)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_tick_params(labelleft=True)
    for ax in figure.axes[len(panels) :]:
        ax.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

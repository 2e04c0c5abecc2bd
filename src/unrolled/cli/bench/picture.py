"""The results as a picture: for every row, how many times as long as ours each runtime takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unrolled.cli.bench.peers import OURS

_COLUMN, _PANEL = 0.32, 3.2  # inches: a row's place, a panel's height


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a panel for each cell and mode, a column for each row, and a mark for each runtime."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in document["rows"] if "seconds" in row["runtimes"].get(OURS, {})]
    panels = list(dict.fromkeys((row["cell"], row["mode"]) for row in rows))
    if not panels:
        raise ValueError("--plot: there is no row to draw")
    names = list(dict.fromkeys(name for row in rows for name in row["runtimes"] if name != OURS))
    widest = max(sum((row["cell"], row["mode"]) == panel for row in rows) for panel in panels)
    lines = -(-len(panels) // 2)
    figure = Figure((2 * max(3.5, _COLUMN * widest + 1), _PANEL * lines + 0.6), layout="constrained")
    figure.suptitle("How many times as long as ours: above 1 ours is faster", fontsize=11)
    axes = figure.subplots(lines, min(2, len(panels)), sharey=True, squeeze=False).flat
    for ax, panel in zip(axes, panels, strict=False):
        these = [row for row in rows if (row["cell"], row["mode"]) == panel]
        for place, name in enumerate(names):
            points = [
                (x, row["runtimes"][name]["seconds"] / row["runtimes"][OURS]["seconds"])
                for x, row in enumerate(these)
                if "seconds" in row["runtimes"].get(name, {})
            ]
            marker = "osD^vP*X"[place % 8]
            ax.plot(*zip(*points, strict=True) if points else ((), ()), marker, label=name, markersize=5)
        ax.axhline(1, color="0.4", linewidth=0.8)
        ax.set(yscale="log", title=", ".join(panel), xlabel="batch × time × hidden")
        labels = [f"{row['batch']}×{row['time']}×{row['hidden']}" for row in these]
        ax.set_xticks(range(len(these)), labels, rotation=90 if len(these) > 4 else 0, fontsize=7)
        ax.set_xlim(-0.5, len(these) - 0.5)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_tick_params(labelleft=True)
    for ax in figure.axes[len(panels) :]:
        ax.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

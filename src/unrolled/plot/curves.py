"""Quantities over time: heat maps of gates, and lines of states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import patches
from matplotlib.axes import Axes

from unrolled.describe import meanings
from unrolled.layer_trace import LayerTrace
from unrolled.plot.figures import (
    COLORS,
    GREY,
    NAN_COLOR,
    color_bar,
    color_norm,
    divide,
    heat_map,
    new_figure,
    reals,
    row_of,
    set_labels,
)
from unrolled.trace import Trace


def gates(trace: Trace | LayerTrace, names: Iterable[str] | None = None, batch: int = 0) -> Any:
    """Heat maps of quantities over time: a panel for each, a line for each unit, one scale for all.

    Args:
        trace: of the layer.
        names: the quantities; None: the states, and all others with a number for each hidden unit.
        batch: the row.

    Returns:
        The panels, an array of Axes.

    Raises:
        KeyError, IndexError: there is no such quantity or row.
        ValueError: ``names`` is empty.
    """
    part, batch, length = row_of(trace, batch)
    fit = [n for n in part.names if n in part.cell.state or part[n].shape[2:] == (part.cell.hidden,)]
    fit = [n for n in fit if not part[n].is_complex()]
    chosen = fit if names is None else [names] if isinstance(names, str) else list(names)
    if not chosen:
        raise ValueError("names is empty: there is no quantity to draw")
    grids = [reals(part[name][:length, batch].reshape(length, -1)).T for name in chosen]
    norm = color_norm(grids)
    tall = [min(1.6, 0.3 + 0.07 * max(5, len(grid))) for grid in grids]
    figure = new_figure(part, sum(tall) + 0.25 * len(tall) + 0.6)
    panels = figure.subplots(len(grids), sharex=True, squeeze=False, height_ratios=tall)[:, 0]
    for panel, name, grid in zip(panels, chosen, grids, strict=True):
        heat_map(panel, grid, norm)
        set_labels(panel, _titled(part, name), "time step" if panel is panels[-1] else "", "unit")
    color_bar(panels[0], norm, ax=list(panels), aspect=35)
    if not all(np.isfinite(grid).all() for grid in grids):
        key = [patches.Patch(color=NAN_COLOR, label="NaN or infinite")]
        figure.legend(handles=key, loc="outside lower left", fontsize=8, frameon=False)
    return panels


def states(trace: Trace | LayerTrace, batch: int = 0, ax: Axes | None = None) -> Axes:
    """The states over time: a line for each unit, up to eight of them.

    Args:
        trace: of the layer.
        batch: the row.
        ax: where to draw; None: a new figure. The panels of several states are its ``child_axes``.

    Raises:
        IndexError: there is no such row.
    """
    part, batch, length = row_of(trace, batch)
    names = list(part.cell.state)
    ax = ax or new_figure(part, 0.8 + 1.7 * len(names)).add_subplot()
    for name, panel in zip(names, divide(ax, len(names), 1.2), strict=True):
        values = reals(part[name][:length, batch].reshape(length, -1))
        panel.axhline(0, color=GREY, linewidth=0.6)
        for unit, color in enumerate(COLORS[: values.shape[1]]):
            style = "o-" if length <= 30 else "-"
            panel.plot(values[:, unit], style, color=color, markersize=3.5, label=f"unit {unit}")
        most = f" (the first {len(COLORS)} of {values.shape[1]} units)" * (values.shape[1] > len(COLORS))
        set_labels(panel, _titled(part, name) + most, "time step" if name == names[-1] else "")
        panel.tick_params(labelbottom=name == names[-1])
        panel.set_xlim(-0.5, length - 0.5)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1.05), frameon=False, fontsize=8, labelspacing=0.3)
    return ax


def _titled(part: LayerTrace, name: str) -> str:
    """The name of a quantity and what the docstring of its cell says of it."""
    return " – ".join(filter(None, (name, meanings(type(part.cell)).get(name))))

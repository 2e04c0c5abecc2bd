"""Plots over time: heat maps of quantities, curves of states, and the gradient through time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import patches
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from unrolled.cells.descriptions import quantity_descriptions
from unrolled.plot.figures import (
    COLORS,
    GRAY,
    LEGEND_STYLE,
    NAN_COLOR,
    NOT_FINITE,
    check_axes,
    color_norm,
    draw_color_bar,
    draw_heat_map,
    get_axes,
    select_row,
    set_labels,
    size_in_inches,
    split_axes,
    to_numpy,
)
from unrolled.tracing.color_scales import color_ranges
from unrolled.tracing.gradient_flow import GradientFlow, gradient_flow, spectral_radii
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^Dv*P"  # with the colors, 56 combinations
_DEFAULT_WIDTH = 7.1  # inches of a new figure without its y-axis labels
_LETTER_WIDTH = 0.061  # inches at font size 8
_MAX_MARKED_STEPS = 30  # longer sequences don't have a marker at every step
_BAND_HEIGHT = 0.045  # of a row of markers outside of the logarithmic scale, relative to the panel


def gates(
    trace: Trace | LayerTrace,
    names: str | Iterable[str] | None = None,
    batch: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw heat maps of quantities over time: a panel for each quantity, a line for each unit.

    All panels share one color scale. A quantity with much larger values, such as a growing cell state, has
    its own scale, as its title says.

    Args:
        trace: A trace or one of its layers.
        names: One or more quantities. The default is the states and all quantities with one value per unit.
        batch: The row of the batch.
        ax: Where to draw. The default is a new figure. Several panels are the first of its ``child_axes``.

    Raises:
        KeyError, IndexError: If there is no such quantity or row.
        ValueError: If ``names`` is empty or a quantity is complex.
    """
    part, batch, length = select_row(trace, batch)
    selected = _select_names(part, names)
    grids = [to_numpy(part[name][:length, batch].reshape(length, -1)).T for name in selected]
    _, own_ranges = color_ranges([part], length, batch)
    shared = [grid for name, grid in zip(selected, grids, strict=True) if name not in own_ranges] or grids
    shared_norm = color_norm(shared)
    heights = [min(1.6, 0.3 + 0.07 * max(5, len(grid))) for grid in grids]
    ax = get_axes(ax, part, sum(heights) + 0.35 * len(heights) + 0.5, batch)
    panels = split_axes(ax, heights, 0.3)
    for panel, name, grid in zip(panels, selected, grids, strict=True):
        own_norm = None if any(grid is other for other in shared) else color_norm([grid])
        note = draw_heat_map(panel, grid, own_norm or shared_norm)
        note += f" (own color scale: ±{own_norm.vmax:.3g})" if own_norm else ""
        _format_time_axis(panel, _panel_title(part, name) + note, length, panel is panels[-1], y="unit")
    draw_color_bar(ax.inset_axes((1.02, 0, 0.02, 1)), shared_norm, grids)
    return ax


def states(trace: Trace | LayerTrace, batch: int = 0, ax: Axes | None = None) -> Axes:
    """Draw the states over time: a line for each of the first eight units, and the range of all units.

    Args:
        trace: A trace or one of its layers.
        batch: The row of the batch.
        ax: Where to draw. The default is a new figure. The panels of several states are its ``child_axes``.

    Raises:
        IndexError: If there is no such row.
        ValueError: If a state is complex.
    """
    part, batch, length = select_row(trace, batch)
    names = list(part.cell.state)
    ax = get_axes(ax, part, 0.8 + 1.7 * len(names), batch)
    for name, panel in zip(names, split_axes(ax, [1] * len(names), 0.28), strict=True):
        values = to_numpy(part[name][:length, batch].reshape(length, -1))
        panel.axhline(0, color=GRAY, linewidth=0.6)
        for unit, color in enumerate(COLORS[: values.shape[1]]):
            style = "o-" if length <= _MAX_MARKED_STEPS else "-"
            panel.plot(values[:, unit], style, color=color, markersize=3.5, label=f"unit {unit}")
        if values.shape[1] > len(COLORS):
            limits = values.min(1), values.max(1)
            label = f"range of all {values.shape[1]} units"
            panel.fill_between(range(length), *limits, color=GRAY, alpha=0.25, linewidth=0, label=label)
        (not_finite,) = np.nonzero(~np.isfinite(values).all(1))
        if len(not_finite):
            _mark_steps(panel, not_finite, 1, NOT_FINITE, color=GRAY, marker="s", markerfacecolor=NAN_COLOR)
        _format_time_axis(panel, _panel_title(part, name), length, name == names[-1])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(bbox_to_anchor=(1, 1.05), **LEGEND_STYLE)
    return ax


def gradient(
    trace: Trace | LayerTrace,
    names: str | Iterable[str] | None = None,
    batch: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the norm of ∂loss/∂quantity at every step, on a logarithmic axis.

    Norms that are exactly 0, NaN or infinite are marked below and above the logarithmic scale. The text below
    the plot describes how the gradient of each state changes through time, and gives the spectral radius of
    the recurrent weights.

    Args:
        trace: A trace or one of its layers, after :meth:`unrolled.Trace.backward`.
        names: One or more quantities. The default is the states and all quantities with one value per unit.
        batch: The row of the batch.
        ax: Where to draw. The default is a new figure.

    Raises:
        KeyError, IndexError: If there is no such quantity or row.
        ValueError: If ``names`` is empty, or ``backward`` was not called.
    """
    part, batch, length = select_row(trace, batch)
    flows = [gradient_flow(part, name, batch) for name in _select_names(part, names)]
    norms = np.array([flow.norms for flow in flows])
    is_zero, not_finite = norms == 0, ~np.isfinite(norms)
    facts = _gradient_facts(part, flows)
    letters_per_line = (_DEFAULT_WIDTH if ax is None else size_in_inches(check_axes(ax))[0]) / _LETTER_WIDTH
    ax = get_axes(ax, part, 3.8 + 0.25 * len(facts), batch)
    zero_rows, not_finite_rows = _set_log_scale(ax, norms, is_zero.any(1).sum(), not_finite.any(1).sum())
    for index, flow in enumerate(flows):
        color, marker = COLORS[index % len(COLORS)], _MARKERS[index % len(_MARKERS)]
        is_state = flow.name in part.cell.state
        (line,) = ax.plot(
            np.where(is_zero | not_finite, np.nan, norms)[index],
            linestyle=_DASHES[index % len(_DASHES)],
            color=color,
            linewidth=1.8 if is_state else 1.1,
            marker=marker,
            markersize=4,
            # matplotlib leaves labels that start with an underscore out of the legend
            label=" " * flow.name.startswith("_")
            + flow.name
            + ("" if flow.factor is None else f"  ×{flow.factor:.3g}"),
        )
        if length > _MAX_MARKED_STEPS:  # at different steps for each line, to tell overlapping lines apart
            line.set_markevery((index * length // (15 * len(flows)), length // 15))
        style: dict[str, Any] = {"color": color, "marker": marker}
        if is_zero[index].any():
            steps = np.flatnonzero(is_zero[index])
            _mark_steps(ax, steps, zero_rows.pop(), None, markerfacecolor="white", **style)
        if not_finite[index].any():
            steps = np.flatnonzero(not_finite[index])
            _mark_steps(ax, steps, not_finite_rows.pop(), None, markerfacecolor=NAN_COLOR, **style)
    arrow = "←" if part.direction == "forward" else "→"
    _format_time_axis(ax, "gradient through time", length, is_last=True, y="‖∂loss/∂quantity‖")
    ax.set_xlabel(f"time step (the gradient flows {arrow})")
    ax.tick_params(which="minor", labelsize=7)
    handles = ax.get_legend_handles_labels()[0]
    for present, face, label in ((is_zero, "white", "exactly 0"), (not_finite, NAN_COLOR, NOT_FINITE)):
        if present.any():
            handles.append(_markers([], [], label, color=GRAY, marker="o", markerfacecolor=face))
    title = "factor per step back" if any(flow.factor for flow in flows) else None
    ax.legend(handles=handles, bbox_to_anchor=(1, 1.03), title=title, title_fontsize=8, **LEGEND_STYLE)
    lines = [line for fact in facts for line in _wrap_evenly(fact, max(30, round(letters_per_line)))]
    caption = ax.annotate("\n".join(lines), (0, 0), (0, -38), "axes fraction", "offset points", va="top")
    caption.set(fontsize=8, linespacing=1.3)
    return ax


class _BoundedLogLocator(LogLocator):
    """Ticks of a logarithmic axis, only between two values."""

    def __init__(self, low: float, high: float, **options: Any) -> None:
        super().__init__(**options)
        self._bounds = low, high  # as powers of ten

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Return the positions of the ticks."""
        with np.errstate(over="ignore", divide="ignore"):  # ticks outside of the range of float64
            ticks = np.asarray(super().tick_values(vmin, vmax))
            logs = np.log10(ticks)
        return ticks[(self._bounds[0] <= logs) & (logs <= self._bounds[1]) & np.isfinite(logs)]


def _select_names(part: LayerTrace, names: str | Iterable[str] | None) -> list[str]:
    """Return the quantities to draw as a list, by default the states and those with one value per unit."""
    if names is not None and not isinstance(names, Iterable):
        raise TypeError(f"names should be the name of a quantity or an iterable of names, got {names!r}")
    default = [n for n in part.names if n in part.cell.state or part[n].shape[2:] == (part.cell.hidden,)]
    default = [n for n in default if not part[n].is_complex()]
    selected = default if names is None else [names] if isinstance(names, str) else list(names)
    if not selected:
        raise ValueError("names is empty: pass at least one quantity")
    return selected


def _panel_title(part: LayerTrace, name: str) -> str:
    """Return the name of a quantity with its description from the cell's docstring."""
    return " – ".join(filter(None, (name, quantity_descriptions(type(part.cell)).get(name))))


def _format_time_axis(panel: Axes, title: str, length: int, is_last: bool, y: str = "") -> None:
    set_labels(panel, title, "time step" if is_last else "", y)
    panel.tick_params(labelbottom=is_last)
    panel.set_xlim(-0.5, length - 0.5)


def _gradient_facts(part: LayerTrace, flows: list[GradientFlow]) -> list[str]:
    """Return sentences about the gradients of the states, and the spectral radii of the weights."""
    facts = [flow.summary for flow in flows if flow.name in part.cell.state] or [f.summary for f in flows]
    radii = spectral_radii(part.cell)
    if radii:
        numbers = ", ".join(f"{name} {radius:.3g}" for name, radius in radii.items())
        facts.append(f"spectral {'radii' if len(radii) > 1 else 'radius'}: {numbers}")
    return facts


def _wrap_evenly(text: str, width: int) -> list[str]:
    """Wrap text into lines of about the same length, so that the last line isn't a single word."""
    lines = textwrap.wrap(text, width, subsequent_indent="    ")
    while True:
        width -= 1
        narrower = textwrap.wrap(text, width, subsequent_indent="    ")
        if len(narrower) != len(lines):
            return lines
        lines = narrower


def _set_log_scale(ax: Axes, norms: Any, zeros: int, not_finite: int) -> tuple[list[float], list[float]]:
    """Make the y-axis logarithmic, with bands below and above for values without a logarithm.

    Args:
        ax: The Axes.
        norms: All values.
        zeros: The number of rows of markers in the lower band.
        not_finite: The number of rows of markers in the upper band.

    Returns:
        The heights of the rows in the lower band and in the upper one, relative to the panel.
    """
    logs = np.log10(norms[(norms > 0) & np.isfinite(norms)])
    low, high = (logs.min(), logs.max()) if logs.size else (0.0, 0.0)
    middle, half_range = (low + high) / 2, max(high - low, 1) / 2
    row_height = min(_BAND_HEIGHT, 0.35 / max(zeros + not_finite, 1))
    below, above = (row_height * (count + 0.5) if count else 0.04 for count in (zeros, not_finite))
    axis_range = 2 * half_range / (1 - below - above)
    limits = middle - half_range - below * axis_range, middle + half_range + above * axis_range
    ax.set_yscale("log")
    ax.set_ylim(*(10.0 ** np.clip(limits, -323, 308)))
    tick_limits = (
        middle - half_range if zeros else limits[0],
        middle + half_range if not_finite else limits[1],
    )
    ax.yaxis.set_major_locator(_BoundedLogLocator(*tick_limits))
    ax.yaxis.set_minor_locator(_BoundedLogLocator(*tick_limits, subs="all"))
    if not logs.size:
        ax.set_yticks([])
        ax.set_yticks([], minor=True)
    for count, bottom, height in ((zeros, 0, below), (not_finite, 1 - above, above)):
        if count:
            band = patches.Rectangle((0, bottom), 1, height, transform=ax.transAxes)
            band.set(facecolor=GRAY, alpha=0.15, linewidth=0)
            ax.add_patch(band)
    rows = [row_height * (0.75 + index) for index in range(max(zeros, not_finite))]
    return rows[:zeros][::-1], [1 - row for row in rows[:not_finite]][::-1]


def _mark_steps(panel: Axes, steps: Any, height: float, label: str | None, **style: Any) -> None:
    """Mark steps at a height relative to the panel."""
    line = _markers(steps, [height] * len(steps), label, transform=panel.get_xaxis_transform(), **style)
    panel.add_artist(line)


def _markers(x: Any, y: Any, label: str | None, **style: Any) -> Line2D:
    return Line2D(x, y, linestyle="none", markersize=4.5, clip_on=False, label=label, **style)

"""Quantities over time: heat maps of gates, lines of states, and the gradient on its way back."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import patches
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from unrolled.equations.source import meanings
from unrolled.plot.figures import (
    COLORS,
    GREY,
    KEY,
    NAN_COLOR,
    NOT_FINITE,
    axes,
    checked,
    color_bar,
    color_norm,
    divide,
    heat_map,
    inches,
    reals,
    row_of,
    set_labels,
)
from unrolled.tracing.color_scales import ranges
from unrolled.tracing.gradient_flow import Flow, flow, spectral_radii
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^Dv*P"  # together with the colours no two alike up to 56
_WIDE, _LETTER = 7.1, 0.061  # inches: of a figure beside the names of its axis, and of a letter of size 8
_EVERY = 30  # steps up to which each has its marker
_BAND = 0.045  # height of a row of markers beside the logarithmic axis, of the whole


def gates(
    trace: Trace | LayerTrace,
    names: str | Iterable[str] | None = None,
    batch: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Heat maps of quantities over time: a panel for each, a line for each unit, one scale for all.

    A quantity that would leave the others pale, such as a cell state that grew, has a scale of its own, which
    its title says.

    Args:
        trace: of the layer.
        names: the quantities; None: the states, and all others with a number for each hidden unit.
        batch: the row.
        ax: where to draw; None: a new figure. Several panels are the first of its ``child_axes``.

    Raises:
        KeyError, IndexError: there is no such quantity or row.
        ValueError: ``names`` is empty, or a quantity is of complex numbers.
    """
    part, batch, length = row_of(trace, batch)
    chosen = _chosen(part, names)
    grids = [reals(part[name][:length, batch].reshape(length, -1)).T for name in chosen]
    _, apart = ranges([part], length, batch)
    shared = [grid for name, grid in zip(chosen, grids, strict=True) if name not in apart] or grids
    norm = color_norm(shared)
    tall = [min(1.6, 0.3 + 0.07 * max(5, len(grid))) for grid in grids]
    ax = axes(ax, part, sum(tall) + 0.35 * len(tall) + 0.5, batch)
    panels = divide(ax, tall, 0.3)
    for panel, name, grid in zip(panels, chosen, grids, strict=True):
        own = None if any(grid is one for one in shared) else color_norm([grid])
        note = heat_map(panel, grid, own or norm)
        note += f" (a scale of its own: ±{own.vmax:.3g})" if own else ""
        _over_time(panel, _titled(part, name) + note, length, last=panel is panels[-1], y="unit")
    color_bar(ax.inset_axes((1.02, 0, 0.02, 1)), norm, grids)
    return ax


def states(trace: Trace | LayerTrace, batch: int = 0, ax: Axes | None = None) -> Axes:
    """The states over time: a line for each unit, up to eight, and the range of all where there are more.

    Args:
        trace: of the layer.
        batch: the row.
        ax: where to draw; None: a new figure. The panels of several states are its ``child_axes``.

    Raises:
        IndexError: there is no such row.
        ValueError: a state is of complex numbers.
    """
    part, batch, length = row_of(trace, batch)
    names = list(part.cell.state)
    ax = axes(ax, part, 0.8 + 1.7 * len(names), batch)
    for name, panel in zip(names, divide(ax, [1] * len(names), 0.28), strict=True):
        values = reals(part[name][:length, batch].reshape(length, -1))
        panel.axhline(0, color=GREY, linewidth=0.6)
        for unit, color in enumerate(COLORS[: values.shape[1]]):
            style = "o-" if length <= _EVERY else "-"
            panel.plot(values[:, unit], style, color=color, markersize=3.5, label=f"unit {unit}")
        if values.shape[1] > len(COLORS):
            ends = values.min(1), values.max(1)
            whole = f"range of all {values.shape[1]}"
            panel.fill_between(range(length), *ends, color=GREY, alpha=0.25, linewidth=0, label=whole)
        (broken,) = np.nonzero(~np.isfinite(values).all(1))
        if len(broken):
            _beside(panel, broken, 1, NOT_FINITE, color=GREY, marker="s", markerfacecolor=NAN_COLOR)
        _over_time(panel, _titled(part, name), length, last=name == names[-1])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(bbox_to_anchor=(1, 1.05), **KEY)
    return ax


def gradient(
    trace: Trace | LayerTrace,
    names: str | Iterable[str] | None = None,
    batch: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """The gradient through time: the norm of ∂loss/∂quantity at every step, on a logarithmic axis.

    What is exactly 0, NaN or infinite has no place on that axis: it is marked below and above it. The lines
    below say what becomes of the gradient of each state on its way back, and what the weights from hidden
    state to hidden state do to it.

    Args:
        trace: of the layer, after :meth:`unrolled.Trace.backward`.
        names: the quantities; None: the states, and all others with a number for each hidden unit.
        batch: the row.
        ax: where to draw; None: a new figure.

    Raises:
        KeyError, IndexError: there is no such quantity or row.
        ValueError: ``names`` is empty, or there was no backward.
    """
    part, batch, length = row_of(trace, batch)
    flows = [flow(part, name, batch) for name in _chosen(part, names)]
    norms = np.array([found.norms for found in flows])
    zero, broken = norms == 0, ~np.isfinite(norms)
    facts = _facts(part, flows)
    room = (_WIDE if ax is None else inches(checked(ax))[0]) / _LETTER
    ax = axes(ax, part, 3.8 + 0.25 * len(facts), batch)
    low, high = _logarithmic(ax, norms, zero.any(1).sum(), broken.any(1).sum())
    for place, found in enumerate(flows):
        color, marker = COLORS[place % len(COLORS)], _MARKERS[place % len(_MARKERS)]
        is_state = found.name in part.cell.state
        (line,) = ax.plot(
            np.where(zero | broken, np.nan, norms)[place],
            linestyle=_DASHES[place % len(_DASHES)],
            color=color,
            linewidth=1.8 if is_state else 1.1,
            marker=marker,
            markersize=4,
            # of a label that begins with an underscore there would be no key
            label=" " * found.name.startswith("_")
            + found.name
            + ("" if found.factor is None else f"  ×{found.factor:.3g}"),
        )
        if length > _EVERY:  # in turn, so that lines upon each other stay apart
            line.set_markevery((place * length // (15 * len(flows)), length // 15))
        style: dict[str, Any] = {"color": color, "marker": marker}
        if zero[place].any():
            _beside(ax, np.flatnonzero(zero[place]), low.pop(), None, markerfacecolor="white", **style)
        if broken[place].any():
            _beside(ax, np.flatnonzero(broken[place]), high.pop(), None, markerfacecolor=NAN_COLOR, **style)
    arrow = "←" if part.direction == "forward" else "→"
    _over_time(ax, "gradient through time", length, last=True, y="‖∂loss/∂quantity‖")
    ax.set_xlabel(f"time step (the gradient goes back {arrow})")
    ax.tick_params(which="minor", labelsize=7)
    handles = ax.get_legend_handles_labels()[0]
    for there, face, words in ((zero, "white", "exactly 0"), (broken, NAN_COLOR, NOT_FINITE)):
        if there.any():
            handles.append(_marks([], [], words, color=GREY, marker="o", markerfacecolor=face))
    title = "factor a step back" if any(found.factor for found in flows) else None
    ax.legend(handles=handles, bbox_to_anchor=(1, 1.03), title=title, title_fontsize=8, **KEY)
    lines = [line for fact in facts for line in _wrapped(fact, max(30, round(room)))]
    below = ax.annotate("\n".join(lines), (0, 0), (0, -38), "axes fraction", "offset points", va="top")
    below.set(fontsize=8, linespacing=1.3)
    return ax


class _Within(LogLocator):
    """Ticks of a logarithmic axis within some part of it."""

    def __init__(self, least: float, most: float, **options: Any) -> None:
        super().__init__(**options)
        self._ends = least, most  # as powers of ten

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """The ticks."""
        with np.errstate(over="ignore", divide="ignore"):  # of ticks beyond those of float64
            ticks = np.asarray(super().tick_values(vmin, vmax))
            logs = np.log10(ticks)
        return ticks[(self._ends[0] <= logs) & (logs <= self._ends[1]) & np.isfinite(logs)]


def _chosen(part: LayerTrace, names: str | Iterable[str] | None) -> list[str]:
    fit = [n for n in part.names if n in part.cell.state or part[n].shape[2:] == (part.cell.hidden,)]
    fit = [n for n in fit if not part[n].is_complex()]
    if names is not None and not isinstance(names, Iterable):
        raise TypeError(f"names should be the names of quantities, got {names!r}")
    chosen = fit if names is None else [names] if isinstance(names, str) else list(names)
    if not chosen:
        raise ValueError("names is empty: there is no quantity to draw")
    return chosen


def _titled(part: LayerTrace, name: str) -> str:
    """The name of a quantity and what the docstring of its cell says of it."""
    return " – ".join(filter(None, (name, meanings(type(part.cell)).get(name))))


def _over_time(panel: Axes, title: str, length: int, last: bool, y: str = "") -> None:
    set_labels(panel, title, "time step" if last else "", y)
    panel.tick_params(labelbottom=last)
    panel.set_xlim(-0.5, length - 0.5)


def _facts(part: LayerTrace, flows: list[Flow]) -> list[str]:
    """What a picture of the gradient says in words."""
    said = [found.words for found in flows if found.name in part.cell.state] or [f.words for f in flows]
    for name, radii in spectral_radii(part.cell).items():
        several = f"radii of the {len(radii)} blocks of {name} are"
        which = several if len(radii) > 1 else f"radius of {name} is"
        said.append(f"the spectral {which} {', '.join(f'{radius:.3g}' for radius in radii)}")
    return said


def _wrapped(fact: str, letters: int) -> list[str]:
    """Lines of about the same length, so that no word stands alone in the last."""
    lines = textwrap.wrap(fact, letters, subsequent_indent="    ")
    while len(narrower := textwrap.wrap(fact, letters := letters - 1, subsequent_indent="    ")) == len(
        lines
    ):
        lines = narrower
    return lines


def _logarithmic(ax: Axes, norms: Any, zeros: int, broken: int) -> tuple[list[float], list[float]]:
    """Make the axis logarithmic, with rows beside its numbers; the heights of those below and above."""
    logs = np.log10(norms[(norms > 0) & np.isfinite(norms)])
    least, most = (logs.min(), logs.max()) if logs.size else (0.0, 0.0)
    middle, half = (least + most) / 2, max(most - least, 1) / 2
    band = min(_BAND, 0.35 / max(zeros + broken, 1))
    below, above = (band * (count + 0.5) if count else 0.04 for count in (zeros, broken))
    whole = 2 * half / (1 - below - above)
    ends = middle - half - below * whole, middle + half + above * whole
    ax.set_yscale("log")
    ax.set_ylim(*(10.0 ** np.clip(ends, -323, 308)))
    held = middle - half if zeros else ends[0], middle + half if broken else ends[1]
    ax.yaxis.set_major_locator(_Within(*held))
    ax.yaxis.set_minor_locator(_Within(*held, subs="all"))
    if not logs.size:
        ax.set_yticks([])
        ax.set_yticks([], minor=True)
    for count, bottom, share in ((zeros, 0, below), (broken, 1 - above, above)):
        if count:
            row = patches.Rectangle((0, bottom), 1, share, transform=ax.transAxes)
            row.set(facecolor=GREY, alpha=0.15, linewidth=0)
            ax.add_patch(row)
    rows = [band * (0.75 + place) for place in range(max(zeros, broken))]
    return rows[:zeros][::-1], [1 - row for row in rows[:broken]][::-1]


def _beside(panel: Axes, steps: Any, height: float, label: str | None, **style: Any) -> None:
    """Mark steps at a height, as a share of that of the panel."""
    line = _marks(steps, [height] * len(steps), label, transform=panel.get_xaxis_transform(), **style)
    panel.add_artist(line)


def _marks(x: Any, y: Any, label: str | None, **style: Any) -> Line2D:
    return Line2D(x, y, linestyle="none", markersize=4.5, clip_on=False, label=label, **style)

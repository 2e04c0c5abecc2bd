"""Pictures of a trace: the layer through time, its weights, its quantities and its states.

Every function takes a :class:`unrolled.Trace` (its lowest layer, forward) or one of its layers and
draws with matplotlib, on an Axes of yours or in a new figure. pyplot is left alone: no figure is
registered, no setting changed. ``plot.states(trace).figure``, last in a notebook's cell, shows it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from unrolled.describe import meanings
from unrolled.explain import number
from unrolled.layer_trace import LayerTrace, position
from unrolled.trace import Trace

try:
    from matplotlib import colormaps, patches
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'unrolled[plot]'") from error

NAN_COLOR = "#f0e442"  # of NaN and infinity: yellow, which the scale of the numbers doesn't hold
_SCALE = colormaps["RdBu_r"].with_extremes(bad=NAN_COLOR)  # ColorBrewer's, safe for the colour-blind
_INPUT, _GREY = "#0072b2", "#8a8a8a"
_COLORS = ("#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#777777")
_SMALL = 4  # numbers of a vector that are written out
_STEPS = 5  # steps of a sequence that are all drawn
_NODES = 8  # nodes in a column of the graph of a layer


class Picture(Figure):
    """A figure that a notebook shows, sharp, where it is the last value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=1.5 * 96, metadata={"Software": None})
        return png.getvalue(), {"width": width, "height": height}


def unrolled(
    trace: Trace | LayerTrace, steps: Iterable[int] | None = None, batch: int = 0, ax: Axes | None = None
) -> Axes:
    """The layer unrolled through time: a box for each step, an arrow for each thing that flows.

    The input goes up into the box, the states go on to the next step, the output leaves upwards.
    Vectors of a few numbers are written out.

    Args:
        trace: of the layer.
        steps: the time steps, negative from the end; None: all, shortened where there are many.
        batch: the row.
        ax: where to draw; None: a new figure.

    Raises:
        IndexError: there is no such row or step.
        ValueError: ``steps`` is empty.
    """
    part, batch, length = _row(trace, batch)
    shown, forward, cell = _shown(steps, length), part.direction == "forward", type(part.cell).__name__
    inputs = part.input[:length, batch].flatten(1)
    states = {name: part[name][:length, batch].flatten(1) for name in part.cell.state}
    starts = {name: state[batch].flatten() for name, state in part.initial_state.items()}
    output = next(iter(states))

    # all in inches: the boxes stand on y = 0, with a lane for each state
    lane = 0.55 + 0.15 * max(_text(start).count("\n") for start in starts.values())
    wide, tall = max(0.95, 0.11 * len(cell) + 0.2), max(0.75, lane * len(states))
    gap = 0.87 + 0.08 * max(map(len, states))
    lefts, end = list[float](), 0.1
    for step in shown:
        lefts.append(end + gap + (0.4 if step and step - 1 not in shown else 0))  # room for an ellipsis
        end = lefts[-1] + wide + (0 if step + 1 in shown else gap)
    end += 0.1 if shown[-1] == length - 1 else 0.5
    top, bottom = (1.05 + 0.15 * _text(values[0]).count("\n") for values in (states[output], inputs))
    heights = [tall - lane * place - 0.3 for place in range(len(states))]
    sheet = _Sheet.of(ax, part, end, -bottom, tall + top + 0.2)

    def flow(left: float, source: int) -> None:
        """The states after the step ``source``, in the gap that begins at ``left``."""
        initial, final = source in (-1, length), source == (length - 1 if forward else 0)
        for name, y, color in zip(states, heights, _COLORS * len(states), strict=False):
            ends = [(left + 0.04, y), (left + gap - 0.04, y)]
            sheet.arrow(ends[not forward], ends[forward], color)
            label = f"initial {name}" if initial else f"final {name}" if final else _at(name, source)
            sheet.write(left + gap / 2, y + 0.13, label, 9.5, color=color)
            if initial or name != output:  # whose numbers stand above the box
                values = starts[name] if initial else states[name][source]
                sheet.vector(left + gap / 2, y - 0.1, values, color)

    for step, left in zip(shown, lefts, strict=True):
        middle = left + wide / 2
        sheet.box(left, wide, tall)
        sheet.write(middle, tall / 2 + 0.11, cell, 11, weight="bold")
        sheet.write(middle, tall / 2 - 0.12, f"step {step}", 9)
        sheet.arrow((middle, -0.42), (middle, -0.03), _INPUT)
        sheet.write(middle, -0.54, _at("x", step), 9.5, color=_INPUT)
        sheet.vector(middle, -0.68, inputs[step], _INPUT)
        sheet.arrow((middle, tall + 0.03), (middle, tall + 0.42), _COLORS[0])
        sheet.write(middle, tall + 0.54, _at(output, step), 9.5, color=_COLORS[0])
        sheet.vector(middle, tall + 0.7, states[output][step], _COLORS[0], va="bottom")
        flow(left - gap, step - 1 if forward else step)
        if step + 1 not in shown:
            flow(left + wide, step if forward else step + 1)
        dots = [left - gap - 0.2] if step == shown[0] != 0 else []
        dots += [left + wide + gap + 0.2] if step + 1 not in (*shown, length) else []
        for x, y in itertools.product(dots, heights):
            sheet.write(x, y, "⋯", 14, color=_GREY)
    return sheet.ax


def layer(trace: Trace | LayerTrace, ax: Axes | None = None) -> Axes:
    """The weights of the layer: coloured edges from unit to unit, or heat maps of a larger layer.

    Every parameter with two axes is drawn: its columns are what it weighs and its rows what it
    computes, as in ``torch.nn.functional.linear``; one with the input along its rows is turned.

    Args:
        trace: of the layer.
        ax: where to draw; None: a new figure. Several heat maps are its ``child_axes``.

    Raises:
        ValueError: the cell has no parameter with two axes.
    """
    part = _part(trace)
    weights: dict[str, tuple[str, str, Any]] = {}  # from which units, to which, and the matrix
    for name, shape in part.cell.shapes().items():
        if len(shape) == 2:
            matrix, (rows, columns) = _numpy(getattr(part.cell, name)), _units(part, name)
            turned = rows == "input" != columns
            weights[name] = (rows, columns, matrix.T) if turned else (columns, rows, matrix)
    if not weights:
        raise ValueError(f"{type(part.cell).__name__} has no parameter with two axes: nothing to draw")
    norm = _norm(matrix for _, _, matrix in weights.values())
    left = _heights({source: matrix.shape[1] for source, _, matrix in weights.values()})
    right = _heights({target: matrix.shape[0] for _, target, matrix in weights.values()})
    parallel = len({(source, target) for source, target, _ in weights.values()}) < len(weights)
    if parallel or max(sum(map(len, column.values())) for column in (left, right)) > _NODES:
        ax = ax or _figure(part, 3.4).add_subplot()
        panels = _panels(ax, len(weights), 1.35, down=False)
        for panel, (name, (source, target, matrix)) in zip(panels, weights.items(), strict=True):
            _heat(panel, matrix, norm)
            _label(panel, name, source, target)
        _color_bar(ax, norm, cax=ax.inset_axes((1.03, 0, 0.02, 1)))
        return ax

    top = max(ys[0] for column in (left, right) for ys in column.values()) + 0.35
    sheet = _Sheet.of(ax, part, 6.4, -top, top + 0.3)
    ends, values = [], []
    for source, target, matrix in weights.values():
        for row, column in np.ndindex(matrix.shape):
            ends.append([(1.75, left[source][column]), (4.25, right[target][row])])
            values.append(matrix[row, column])
    widths = 1 + 3 * np.nan_to_num(np.abs(values) / norm.vmax, nan=1, posinf=1)
    # a wider grey line under each, because a weight near zero is as pale as the paper
    sheet.ax.add_collection(LineCollection(ends, colors=_GREY, linewidths=(widths + 0.5) * sheet.scale))
    lines = LineCollection(ends, array=values, cmap=_SCALE, norm=norm, linewidths=widths * sheet.scale)
    sheet.ax.add_collection(lines)
    for x, side, align, groups in ((1.6, -0.28, "right", left), (4.4, 0.28, "left", right)):
        for kind, ys in groups.items():
            color = _INPUT if kind == "input" else _COLORS[0]
            for unit, y in enumerate(ys):
                sheet.ax.add_patch(patches.Circle((x, y), 0.15, facecolor=(color, 0.13), edgecolor=color))
                sheet.write(x, y, str(unit), 7.5)
            names = [name for name, (source, _, _) in weights.items() if source == kind and side < 0]
            sheet.write(x + side, sum(ys) / len(ys), "\n".join([kind, *names]), 9, ha=align, color=color)
    place = sheet.ax.inset_axes((5.6, -0.8 * top, 0.12, 1.6 * top), transform=sheet.ax.transData)
    _color_bar(sheet.ax, norm, cax=place)
    return sheet.ax


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
    part, batch, length = _row(trace, batch)
    fit = [n for n in part.names if n in part.cell.state or part[n].shape[2:] == (part.cell.hidden,)]
    fit = [n for n in fit if not part[n].is_complex()]
    chosen = fit if names is None else [names] if isinstance(names, str) else list(names)
    if not chosen:
        raise ValueError("names is empty: there is no quantity to draw")
    grids = [_numpy(part[name][:length, batch].reshape(length, -1)).T for name in chosen]
    norm = _norm(grids)
    tall = [min(1.6, 0.3 + 0.07 * max(5, len(grid))) for grid in grids]
    figure = _figure(part, sum(tall) + 0.25 * len(tall) + 0.6)
    panels = figure.subplots(len(grids), sharex=True, squeeze=False, height_ratios=tall)[:, 0]
    for panel, name, grid in zip(panels, chosen, grids, strict=True):
        _heat(panel, grid, norm)
        _label(panel, _titled(part, name), "time step" if panel is panels[-1] else "", "unit")
    _color_bar(panels[0], norm, ax=list(panels), aspect=35)
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
    part, batch, length = _row(trace, batch)
    names = list(part.cell.state)
    ax = ax or _figure(part, 0.8 + 1.7 * len(names)).add_subplot()
    for name, panel in zip(names, _panels(ax, len(names), 1.2), strict=True):
        values = _numpy(part[name][:length, batch].reshape(length, -1))
        panel.axhline(0, color=_GREY, linewidth=0.6)
        for unit, color in enumerate(_COLORS[: values.shape[1]]):
            style = "o-" if length <= 30 else "-"
            panel.plot(values[:, unit], style, color=color, markersize=3.5, label=f"unit {unit}")
        most = f" (the first {len(_COLORS)} of {values.shape[1]} units)" * (values.shape[1] > len(_COLORS))
        _label(panel, _titled(part, name) + most, "time step" if name == names[-1] else "")
        panel.tick_params(labelbottom=name == names[-1])
        panel.set_xlim(-0.5, length - 0.5)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1.05), frameon=False, fontsize=8, labelspacing=0.3)
    return ax


@dataclass(frozen=True)
class _Sheet:
    """An Axes in inches; where it is smaller than the drawing, everything shrinks with it."""

    ax: Axes
    scale: float

    @classmethod
    def of(cls, ax: Axes | None, part: LayerTrace, wide: float, low: float, high: float) -> _Sheet:
        ax = ax or Picture(figsize=(wide, high - low)).add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, wide), ylim=(low, high), aspect="equal")
        ax.set_axis_off()
        window, dpi = ax.get_window_extent(), ax.figure.dpi
        sheet = cls(ax, min(1.0, window.width / dpi / wide, window.height / dpi / (high - low)))
        sheet.write(0.1, high - 0.15, _heading(part), 9, ha="left", color=_GREY)
        return sheet

    def write(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        style = {"ha": "center", "va": "center"} | style
        self.ax.text(x, y, text, fontsize=size * self.scale, **style)

    def vector(self, x: float, y: float, values: Tensor, color: str, va: str = "top") -> None:
        tint = {"boxstyle": "round,pad=0.25", "facecolor": (color, 0.13), "edgecolor": "none"}
        self.write(x, y, _text(values), 8, va=va, ma="right", linespacing=1.25, bbox=tint)

    def arrow(self, start: tuple[float, float], tip: tuple[float, float], color: str) -> None:
        arrow = patches.FancyArrowPatch(start, tip, arrowstyle="-|>", shrinkA=0, shrinkB=0, color=color)
        arrow.set(mutation_scale=11 * self.scale, linewidth=1.4 * self.scale)
        self.ax.add_patch(arrow)

    def box(self, left: float, wide: float, tall: float) -> None:
        box = patches.FancyBboxPatch((left, 0), wide, tall, "round,pad=0,rounding_size=0.1")
        box.set(facecolor=(_GREY, 0.1), edgecolor=_GREY)
        self.ax.add_patch(box)


def _part(trace: Trace | LayerTrace) -> LayerTrace:
    if not isinstance(trace, (Trace, LayerTrace)):
        raise TypeError(f"a picture is drawn of a trace or of one of its layers, got {type(trace).__name__}")
    return trace.layers[0] if isinstance(trace, Trace) else trace


def _row(trace: Trace | LayerTrace, batch: int) -> tuple[LayerTrace, int, int]:
    """The layer, the row counted from 0, and the number of its steps."""
    part = _part(trace)
    batch = position("row", batch, part.input.shape[1])
    return part, batch, int(part.lengths[batch])


def _shown(steps: Iterable[int] | None, length: int) -> list[int]:
    if steps is None:
        return list(range(length)) if length <= _STEPS else [0, 1, 2, length - 1]
    shown = sorted({position("time step", step, length) for step in steps})
    if not shown:
        raise ValueError("steps is empty: there is no time step to draw")
    return shown


def _heading(part: LayerTrace) -> str:
    return f"{type(part.cell).__name__}, layer {part.layer}, {part.direction}"


def _titled(part: LayerTrace, name: str) -> str:
    """The name of a quantity and what the docstring of its cell says of it."""
    return " – ".join(filter(None, (name, meanings(type(part.cell)).get(name))))


def _at(name: str, step: int) -> str:
    return name + str(step).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _text(values: Tensor) -> str:
    return "\n".join(map(number, values.tolist())) if len(values) <= _SMALL else f"{len(values)} numbers"


def _numpy(values: Tensor) -> Any:
    if values.is_complex():
        raise ValueError("a picture shows real numbers, not complex ones: give their parts names in the step")
    return values.detach().double().cpu().numpy()


def _figure(part: LayerTrace, tall: float) -> Picture:
    figure = Picture(figsize=(8, tall), layout="constrained")
    figure.suptitle(_heading(part), fontsize=9, color=_GREY, x=0.01, ha="left")
    return figure


def _panels(ax: Axes, count: int, pitch: float, down: bool = True) -> list[Axes]:
    """Axes within an Axes, in a column or a row, ``pitch`` times their size apart; one is itself."""
    if count == 1:
        return [ax]
    ax.set_axis_off()
    size = 1 / (pitch * (count - 1) + 1)
    places = [size * pitch * place for place in range(count)]
    return [ax.inset_axes((0, 1 - size - at, 1, size) if down else (at, 0, size, 1)) for at in places]


def _norm(arrays: Iterable[Any]) -> Normalize:
    """The scale of the colours, as far below zero as above, up to the largest finite number."""
    most = max(np.abs(array[np.isfinite(array)]).max(initial=0) for array in arrays) or 1.0
    return Normalize(-most, most)


def _label(panel: Axes, title: str, x: str, y: str = "") -> None:
    panel.set_title(title, loc="left", fontsize=9.5)
    panel.set_xlabel(x, fontsize=8.5)
    panel.set_ylabel(y, fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _heat(panel: Axes, grid: Any, norm: Normalize) -> None:
    panel.imshow(grid, cmap=_SCALE, norm=norm, aspect="auto", interpolation="nearest")
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def _units(part: LayerTrace, name: str) -> list[str]:
    """What the axes of a parameter count, as its Param says; ``hidden`` where that is what it is."""
    sizes = zip(map(str, part.cell.params()[name].shape), part.cell.shapes()[name], strict=True)
    return ["hidden" if "hidden" in text and size == part.cell.hidden else text for text, size in sizes]


def _heights(groups: Mapping[str, int]) -> dict[str, list[float]]:
    """The y of every node of a column, from the top, centred on zero."""
    y, found = 0.2 * sum(groups.values()) + 0.2 * len(groups) - 0.4, {}
    for name, count in groups.items():
        found[name] = [y - 0.4 * unit for unit in range(count)]
        y = found[name][-1] - 0.8
    return found


def _color_bar(panel: Axes, norm: Normalize, **place: Any) -> None:
    panel.figure.colorbar(ScalarMappable(norm, _SCALE), **place).ax.tick_params(labelsize=8)

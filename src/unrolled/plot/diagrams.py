"""A layer as boxes and arrows, nodes and edges: unrolled through time, and its weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import patches
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from unrolled.plot.figures import (
    COLORS,
    GREY,
    INPUT,
    SCALE,
    Picture,
    axes,
    checked,
    color_bar,
    color_norm,
    divide,
    heading,
    heat_map,
    inches,
    layer_of,
    reals,
    row_of,
    set_labels,
)
from unrolled.tracing.explain import number
from unrolled.tracing.indexing import position
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_SMALL = 4  # numbers of a vector that are written out
_STEPS = 5  # steps of a sequence that are all drawn
_NODES = 8  # nodes in a column of the graph of a layer


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
    part, batch, length = row_of(trace, batch)
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
    sheet = _Sheet.of(ax, part, end, -bottom, tall + top + 0.2, batch)

    def flow(left: float, source: int) -> None:
        """The states after the step ``source``, in the gap that begins at ``left``."""
        initial, final = source in (-1, length), source == (length - 1 if forward else 0)
        for name, y, color in zip(states, heights, COLORS * len(states), strict=False):
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
        sheet.arrow((middle, -0.42), (middle, -0.03), INPUT)
        sheet.write(middle, -0.54, _at("x", step), 9.5, color=INPUT)
        sheet.vector(middle, -0.68, inputs[step], INPUT)
        sheet.arrow((middle, tall + 0.03), (middle, tall + 0.42), COLORS[0])
        sheet.write(middle, tall + 0.54, _at(output, step), 9.5, color=COLORS[0])
        sheet.vector(middle, tall + 0.7, states[output][step], COLORS[0], va="bottom")
        flow(left - gap, step - 1 if forward else step)
        if step + 1 not in shown:
            flow(left + wide, step if forward else step + 1)
        dots = [left - gap - 0.2] if step == shown[0] != 0 else []
        dots += [left + wide + gap + 0.2] if step + 1 not in (*shown, length) else []
        for x, y in itertools.product(dots, heights):
            sheet.write(x, y, "⋯", 14, color=GREY)
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
    part = layer_of(trace)
    weights: dict[str, tuple[str, str, Any]] = {}  # from which units, to which, and the matrix
    for name, shape in part.cell.shapes().items():
        if len(shape) == 2:
            matrix, (rows, columns) = reals(getattr(part.cell, name)), _units(part, name)
            turned = rows == "input" != columns
            weights[name] = (rows, columns, matrix.T) if turned else (columns, rows, matrix)
    if not weights:
        raise ValueError(f"{type(part.cell).__name__} has no parameter with two axes: nothing to draw")
    matrices = [matrix for _, _, matrix in weights.values()]
    norm = color_norm(matrices)
    left = _heights({source: matrix.shape[1] for source, _, matrix in weights.values()})
    right = _heights({target: matrix.shape[0] for _, target, matrix in weights.values()})
    parallel = len({(source, target) for source, target, _ in weights.values()}) < len(weights)
    if parallel or max(sum(map(len, column.values())) for column in (left, right)) > _NODES:
        ax = axes(ax, part, 3.4)
        panels = divide(ax, [1] * len(weights), 0.75, down=False)
        for panel, (name, (source, target, matrix)) in zip(panels, weights.items(), strict=True):
            note = heat_map(panel, matrix, norm)
            set_labels(panel, name + note, source, target)
        color_bar(ax.inset_axes((1.03, 0, 0.02, 1)), norm, matrices)
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
    sheet.ax.add_collection(LineCollection(ends, colors=GREY, linewidths=(widths + 0.5) * sheet.scale))
    lines = LineCollection(ends, array=values, cmap=SCALE, norm=norm, linewidths=widths * sheet.scale)
    sheet.ax.add_collection(lines)
    for x, side, align, groups in ((1.6, -0.28, "right", left), (4.4, 0.28, "left", right)):
        for kind, ys in groups.items():
            color = INPUT if kind == "input" else COLORS[0]
            for unit, y in enumerate(ys):
                sheet.ax.add_patch(patches.Circle((x, y), 0.15, facecolor=(color, 0.13), edgecolor=color))
                sheet.write(x, y, str(unit), 7.5)
            names = [name for name, (source, _, _) in weights.items() if source == kind and side < 0]
            sheet.write(x + side, sum(ys) / len(ys), "\n".join([kind, *names]), 9, ha=align, color=color)
    place = sheet.ax.inset_axes((5.6, -0.8 * top, 0.12, 1.6 * top), transform=sheet.ax.transData)
    color_bar(place, norm, matrices)
    return sheet.ax


@dataclass(frozen=True)
class _Sheet:
    """An Axes in inches; where it is smaller than the drawing, everything shrinks with it."""

    ax: Axes
    scale: float

    @classmethod
    def of(
        cls,
        ax: Axes | None,
        part: LayerTrace,
        wide: float,
        low: float,
        high: float,
        batch: int | None = None,
    ) -> _Sheet:
        ax = Picture(figsize=(wide, high - low)).add_axes((0, 0, 1, 1)) if ax is None else checked(ax)
        ax.set(xlim=(0, wide), ylim=(low, high), aspect="equal")
        ax.set_axis_off()
        room = inches(ax)
        sheet = cls(ax, min(1.0, room[0] / wide, room[1] / (high - low)))
        sheet.write(0.1, high - 0.15, heading(part, batch), 9, ha="left", color=GREY)
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
        box.set(facecolor=(GREY, 0.1), edgecolor=GREY)
        self.ax.add_patch(box)


def _shown(steps: Iterable[int] | None, length: int) -> list[int]:
    if steps is None:
        return list(range(length)) if length <= _STEPS else [0, 1, 2, length - 1]
    if not isinstance(steps, Iterable):
        raise TypeError(f"steps should be several time steps, such as [0, -1], got {steps!r}")
    shown = sorted({position("time step", step, length) for step in steps})
    if not shown:
        raise ValueError("steps is empty: there is no time step to draw")
    return shown


def _at(name: str, step: int) -> str:
    return name + str(step).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _text(values: Tensor) -> str:
    return "\n".join(map(number, values.tolist())) if len(values) <= _SMALL else f"{len(values)} numbers"


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

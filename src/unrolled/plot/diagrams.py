"""Diagrams of a layer: unrolled through time as boxes and arrows, and its weights as a graph or heat maps."""

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
    COLORMAP,
    COLORS,
    GRAY,
    INPUT_COLOR,
    Picture,
    check_axes,
    color_norm,
    draw_color_bar,
    draw_heat_map,
    get_axes,
    heading,
    select_layer,
    select_row,
    set_labels,
    size_in_inches,
    split_axes,
    to_numpy,
)
from unrolled.tracing.explain import format_number
from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_MAX_PRINTED_VALUES = 4  # of a vector; a longer one shows its number of values
_MAX_STEPS = 5  # a longer sequence is shortened by default
_MAX_NODES = 8  # in a column of the graph; a larger layer is drawn as heat maps


def unrolled(
    trace: Trace | LayerTrace, steps: Iterable[int] | None = None, batch: int = 0, ax: Axes | None = None
) -> Axes:
    """Draw the layer unrolled through time: a box for each step, with arrows for input, states and output.

    The input enters a box from below, the states go to the next step, and the output leaves at the top.
    The values of short vectors are printed.

    Args:
        trace: A trace or one of its layers.
        steps: The time steps. Negative ones count from the end. The default is all steps of a short sequence,
            and the first three and the last step of a longer one.
        batch: The row of the batch.
        ax: Where to draw. The default is a new figure.

    Raises:
        IndexError: If there is no such row or step.
        ValueError: If ``steps`` is empty.
    """
    part, batch, length = select_row(trace, batch)
    shown = _select_steps(steps, length)
    is_forward, cell = part.direction == "forward", type(part.cell).__name__
    inputs = part.input[:length, batch].flatten(1)
    states = {name: part[name][:length, batch].flatten(1) for name in part.cell.state}
    initial_states = {name: state[batch].flatten() for name, state in part.initial_state.items()}
    output = next(iter(states))

    # All sizes are in inches. The bottom of the boxes is y = 0, and each state has a lane.
    lane = 0.55 + 0.15 * max(_format_vector(state).count("\n") for state in initial_states.values())
    box_width, box_height = max(0.95, 0.11 * len(cell) + 0.2), max(0.75, lane * len(states))
    gap = 0.87 + 0.08 * max(map(len, states))
    lefts, end = list[float](), 0.1
    for step in shown:
        lefts.append(end + gap + (0.4 if step and step - 1 not in shown else 0))  # room for an ellipsis
        end = lefts[-1] + box_width + (0 if step + 1 in shown else gap)
    end += 0.1 if shown[-1] == length - 1 else 0.5
    top, bottom = (1.05 + 0.15 * _format_vector(v[0]).count("\n") for v in (states[output], inputs))
    lane_heights = [box_height - lane * index - 0.3 for index in range(len(states))]
    canvas = _Canvas.create(ax, part, end, -bottom, box_height + top + 0.2, batch)

    def draw_states(left: float, source: int) -> None:
        """Draw the states after the step ``source``, in the gap that starts at ``left``."""
        is_initial, is_final = source in (-1, length), source == (length - 1 if is_forward else 0)
        for name, y, color in zip(states, lane_heights, COLORS * len(states), strict=False):
            ends = [(left + 0.04, y), (left + gap - 0.04, y)]
            canvas.arrow(ends[not is_forward], ends[is_forward], color)
            subscripted = _with_subscript(name, source)
            label = f"initial {name}" if is_initial else f"final {name}" if is_final else subscripted
            canvas.write(left + gap / 2, y + 0.13, label, 9.5, color=color)
            if is_initial or name != output:  # the output is printed above its box
                values = initial_states[name] if is_initial else states[name][source]
                canvas.vector(left + gap / 2, y - 0.1, values, color)

    for step, left in zip(shown, lefts, strict=True):
        middle = left + box_width / 2
        canvas.box(left, box_width, box_height)
        canvas.write(middle, box_height / 2 + 0.11, cell, 11, weight="bold")
        canvas.write(middle, box_height / 2 - 0.12, f"step {step}", 9)
        canvas.arrow((middle, -0.42), (middle, -0.03), INPUT_COLOR)
        canvas.write(middle, -0.54, _with_subscript("x", step), 9.5, color=INPUT_COLOR)
        canvas.vector(middle, -0.68, inputs[step], INPUT_COLOR)
        canvas.arrow((middle, box_height + 0.03), (middle, box_height + 0.42), COLORS[0])
        canvas.write(middle, box_height + 0.54, _with_subscript(output, step), 9.5, color=COLORS[0])
        canvas.vector(middle, box_height + 0.7, states[output][step], COLORS[0], va="bottom")
        draw_states(left - gap, step - 1 if is_forward else step)
        if step + 1 not in shown:
            draw_states(left + box_width, step if is_forward else step + 1)
        ellipses = [left - gap - 0.2] if step == shown[0] != 0 else []
        ellipses += [left + box_width + gap + 0.2] if step + 1 not in (*shown, length) else []
        for x, y in itertools.product(ellipses, lane_heights):
            canvas.write(x, y, "⋯", 14, color=GRAY)
    return canvas.ax


def layer(trace: Trace | LayerTrace, ax: Axes | None = None) -> Axes:
    """Draw the weights of the layer: a graph with colored edges, or heat maps if the layer is large.

    Every two-dimensional parameter is drawn. Its rows are the outputs and its columns are the inputs, as in
    ``torch.nn.functional.linear``. A matrix with the input along its rows is transposed.

    Args:
        trace: A trace or one of its layers.
        ax: Where to draw. The default is a new figure. Several heat maps are its ``child_axes``.

    Raises:
        ValueError: If the cell has no two-dimensional parameter.
    """
    part = select_layer(trace)
    weights: dict[str, tuple[str, str, Any]] = {}  # by name: the source units, the target units, the matrix
    for name, shape in part.cell.shapes().items():
        if len(shape) == 2:
            matrix, (rows, columns) = to_numpy(getattr(part.cell, name)), _axis_names(part, name)
            is_transposed = rows == "input" != columns
            weights[name] = (rows, columns, matrix.T) if is_transposed else (columns, rows, matrix)
    if not weights:
        raise ValueError(f"{type(part.cell).__name__} has no two-dimensional parameter to draw")
    matrices = [matrix for _, _, matrix in weights.values()]
    norm = color_norm(matrices)
    left = _node_heights({source: matrix.shape[1] for source, _, matrix in weights.values()})
    right = _node_heights({target: matrix.shape[0] for _, target, matrix in weights.values()})
    has_parallel_edges = len({(source, target) for source, target, _ in weights.values()}) < len(weights)
    if has_parallel_edges or max(sum(map(len, column.values())) for column in (left, right)) > _MAX_NODES:
        ax = get_axes(ax, part, 3.4)
        panels = split_axes(ax, [1] * len(weights), 0.75, vertical=False)
        for panel, (name, (source, target, matrix)) in zip(panels, weights.items(), strict=True):
            note = draw_heat_map(panel, matrix, norm)
            set_labels(panel, name + note, source, target)
        draw_color_bar(ax.inset_axes((1.03, 0, 0.02, 1)), norm, matrices)
        return ax

    top = max(ys[0] for column in (left, right) for ys in column.values()) + 0.35
    canvas = _Canvas.create(ax, part, 6.4, -top, top + 0.3)
    edges, values = [], []
    for source, target, matrix in weights.values():
        for row, column in np.ndindex(matrix.shape):
            edges.append([(1.75, left[source][column]), (4.25, right[target][row])])
            values.append(matrix[row, column])
    widths = 1 + 3 * np.nan_to_num(np.abs(values) / norm.vmax, nan=1, posinf=1)
    # Outline each edge in gray: the color of a weight near zero is close to white.
    outlines = LineCollection(edges, colors=GRAY, linewidths=(widths + 0.5) * canvas.scale)
    canvas.ax.add_collection(outlines)
    lines = LineCollection(edges, array=values, cmap=COLORMAP, norm=norm, linewidths=widths * canvas.scale)
    canvas.ax.add_collection(lines)
    for x, offset, align, groups in ((1.6, -0.28, "right", left), (4.4, 0.28, "left", right)):
        for kind, ys in groups.items():
            color = INPUT_COLOR if kind == "input" else COLORS[0]
            for unit, y in enumerate(ys):
                circle = patches.Circle((x, y), 0.15, facecolor=(color, 0.13), edgecolor=color)
                canvas.ax.add_patch(circle)
                canvas.write(x, y, str(unit), 7.5)
            names = [name for name, (source, _, _) in weights.items() if source == kind and offset < 0]
            label = "\n".join([kind, *names])
            canvas.write(x + offset, sum(ys) / len(ys), label, 9, ha=align, color=color)
    color_bar = canvas.ax.inset_axes((5.6, -0.8 * top, 0.12, 1.6 * top), transform=canvas.ax.transData)
    draw_color_bar(color_bar, norm, matrices)
    return canvas.ax


@dataclass(frozen=True)
class _Canvas:
    """An Axes with inches as its data coordinates.

    Attributes:
        ax: The Axes.
        scale: How much everything shrinks to fit into the Axes, at most 1.
    """

    ax: Axes
    scale: float

    @classmethod
    def create(
        cls,
        ax: Axes | None,
        part: LayerTrace,
        width: float,
        low: float,
        high: float,
        batch: int | None = None,
    ) -> _Canvas:
        """Prepare an Axes, or that of a new figure, for a drawing from ``low`` to ``high``, in inches."""
        ax = Picture(figsize=(width, high - low)).add_axes((0, 0, 1, 1)) if ax is None else check_axes(ax)
        ax.set(xlim=(0, width), ylim=(low, high), aspect="equal")
        ax.set_axis_off()
        available_width, available_height = size_in_inches(ax)
        canvas = cls(ax, min(1.0, available_width / width, available_height / (high - low)))
        canvas.write(0.1, high - 0.15, heading(part, batch), 9, ha="left", color=GRAY)
        return canvas

    def write(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        style = {"ha": "center", "va": "center"} | style
        self.ax.text(x, y, text, fontsize=size * self.scale, **style)

    def vector(self, x: float, y: float, values: Tensor, color: str, va: str = "top") -> None:
        background = {"boxstyle": "round,pad=0.25", "facecolor": (color, 0.13), "edgecolor": "none"}
        text = _format_vector(values)
        self.write(x, y, text, 8, va=va, ma="right", linespacing=1.25, bbox=background)

    def arrow(self, start: tuple[float, float], tip: tuple[float, float], color: str) -> None:
        arrow = patches.FancyArrowPatch(start, tip, arrowstyle="-|>", shrinkA=0, shrinkB=0, color=color)
        arrow.set(mutation_scale=11 * self.scale, linewidth=1.4 * self.scale)
        self.ax.add_patch(arrow)

    def box(self, left: float, width: float, height: float) -> None:
        box = patches.FancyBboxPatch((left, 0), width, height, "round,pad=0,rounding_size=0.1")
        box.set(facecolor=(GRAY, 0.1), edgecolor=GRAY)
        self.ax.add_patch(box)


def _select_steps(steps: Iterable[int] | None, length: int) -> list[int]:
    if steps is None:
        return list(range(length)) if length <= _MAX_STEPS else [0, 1, 2, length - 1]
    if not isinstance(steps, Iterable):
        raise TypeError(f"steps should be an iterable of time steps, such as [0, -1], got {steps!r}")
    selected = sorted({normalize_index("time step", step, length) for step in steps})
    if not selected:
        raise ValueError("steps is empty: pass at least one time step")
    return selected


def _with_subscript(name: str, step: int) -> str:
    return name + str(step).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _format_vector(values: Tensor) -> str:
    """Return the values of a short vector one below the other, or the number of values of a longer one."""
    if len(values) > _MAX_PRINTED_VALUES:
        return f"{len(values)} values"
    return "\n".join(map(format_number, values.tolist()))


def _axis_names(part: LayerTrace, name: str) -> list[str]:
    """Return the sizes of a parameter's axes as its ``Param`` spells them.

    A size that is given by ``hidden`` and equals the number of hidden units is just ``hidden``.
    """
    sizes = zip(map(str, part.cell.params()[name].shape), part.cell.shapes()[name], strict=True)
    return ["hidden" if "hidden" in text and size == part.cell.hidden else text for text, size in sizes]


def _node_heights(groups: Mapping[str, int]) -> dict[str, list[float]]:
    """Return the y of every node of a column, from top to bottom, centered on zero."""
    y = 0.2 * sum(groups.values()) + 0.2 * len(groups) - 0.4
    heights: dict[str, list[float]] = {}
    for name, count in groups.items():
        heights[name] = [y - 0.4 * unit for unit in range(count)]
        y = heights[name][-1] - 0.8
    return heights

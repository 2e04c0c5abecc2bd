"""What the pictures of a trace share: figures, colours, panels, heat maps and labels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, patches
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from unrolled.tracing.indexing import position
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

NAN_COLOR = "#f0e442"  # of NaN and infinity: yellow, which the scale of the numbers doesn't hold
SCALE = colormaps["RdBu_r"].with_extremes(bad=NAN_COLOR)  # ColorBrewer's, safe for the colour-blind
INPUT, GREY = "#0072b2", "#8a8a8a"
COLORS = ("#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#777777")
_CELLS = 90  # of a heat map, an inch: somewhat fewer than pixels of a figure as it is
_FEW = 20  # of them that even the smallest has
NOT_FINITE = "NaN or infinite"
KEY: dict[str, Any] = {"loc": "upper left", "frameon": False, "fontsize": 8, "labelspacing": 0.3}


class Picture(Figure):
    """A figure that a notebook shows, sharp, where it is the last value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=1.5 * 96, metadata={"Software": None})
        return png.getvalue(), {"width": width, "height": height}


def layer_of(trace: Trace | LayerTrace) -> LayerTrace:
    """The layer to draw: of a trace the lowest, forward. Raises a TypeError for anything else."""
    if not isinstance(trace, (Trace, LayerTrace)):
        raise TypeError(f"a picture is drawn of a trace or of one of its layers, got {type(trace).__name__}")
    return trace.layers[0] if isinstance(trace, Trace) else trace


def row_of(trace: Trace | LayerTrace, batch: int) -> tuple[LayerTrace, int, int]:
    """The layer, the row counted from 0, and the number of its steps."""
    part = layer_of(trace)
    part.check_whole("a picture")
    batch = position("row", batch, part.input.shape[1])
    return part, batch, int(part.lengths[batch])


def heading(part: LayerTrace, batch: int | None = None) -> str:
    """Which layer it is, and which row of several; None: of the weights, which are those of all rows."""
    rows = part.input.shape[1]
    row = "" if batch is None or rows == 1 else f", row {batch} of {rows}"
    return f"{type(part.cell).__name__}, layer {part.layer}, {part.direction}{row}"


def reals(values: Tensor) -> Any:
    """The numbers for NumPy, in float64. Raises a ValueError where they are complex."""
    if values.is_complex():
        raise ValueError("a picture shows real numbers, not complex ones: give their parts names in the step")
    return values.detach().double().cpu().numpy()


def new_figure(part: LayerTrace, tall: float, batch: int | None = None) -> Picture:
    """A figure, ``tall`` inches high, that says which layer and row it is of."""
    figure = Picture(figsize=(8, tall), layout="constrained")
    figure.suptitle(heading(part, batch), fontsize=9, color=GREY, x=0.01, ha="left")
    return figure


def axes(ax: Axes | None, part: LayerTrace, tall: float, batch: int | None = None) -> Axes:
    """The Axes that was given, checked, or that of a new figure."""
    return new_figure(part, tall, batch).add_subplot() if ax is None else checked(ax)


def checked(ax: Any) -> Axes:
    """An Axes that a picture can be drawn on.

    Raises:
        TypeError: it is none.
        ValueError: its axes aren't straight, or there are no more than two.
    """
    if not isinstance(ax, Axes):
        raise TypeError(
            "ax should be one Axes of matplotlib, such as figure.add_subplot() gives, got "
            f"{type(ax).__name__}"
        )
    if ax.name in ("polar", "3d"):
        raise ValueError(
            f"ax should have two straight axes, and this one is {ax.name}: add it without projection"
        )
    if min(inches(ax)) <= 0:
        raise ValueError("ax has no room: its width or height is 0")
    return ax


def inches(ax: Axes) -> tuple[float, float]:
    """The width and height of an Axes."""
    window = ax.get_window_extent()
    return window.width / ax.figure.dpi, window.height / ax.figure.dpi


def divide(ax: Axes, sizes: Sequence[float], gap: float, down: bool = True) -> list[Axes]:
    """Axes within an Axes: a column with one axis of time, or a row; a single one is the Axes itself.

    Args:
        ax: what is divided.
        sizes: the heights in the column or the widths in the row, one beside the other.
        gap: inches between two, of an Axes large enough.
        down: a column.
    """
    if len(sizes) == 1:
        return [ax]
    ax.set_axis_off()
    between = min(gap / inches(ax)[down], 0.6 / (len(sizes) - 1))
    free = 1 - between * (len(sizes) - 1)
    panels: list[Axes] = []
    for place, size in enumerate(sizes):
        start, share = free * sum(sizes[:place]) / sum(sizes) + between * place, free * size / sum(sizes)
        bounds = (0, 1 - start - share, 1, share) if down else (start, 0, share, 1)
        panels.append(ax.inset_axes(bounds, sharex=panels[0] if down and panels else None))
    return panels


def color_norm(arrays: Iterable[Any]) -> Normalize:
    """The scale of the colours, as far below zero as above, up to the largest finite number."""
    most = max(np.abs(array[np.isfinite(array)]).max(initial=0) for array in arrays) or 1.0
    return Normalize(-most, most)


def set_labels(panel: Axes, title: str, x: str, y: str = "") -> None:
    """A title, names for the axes, and time steps or units as whole numbers."""
    panel.set_title(title, loc="left", fontsize=9.5, parse_math=False)  # a docstring's words may hold a $
    panel.set_xlabel(x, fontsize=8.5)
    panel.set_ylabel(y, fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def heat_map(panel: Axes, grid: Any, norm: Normalize) -> str:
    """Draw a matrix, its first row on top; where there may be more numbers than pixels, their means.

    Unlike the resampling of matplotlib, which may lose it, a mean is NaN where one of its numbers is.

    Returns:
        What to say of it: how many numbers a colour stands for, if there are several.
    """
    rows, columns = grid.shape
    note, most = "", []
    for axis, (count, room) in enumerate(zip(grid.shape, reversed(inches(panel)), strict=True)):
        most.append(-(-count // max(_FEW, round(_CELLS * room))))
        starts = np.arange(0, count, most[axis])
        with np.errstate(invalid="ignore"):  # of infinity less infinity
            sums = np.add.reduceat(grid, starts, axis)
        grid = sums / np.expand_dims(np.diff(starts, append=count), 1 - axis)
    if max(most) > 1:
        note = f" (means of {most[0]} × {most[1]} numbers)"
    edges = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    panel.imshow(grid, cmap=SCALE, norm=norm, aspect="auto", interpolation="nearest", extent=edges)
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    return note


def color_bar(place: Axes, norm: Normalize, arrays: Iterable[Any]) -> None:
    """Draw the scale of the colours; below, that of NaN and infinity where one is in the arrays."""
    place.figure.colorbar(ScalarMappable(norm, SCALE), cax=place).ax.tick_params(labelsize=8)
    if not all(np.isfinite(array).all() for array in arrays):
        key = [patches.Patch(color=NAN_COLOR, label=NOT_FINITE)]
        place.legend(handles=key, bbox_to_anchor=(0, 0), **KEY)

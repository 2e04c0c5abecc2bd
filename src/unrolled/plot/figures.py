"""Helpers of all plots: figures, colors, panels, heat maps and labels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, patches
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

NAN_COLOR = "#f0e442"
"""Color of NaN and infinity in heat maps: yellow, which the colormap doesn't contain."""
COLORMAP = colormaps["RdBu_r"].with_extremes(bad=NAN_COLOR)  # by ColorBrewer, safe for color blindness
GATE_COLORMAP = LinearSegmentedColormap.from_list("gates", ["#ffffff", "#0b7a63"]).with_extremes(
    bad=NAN_COLOR
)
INPUT_COLOR, GRAY = "#0072b2", "#8a8a8a"
COLORS = ("#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#777777")
_CELLS_PER_INCH = 90  # of a heat map: slightly fewer than the pixels of a figure at the default resolution
_MIN_CELLS = 20  # of a heat map in each direction, however small it is
NOT_FINITE = "NaN or infinite"
LEGEND_STYLE: dict[str, Any] = {
    "loc": "upper left",
    "frameon": False,
    "fontsize": 8,
    "labelspacing": 0.3,
}


class Picture(Figure):
    """A figure that a notebook displays, at a high resolution, if it is the last value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=1.5 * 96, metadata={"Software": None})
        return png.getvalue(), {"width": width, "height": height}


def select_layer(trace: Trace | LayerTrace) -> LayerTrace:
    """Return the layer to draw: layer 0, forward direction, of a trace.

    Raises:
        TypeError: If the argument is not a trace or a layer of one.
    """
    if not isinstance(trace, (Trace, LayerTrace)):
        raise TypeError(f"expected a Trace or one of its layers, got {type(trace).__name__}")
    return trace.layers[0] if isinstance(trace, Trace) else trace


def select_row(trace: Trace | LayerTrace, batch: int) -> tuple[LayerTrace, int, int]:
    """Return the layer to draw, the index of the row, and the length of its sequence."""
    part = select_layer(trace)
    part.check_whole("a plot", chained=False)
    batch = normalize_index("row", batch, part.input.shape[1])
    return part, batch, int(part.lengths[batch])


def heading(part: LayerTrace, batch: int | None = None) -> str:
    """Return the cell, layer and direction, and the row if there are several.

    Args:
        part: The layer.
        batch: The row. None for the weights, which all rows share.
    """
    rows = part.input.shape[1]
    row = "" if batch is None or rows == 1 else f", row {batch} of {rows}"
    return f"{type(part.cell).__name__}, layer {part.layer}, {part.direction}{row}"


def to_numpy(values: Tensor) -> Any:
    """Return the values as a float64 NumPy array.

    Raises:
        ValueError: If the values are complex.
    """
    if values.is_complex():
        raise ValueError(
            "complex numbers can't be plotted: assign their real and imaginary parts to variables in the step"
        )
    return values.detach().double().cpu().numpy()


def new_figure(part: LayerTrace, height: float, batch: int | None = None) -> Picture:
    """Create a figure of the given height in inches, with the layer and row as its title."""
    figure = Picture(figsize=(8, height), layout="constrained")
    figure.suptitle(heading(part, batch), fontsize=9, color=GRAY, x=0.01, ha="left")
    return figure


def get_axes(ax: Axes | None, part: LayerTrace, height: float, batch: int | None = None) -> Axes:
    """Return the user's Axes after checking it, or the Axes of a new figure if there is none."""
    return new_figure(part, height, batch).add_subplot() if ax is None else check_axes(ax)


def check_axes(ax: Any) -> Axes:
    """Check that an Axes can be drawn on, and return it.

    Raises:
        TypeError: If it isn't a matplotlib Axes.
        ValueError: If its projection is polar or 3d, or if its width or height is 0.
    """
    if not isinstance(ax, Axes):
        raise TypeError(
            "ax should be a single matplotlib Axes, such as figure.add_subplot() returns, got "
            f"{type(ax).__name__}"
        )
    if ax.name in ("polar", "3d"):
        raise ValueError(f"ax has the projection {ax.name!r}: create it without a projection")
    if min(size_in_inches(ax)) <= 0:
        raise ValueError("ax has a width or height of 0: create a larger one")
    return ax


def size_in_inches(ax: Axes) -> tuple[float, float]:
    """Return the width and height of an Axes in inches."""
    window = ax.get_window_extent()
    return window.width / ax.figure.dpi, window.height / ax.figure.dpi


def split_axes(ax: Axes, sizes: Sequence[float], gap: float, vertical: bool = True) -> list[Axes]:
    """Divide an Axes into several, or return it unchanged if there is only one size.

    Args:
        ax: The Axes to divide.
        sizes: The heights of the rows or the widths of the columns, relative to each other.
        gap: The distance between two of them in inches. In a small Axes, it is less.
        vertical: Whether to stack them in rows that share the time axis. Otherwise they are in columns.
    """
    if len(sizes) == 1:
        return [ax]
    ax.set_axis_off()
    relative_gap = min(gap / size_in_inches(ax)[vertical], 0.6 / (len(sizes) - 1))
    available = 1 - relative_gap * (len(sizes) - 1)
    panels: list[Axes] = []
    for index, size in enumerate(sizes):
        start = available * sum(sizes[:index]) / sum(sizes) + relative_gap * index
        extent = available * size / sum(sizes)
        bounds = (0, 1 - start - extent, 1, extent) if vertical else (start, 0, extent, 1)
        panels.append(ax.inset_axes(bounds, sharex=panels[0] if vertical and panels else None))
    return panels


def color_norm(arrays: Iterable[Any]) -> Normalize:
    """Return a symmetric color scale that reaches to the largest finite magnitude."""
    largest = max(np.abs(array[np.isfinite(array)]).max(initial=0) for array in arrays) or 1.0
    return Normalize(-largest, largest)


def set_labels(panel: Axes, title: str, x: str, y: str = "") -> None:
    """Set the title and the axis labels, with whole numbers as ticks for time steps or units."""
    panel.set_title(title, loc="left", fontsize=9.5, parse_math=False)  # docstrings may contain a $
    panel.set_xlabel(x, fontsize=8.5)
    panel.set_ylabel(y, fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def draw_heat_map(panel: Axes, grid: Any, norm: Normalize) -> str:
    """Draw a matrix with its first row on top. If it is larger than the panel, draw means of blocks.

    The mean of a block is NaN if one of its values is. The resampling of matplotlib may lose such values.

    Returns:
        A note for the title that gives the size of the blocks, or an empty string.
    """
    rows, columns = grid.shape
    note, block_shape = "", []
    for axis, (count, inches) in enumerate(zip(grid.shape, reversed(size_in_inches(panel)), strict=True)):
        block_shape.append(-(-count // max(_MIN_CELLS, round(_CELLS_PER_INCH * inches))))
        starts = np.arange(0, count, block_shape[axis])
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            sums = np.add.reduceat(grid, starts, axis)
        grid = sums / np.expand_dims(np.diff(starts, append=count), 1 - axis)
    if max(block_shape) > 1:
        note = f" (means of {block_shape[0]} × {block_shape[1]} values)"
    edges = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    panel.imshow(grid, cmap=COLORMAP, norm=norm, aspect="auto", interpolation="nearest", extent=edges)
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    return note


def draw_color_bar(
    panel: Axes, norm: Normalize, arrays: Iterable[Any], colormap: Colormap = COLORMAP
) -> None:
    """Draw the color scale, with the color of NaN and infinity below it if one is in the arrays."""
    panel.figure.colorbar(ScalarMappable(norm, colormap), cax=panel).ax.tick_params(labelsize=8)
    if not all(np.isfinite(array).all() for array in arrays):
        handles = [patches.Patch(color=NAN_COLOR, label=NOT_FINITE)]
        panel.legend(handles=handles, bbox_to_anchor=(0, 0), **LEGEND_STYLE)

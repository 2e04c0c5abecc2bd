"""What the pictures of a trace share: figures, colours, panels, heat maps and labels."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from unrolled.layer_trace import LayerTrace, position
from unrolled.trace import Trace

NAN_COLOR = "#f0e442"  # of NaN and infinity: yellow, which the scale of the numbers doesn't hold
SCALE = colormaps["RdBu_r"].with_extremes(bad=NAN_COLOR)  # ColorBrewer's, safe for the colour-blind
INPUT, GREY = "#0072b2", "#8a8a8a"
COLORS = ("#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#777777")


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
    batch = position("row", batch, part.input.shape[1])
    return part, batch, int(part.lengths[batch])


def heading(part: LayerTrace) -> str:
    """Which layer it is."""
    return f"{type(part.cell).__name__}, layer {part.layer}, {part.direction}"


def reals(values: Tensor) -> Any:
    """The numbers for NumPy, in float64. Raises a ValueError where they are complex."""
    if values.is_complex():
        raise ValueError("a picture shows real numbers, not complex ones: give their parts names in the step")
    return values.detach().double().cpu().numpy()


def new_figure(part: LayerTrace, tall: float) -> Picture:
    """A figure, ``tall`` inches high, that says which layer it is of."""
    figure = Picture(figsize=(8, tall), layout="constrained")
    figure.suptitle(heading(part), fontsize=9, color=GREY, x=0.01, ha="left")
    return figure


def divide(ax: Axes, count: int, pitch: float, down: bool = True) -> list[Axes]:
    """Axes within an Axes, in a column or a row, ``pitch`` times their size apart; one is itself."""
    if count == 1:
        return [ax]
    ax.set_axis_off()
    size = 1 / (pitch * (count - 1) + 1)
    places = [size * pitch * place for place in range(count)]
    return [ax.inset_axes((0, 1 - size - at, 1, size) if down else (at, 0, size, 1)) for at in places]


def color_norm(arrays: Iterable[Any]) -> Normalize:
    """The scale of the colours, as far below zero as above, up to the largest finite number."""
    most = max(np.abs(array[np.isfinite(array)]).max(initial=0) for array in arrays) or 1.0
    return Normalize(-most, most)


def set_labels(panel: Axes, title: str, x: str, y: str = "") -> None:
    """A title, names for the axes, and time steps or units as whole numbers."""
    panel.set_title(title, loc="left", fontsize=9.5)
    panel.set_xlabel(x, fontsize=8.5)
    panel.set_ylabel(y, fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def heat_map(panel: Axes, grid: Any, norm: Normalize) -> None:
    """Draw a matrix, its first row on top."""
    panel.imshow(grid, cmap=SCALE, norm=norm, aspect="auto", interpolation="nearest")
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def color_bar(panel: Axes, norm: Normalize, **place: Any) -> None:
    """Draw the scale of the heat maps."""
    panel.figure.colorbar(ScalarMappable(norm, SCALE), **place).ax.tick_params(labelsize=8)

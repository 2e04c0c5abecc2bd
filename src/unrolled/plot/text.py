"""A text whose characters or words are colored by the value of a unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex

from unrolled.cells.base import positive_int
from unrolled.cells.descriptions import quantity_descriptions
from unrolled.plot.figures import (
    COLORMAP,
    GATE_COLORMAP,
    draw_color_bar,
    get_axes,
    select_row,
    size_in_inches,
    to_numpy,
)
from unrolled.tracing.color_scales import color_limits
from unrolled.tracing.colors import text_color
from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_LINE_HEIGHT = 0.21  # inches
_GLYPH_WIDTH = 0.602  # of the font size: DejaVu Sans Mono, the monospaced font of matplotlib
_MAX_FONT_SIZE = 9.0


def text(
    trace: Trace | LayerTrace,
    labels: Sequence[str] | None = None,
    unit: int = 0,
    quantity: str | None = None,
    batch: int = 0,
    width: int = 80,
    ax: Axes | None = None,
) -> Axes:
    """Draw a text with each character or word on the color of a unit's value at its time step.

    Gates have a scale from 0 to 1. All other quantities have one from −1 to 1, or to their largest magnitude
    if it is over 1.

    Args:
        trace: A trace or one of its layers.
        labels: The text: the character or word of each time step. Words without spaces are separated by one.
        unit: The unit.
        quantity: The quantity. The default is the hidden state.
        batch: The row of the batch.
        width: The maximum number of characters in a line.
        ax: Where to draw. The default is a new figure.

    Raises:
        TypeError: If there are no labels, or they aren't an iterable.
        ValueError: If the number of labels isn't the number of time steps, or the quantity is complex.
        KeyError: If there is no such quantity.
        IndexError: If there is no such row or unit.
    """
    part, batch, length = select_row(trace, batch)
    texts = _label_texts(labels, length)
    width = positive_int("width", width)
    name = next(iter(part.cell.state)) if quantity is None else quantity
    features = to_numpy(part[name][:length, batch].reshape(length, -1))
    unit = normalize_index("unit", unit, features.shape[1])
    values = features[:, unit]
    low, high = color_limits(part, name, length, batch)
    colormap, norm = COLORMAP if low else GATE_COLORMAP, Normalize(low, high)
    places = _place_labels(texts, width)
    rows = places[-1][0] + 1 if places else 1
    columns = max((column + len(label) for _, column, label in places), default=1)
    ax = get_axes(ax, part, _LINE_HEIGHT * rows + 0.75, batch)
    ax.set_axis_off()
    description = quantity_descriptions(type(part.cell)).get(name, "").split(":")[0]
    title = f"{name}[{unit}]{' – ' if description else ''}{description}"
    ax.set_title(title, loc="left", fontsize=9.5, parse_math=False)

    grid = np.zeros((rows, columns, 4))
    colors = colormap(norm(np.ma.masked_invalid(values)))
    points = 72 * size_in_inches(ax)[0] / columns
    font_size = min(_MAX_FONT_SIZE, 0.95 * points / _GLYPH_WIDTH)
    for color, (row, column, label) in zip(colors, places, strict=True):
        grid[row, column : column + len(label)] = color
        ax.text(
            column + (len(label) - 1) / 2,
            row,
            label,
            color=text_color(to_hex(color)),
            family="monospace",
            fontsize=font_size,
            ha="center",
            va="center",
            parse_math=False,
        ).set_in_layout(False)
    ax.imshow(grid, aspect="auto", interpolation="nearest")
    draw_color_bar(ax.inset_axes((1.02, 0, 0.02, 1)), norm, [values], colormap)
    return ax


def _label_texts(labels: Any, length: int) -> list[str]:
    """Return the labels as texts with visible signs for line breaks and tabs, and a space between words."""
    if isinstance(labels, (bytes, Mapping)) or not isinstance(labels, Iterable):
        raise TypeError(
            "the plot 'text' needs labels: an iterable of strings, one per time step, such as the characters "
            f"of the text; got {type(labels).__name__}"
        )
    texts = [str(label) for label in labels]
    if len(texts) != length:
        raise ValueError(f"labels should have one entry per time step ({length}), got {len(texts)}")
    are_words = any(len(label) > 1 for label in texts) and not any(
        character.isspace() for label in texts for character in label
    )
    return [f"{label} " for label in texts] if are_words else texts


def _place_labels(texts: Sequence[str], width: int) -> list[tuple[int, int, str]]:
    """Set the labels in lines.

    Args:
        texts: The labels. A line ends after a label that ends with a line break.
        width: The maximum number of characters in a line. A longer label has a line of its own.

    Returns:
        For each label, its line, its first column, and its text with visible signs.
    """
    places = []
    row = column = 0
    for label in texts:
        shown = label.replace("\n", "⏎").replace("\t", "⇥") or " "
        if column and column + len(shown.rstrip()) > width:
            row, column = row + 1, 0
        places.append((row, column, shown))
        row, column = (row + 1, 0) if label.endswith("\n") else (row, column + len(shown))
    return places

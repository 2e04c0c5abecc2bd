"""The diagram of a cell's step, drawn from what the trace recorded, with the numbers of one unit in it.

``trace.plot("cell")`` returns a :class:`CellDrawing`.
"""

from __future__ import annotations

from pathlib import Path

from unrolled.cells.descriptions import quantity_descriptions
from unrolled.diagram.graph import build
from unrolled.diagram.groups import fold
from unrolled.diagram.layout import layout
from unrolled.diagram.model import DiagramError
from unrolled.diagram.numbers import scales
from unrolled.diagram.svg import svg
from unrolled.diagram.unfold import unfold
from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.layer_trace import LayerTrace

__all__ = ["CellDrawing", "DiagramError", "draw"]


class CellDrawing:
    """A picture of one step of a cell. A notebook shows it.

    Attributes:
        svg: The picture as an SVG document.
    """

    def __init__(self, svg: str) -> None:
        self.svg = svg

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the picture to an SVG file.

        Args:
            path: Path of the file. It ends in ``.svg``.

        Returns:
            The path.

        Raises:
            ValueError: If the path doesn't end in ``.svg``.
            OSError: If the file can't be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise ValueError(
                f"the drawing of a cell is an SVG file: expected a path ending in .svg, got {path}"
            )
        path.write_text(self.svg, encoding="utf-8")
        return path


def draw(
    part: LayerTrace, *, step: int | None = None, unit: int = 0, batch: int = 0, theme: str = "auto"
) -> CellDrawing:
    """Draw one step of a cell.

    States are lanes on top, and what layers read are rails below. The color and the width of a line are the
    number that it carries, a gate is filled as far as it is open, and a ring at a product shows the same.

    Args:
        part: A layer of a trace.
        step: The time step. None for the third one, or the last one of a shorter sequence.
        unit: The unit whose numbers are shown.
        batch: The row.
        theme: ``"light"``, ``"dark"``, or ``"auto"`` for that of the reader's system.

    Raises:
        DiagramError: If the step has no diagram. The message says why.
        IndexError: If the step, unit or row is out of range, or the step wasn't recorded.
        ValueError: If there is no such theme.
    """
    batch = normalize_index("row", batch, len(part.lengths))
    traced = build(part, batch)
    chosen = traced.steps[min(2, len(traced.steps) - 1)] if step is None else step
    chosen = normalize_index("time step", chosen, int(part.lengths[batch]))
    part.at(chosen)
    unit = normalize_index("unit", unit, part.cell.hidden)
    drawn = unfold(fold(traced.diagram))
    return CellDrawing(
        svg(
            drawn,
            layout(drawn),
            traced.values[traced.steps.index(chosen)],
            unit=unit,
            theme=theme,
            meanings=quantity_descriptions(type(part.cell)),
            limits=scales(drawn, traced.values),
        )
    )

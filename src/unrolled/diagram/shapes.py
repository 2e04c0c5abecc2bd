"""The shapes of nodes and lines: sizes, borders and round corners."""

from __future__ import annotations

from collections.abc import Sequence

from unrolled.diagram.model import DiagramNode
from unrolled.diagram.placed import XY, Arrow, PlacedNode
from unrolled.diagram.text import name_width, shortened, symbol, width

CORNER, HEAD = 9.0, 7.0  # radius of corners, and length of arrow heads
CIRCLE, PILL_HEIGHT, BOX_WIDTH, BOX_HEIGHT, BOX_RADIUS = 30.0, 28.0, 60.0, 54.0, 8.0
NORMALIZED = "norm"  # written in a box whose weighted sums are normalized
_CIRCLE_GLYPH = 2  # a circle has room for so many characters
_LONGEST_INDEX = 3  # of a matrix, in its box


def is_circle(node: DiagramNode) -> bool:
    """Whether a node is drawn as a circle."""
    return node.kind == "operation" and len(node.glyph) <= _CIRCLE_GLYPH


def is_softmax(node: DiagramNode) -> bool:
    """Whether a node is filled with the shares of all units."""
    return node.glyph.startswith("softmax")


def weight_index(node: DiagramNode) -> str:
    """Return the index of the matrix in a box without a name: ``"hh"`` for ``weight_hh``, or ``""``."""
    if node.glyph != "W" or node.name or len(node.terms) != 1:
        return ""
    name, _, index = node.terms[0].parameter.partition("_")
    return index if name == "weight" and len(index) <= _LONGEST_INDEX else ""


def is_fader(node: DiagramNode) -> bool:
    """Whether a node has a slider between its first two operands."""
    return node.glyph == "lerp" and len(node.terms) == 3


def is_normalized(node: DiagramNode) -> bool:
    """Whether the weighted sums that a node reads are normalized."""
    return any(term.normalized for term in node.terms)


def name_size(name: str) -> float:
    """Return the font size of a name in a box."""
    base, index = symbol(name)
    return 11.0 if len(base) > 6 else 13.0 if len(base) + len(index) > 5 else 17.0


def node_size(node: DiagramNode) -> tuple[float, float, float]:
    """Return the width, height and corner radius of a node."""
    if node.kind == "layer":
        text = width(shortened(node.glyph), 15) + 8
        if node.name:
            glyph = width(shortened(node.glyph) + NORMALIZED * is_normalized(node), 12) + 10
            text = max(name_width(node.name, name_size(node.name)) + 8, glyph)
        return max(BOX_WIDTH, text), BOX_HEIGHT, BOX_RADIUS
    if is_circle(node):
        return CIRCLE, CIRCLE, CIRCLE / 2
    return max(34.0, width(shortened(node.glyph), 13.5) + 12), PILL_HEIGHT, PILL_HEIGHT / 2


def direction(value: float) -> int:
    """Return 1, -1 or 0."""
    return (value > 0) - (value < 0)


def border(node: PlacedNode, end: XY, other: XY, margin: float = 0.0) -> XY:
    """Return where a line from a point inside a node to another point leaves it."""
    dx, dy = direction(other[0] - end[0]), direction(other[1] - end[1])
    off = abs(end[1] - node.y) if dx else abs(end[0] - node.x)
    half = (node.width if dx else node.height) / 2
    across = (node.height if dx else node.width) / 2
    inner = across - node.radius  # the border is straight as far as this, then a quarter of a circle
    if off > inner:
        half -= node.radius - max(0.0, node.radius**2 - (off - inner) ** 2) ** 0.5
    if dx:
        return node.x + dx * (half + margin), end[1]
    return end[0], node.y + dy * (half + margin)


def line_path(points: Sequence[XY], arrow: Arrow | None) -> str:
    """Return a line as SVG path data with round corners, as far as its arrow head."""
    drawn = list(points)
    if arrow:
        drawn[-1] = (arrow.x - arrow.dx * HEAD, arrow.y - arrow.dy * HEAD)
    return rounded_path(drawn)


def rounded_path(points: Sequence[XY]) -> str:
    """Return a line as SVG path data with round corners."""
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:], strict=False):
        before, after = abs(bx - ax) + abs(by - ay), abs(cx - bx) + abs(cy - by)
        radius = min(CORNER, before / 2, after / 2)
        start = (bx - direction(bx - ax) * radius, by - direction(by - ay) * radius)
        stop = (bx + direction(cx - bx) * radius, by + direction(cy - by) * radius)
        path += f"L{start[0]:.5g} {start[1]:.5g}Q{bx:.5g} {by:.5g} {stop[0]:.5g} {stop[1]:.5g}"
    return path + f"L{points[-1][0]:.5g} {points[-1][1]:.5g}"

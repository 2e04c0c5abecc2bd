"""Places for names and digits that don't fit into their nodes, where nothing else is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unrolled.diagram.crossings import pieces
from unrolled.diagram.model import Diagram, DiagramNode
from unrolled.diagram.placed import Label, Layout, PlacedNode
from unrolled.diagram.shapes import is_circle
from unrolled.diagram.text import name_width

DIGITS_WIDTH, LINE_HEIGHT, NAME_SIZE = 43.0, 14.0, 15.0
PORT_WIDTH = 52.0
_LINE_MARGIN, _FAR = 3.0, 3.0


@dataclass(frozen=True)
class Area:
    """A rectangle."""

    x1: float
    y1: float
    x2: float
    y2: float

    def overlaps(self, other: Area) -> bool:
        """Whether two rectangles share more than a border."""
        return self.x1 < other.x2 and other.x1 < self.x2 and self.y1 < other.y2 and other.y1 < self.y2


def place_labels(diagram: Diagram, layout: Layout) -> tuple[Layout, int, int]:
    """Find a place for the label of each node that has one.

    Args:
        diagram: The diagram.
        layout: Its layout without labels.

    Returns:
        The layout with labels, the number of nodes whose label has no free place, so that they have none, and
        the number of labels on a line.
    """
    ends = {state.end for state in diagram.states}  # their digits are at the right end
    taken = [_node_area(node) for node in layout.nodes]
    taken += port_areas(layout)
    taken += [Area(x - 5, y - 6, x + 5, y + 6) for x, y in (r.minus for r in layout.routes if r.minus)]
    lines = [
        Area(p.x1 - _LINE_MARGIN, p.y1 - _LINE_MARGIN, p.x2 + _LINE_MARGIN, p.y2 + _LINE_MARGIN)
        for p in pieces(layout.routes)
    ]
    heads = [
        Area(*((a.x - 9, a.y - 8, a.x + 9, a.y + 8) if a.dx else (a.x - 8, a.y - 9, a.x + 8, a.y + 9)))
        for a in (route.arrow for route in layout.routes)
        if a is not None
    ]
    lines += heads
    nodes: list[PlacedNode] = []
    missing = on_lines = 0
    for node, placed in zip(diagram.nodes, layout.nodes, strict=True):
        if node.kind == "layer" or node.id in ends:
            nodes.append(placed)
            continue
        best = None
        for rank, (label, area) in enumerate(_spots(node, placed)):
            inside = (
                area.x1 >= 2 and area.x2 <= layout.width - 2 and area.y1 >= 1 and area.y2 <= layout.height
            )
            if inside and not any(area.overlaps(other) for other in taken):
                crossed = sum(area.overlaps(line) for line in lines)
                if best is None or (crossed, rank) < best[:2]:
                    best = (crossed, rank, label, area)
        if best is None:
            missing += 1
            nodes.append(placed)
        else:
            on_lines += best[0] > 0
            taken.append(best[3])
            nodes.append(replace(placed, label=best[2]))
    return replace(layout, nodes=tuple(nodes)), missing, on_lines


def port_areas(layout: Layout) -> list[Area]:
    """Return where the names and digits of ports are, and the arrow of the output."""
    if layout.orientation == "vertical":
        return _upright_port_areas(layout)
    areas = []
    for port in layout.ports:
        if port.side == "in":
            areas.append(Area(0, port.y - 25, PORT_WIDTH - 4, port.y + 22))
        elif port.side == "out":
            areas.append(Area(layout.width - PORT_WIDTH, port.y - 25, layout.width, port.y + 22))
        else:
            areas.append(Area(port.x + 6, port.y - 3, port.x + 32, port.y + 16))
    x, y = layout.output
    areas.append(Area(x - 20, y - 50, x + 20, y))
    return areas


def _upright_port_areas(layout: Layout) -> list[Area]:
    areas = []
    for port in layout.ports:
        if port.side == "below":
            areas.append(Area(port.text_x - 26, port.name_y - 14, port.text_x, port.name_y + 6))
        else:
            areas.append(Area(port.x - 4, port.name_y - 14, port.text_x + 38, port.name_y + 19))
    x, y = layout.output
    areas.append(Area(x, y - 6, x + 40, y + 18))
    return areas


def _node_area(node: PlacedNode) -> Area:
    half_width, half_height = node.width / 2 + 1, node.height / 2 + 1
    return Area(node.x - half_width, node.y - half_height, node.x + half_width, node.y + half_height)


def label_size(node: DiagramNode) -> tuple[float, float]:
    """Return the size of the label of a node: its name, if it has one, over its digits."""
    if not node.name:
        return DIGITS_WIDTH, LINE_HEIGHT
    return max(DIGITS_WIDTH, name_width(node.name, NAME_SIZE)), 2 * LINE_HEIGHT


def _spots(node: DiagramNode, placed: PlacedNode) -> list[tuple[Label, Area]]:
    """Return the places around a node, the usual ones first."""
    wide, tall = label_size(node)
    x, y = placed.x, placed.y
    half_width, half_height = placed.width / 2 + 3, placed.height / 2 + 3
    corner_x = 0.72 if is_circle(node) else 1.0
    corner_y = 0.62 if is_circle(node) else 1.0
    corners: list[tuple[float, float]] = []
    for up in (True, False):
        for right in (True, False):
            across = (half_width * corner_x, 5.0)
            along = (half_height * corner_y, half_height)
            for dx, dy in zip(across, along, strict=True):
                corners.append((x + dx if right else x - dx - wide, y - dy - tall if up else y + dy))
    sides = [
        (x + half_width, y - tall / 2),
        (x - half_width - wide, y - tall / 2),
        (x - wide / 2, y - half_height - tall),
        (x - wide / 2, y + half_height),
    ]
    far = [
        (left + dx * 8, top + dy * 8)
        for left, top in corners
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1))
    ]
    return [
        _label(node, Area(left, top, left + wide, top + tall), x) for left, top in (*corners, *sides, *far)
    ]


def _label(node: DiagramNode, area: Area, center: float) -> tuple[Label, Area]:
    middle = (area.x1 + area.x2) / 2
    anchor = "end" if middle < center - 1 else "start" if middle > center + 1 else "middle"
    text_x = {"end": area.x2, "start": area.x1, "middle": middle}[anchor]
    name_y = area.y1 + 10 if node.name else None
    label = Label(area.x1, area.y1, area.x2 - area.x1, area.y2 - area.y1, anchor, text_x, name_y, area.y2 - 2)
    return label, area

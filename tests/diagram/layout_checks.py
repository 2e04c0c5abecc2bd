"""Checks of a layout: what lies on what, and whether lines lead from their sources to their nodes."""

from __future__ import annotations

from itertools import combinations, pairwise

from unrolled.diagram.model import Diagram
from unrolled.diagram.placed import Layout, PlacedNode, Route

XY = tuple[float, float]
Rectangle = tuple[float, float, float, float]


def rectangle(node: PlacedNode, margin: float = 0.0) -> Rectangle:
    half_width, half_height = node.width / 2 + margin, node.height / 2 + margin
    return node.x - half_width, node.y - half_height, node.x + half_width, node.y + half_height


def overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def pieces(route: Route) -> list[Rectangle]:
    return [
        (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for (x1, y1), (x2, y2) in pairwise(route.points)
    ]


def on_border(point: XY, node: PlacedNode, tolerance: float) -> bool:
    """Whether a point is on the border of a node, whose corners are round."""
    x, y = abs(point[0] - node.x), abs(point[1] - node.y)
    straight_x, straight_y = node.width / 2 - node.radius, node.height / 2 - node.radius
    dx, dy = max(0.0, x - straight_x), max(0.0, y - straight_y)
    if dx and dy:
        return abs((dx**2 + dy**2) ** 0.5 - node.radius) < tolerance
    return min(abs(x - node.width / 2), abs(y - node.height / 2)) < tolerance


def on_piece(point: XY, route: Route) -> bool:
    return any(
        x1 - 0.01 <= point[0] <= x2 + 0.01 and y1 - 0.01 <= point[1] <= y2 + 0.01
        for x1, y1, x2, y2 in pieces(route)
    )


def check_boxes(diagram: Diagram, layout: Layout) -> None:
    """Nodes, labels and ports are inside the picture, and none is on another."""
    boxes = {f"node {node.id}": rectangle(node) for node in layout.nodes}
    for node in layout.nodes:
        if node.label:
            label = node.label
            boxes[f"label {node.id}"] = (label.x, label.y, label.x + label.width, label.y + label.height)
    for port in layout.ports:
        if port.value_y is None:
            continue
        if layout.orientation == "vertical":
            boxes[f"{port.side} {port.name} name"] = (
                port.x + 7,
                port.name_y - 12,
                port.x + 40,
                port.name_y + 3,
            )
            boxes[f"{port.side} {port.name} digits"] = (
                port.x + 7,
                port.value_y - 9,
                port.x + 43,
                port.value_y + 1,
            )
        else:
            left = 0.0 if port.side == "in" else layout.width - 40
            boxes[f"{port.side} {port.name} name"] = (left, port.y - 24, left + 40, port.y - 6)
            boxes[f"{port.side} {port.name} digits"] = (left, port.y + 9, left + 40, port.y + 21)
    for (name, a), (other, b) in combinations(boxes.items(), 2):
        assert not overlap(a, b), f"{diagram.cell}: {name} is on {other}"
    for name, (x1, y1, x2, y2) in boxes.items():
        assert min(x1, y1) >= -0.01, (diagram.cell, name)
        assert x2 <= layout.width + 0.01, (diagram.cell, name)
        assert y2 <= layout.height + 0.01, (diagram.cell, name)


def check_lines(diagram: Diagram, layout: Layout) -> None:
    """No line runs through a node, or on a line of another net."""
    for route in layout.routes:
        for x, y in route.points:
            assert 0 <= x <= layout.width, (diagram.cell, route)
            assert 0 <= y <= layout.height, (diagram.cell, route)
        for piece in pieces(route):
            assert piece[0] == piece[2] or piece[1] == piece[3], (diagram.cell, route)
            for node in layout.nodes:
                x1, y1, x2, y2 = rectangle(node, -2)
                ends = (route.points[0], route.points[-1])
                if any(
                    on_border(end, node, 2.0) for end in ends
                ):  # at its own nodes only as far as the border
                    inset = node.radius * 0.6
                    x1, y1, x2, y2 = x1 + inset, y1 + inset, x2 - inset, y2 - inset
                through = piece[0] <= x2 and x1 <= piece[2] and piece[1] <= y2 and y1 <= piece[3]
                assert not through, f"{diagram.cell}: {route.net} to {route.target} runs through {node.id}"
    for a, b in combinations(layout.routes, 2):
        if a.net == b.net or set(a.sources) & set(b.sources):
            continue
        for p in pieces(a):
            for q in pieces(b):
                for along, across in ((0, 1), (1, 0)):
                    flat = p[across] == p[across + 2] and q[across] == q[across + 2]
                    shared = min(p[along + 2], q[along + 2]) - max(p[along], q[along])
                    beside = abs(p[across] - q[across]) < 3
                    message = f"{diagram.cell}: {a.net} to {a.target} is on {b.net} to {b.target}"
                    assert not (flat and beside and shared > 1), message


def starts_at(route: Route, source: str, layout: Layout) -> bool:
    """Whether a line starts at the border of a node, or at the port of a state or the input."""
    node = next((node for node in layout.nodes if node.id == source), None)
    if node:
        return on_border(route.points[0], node, 0.5)
    name, sides = source.removeprefix("before:"), ("in", "below")
    return any(
        port.name == name and port.side in sides and (port.x, port.y) == route.points[0]
        for port in layout.ports
    )


def check_connections(diagram: Diagram, layout: Layout) -> None:
    """Each term has a line that starts at its source and ends at its node, and each state one that leaves."""
    places = {node.id: node for node in layout.nodes}
    rails = [route for route in layout.routes if route.kind == "rail"]
    for node in diagram.nodes:
        for term in node.terms:
            if term.source is None:
                continue
            found = [r for r in layout.routes if r.target == node.id and term.source in r.sources]
            assert found, f"{diagram.cell}: no line from {term.source} to {node.id}"
            for route in found:
                assert on_border(route.points[-1], places[node.id], 2.0), (diagram.cell, route)
                assert route.arrow is not None
                assert (route.arrow.x, route.arrow.y) == route.points[-1]
                if route.kind != "tap":
                    assert starts_at(route, term.source, layout), (diagram.cell, route)
                    continue
                of_net = [rail for rail in rails if rail.net == route.net]
                assert any(on_piece(route.points[0], rail) for rail in of_net), (diagram.cell, route)
                assert any(
                    term.source in rail.sources and starts_at(rail, term.source, layout) for rail in of_net
                )
            if any(t.sign < 0 for t in node.terms if t.source == term.source):
                assert any(route.minus for route in found), (diagram.cell, node.id)
    for state in diagram.states:
        leaving = [r for r in layout.routes if r.state == state.name and r.target is None]
        assert len(leaving) == 1, (diagram.cell, state)
        upright = layout.orientation == "vertical"
        end = layout.height if upright else layout.width
        assert leaving[0].points[-1][upright] == end - 14
        port = next(port for port in layout.ports if port.side == "out" and port.name == state.name)
        assert (port.x, port.y) == leaving[0].points[-1]
        assert state.end in leaving[0].sources
    for name, place in layout.belts:
        lane = [r for r in layout.routes if r.kind == "lane" and r.state == name]
        across = 0 if layout.orientation == "vertical" else 1
        assert all(point[across] == place for route in lane for point in route.points)


def check_layout(diagram: Diagram, layout: Layout) -> None:
    check_boxes(diagram, layout)
    check_lines(diagram, layout)
    check_connections(diagram, layout)

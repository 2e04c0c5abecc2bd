"""Diagrams whose time runs down, for narrow screens: layouts with the axes swapped."""

from __future__ import annotations

from dataclasses import replace

from unrolled.diagram.placed import Arrow, Layout, Port, Route
from unrolled.diagram.shapes import line_path

_BESIDE = 7.0  # between a line and its name
_ABOVE_NAME = 14.0  # from the output to where it would be in a horizontal layout, above its name


def turned_upright(layout: Layout) -> Layout:
    """Swap the axes of a layout without labels. Texts stay horizontal.

    Args:
        layout: A horizontal layout, made for nodes whose width and height are swapped.

    Returns:
        The upright layout: lanes are at the left, rails at the right.
    """
    width, height = layout.height, layout.width
    return replace(
        layout,
        width=width,
        height=height,
        nodes=tuple(
            replace(node, x=node.y, y=node.x, width=node.height, height=node.width) for node in layout.nodes
        ),
        routes=tuple(_turned_route(route) for route in layout.routes),
        ports=tuple(_turned_port(port, width, height) for port in layout.ports),
        dots=tuple(replace(dot, x=dot.y, y=dot.x) for dot in layout.dots),
        output=(layout.output[1], layout.output[0] - _ABOVE_NAME),
        orientation="vertical",
    )


def _turned_route(route: Route) -> Route:
    points = tuple((y, x) for x, y in route.points)
    arrow = route.arrow and Arrow(route.arrow.y, route.arrow.x, route.arrow.dy, route.arrow.dx)
    minus = route.minus and (route.minus[1], route.minus[0])
    return replace(route, points=points, path=line_path(points, arrow), arrow=arrow, minus=minus)


def _turned_port(port: Port, width: float, height: float) -> Port:
    x, y = port.y, port.x
    if port.side == "below":  # the input enters from the right
        return replace(port, x=x, y=y, anchor="end", text_x=width - 5, name_y=y - 4)
    name_y = 14.0 if port.side == "in" else height - 20
    return replace(port, x=x, y=y, anchor="start", text_x=x + _BESIDE, name_y=name_y, value_y=name_y + 15)

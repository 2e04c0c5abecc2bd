"""Where lines cross, and where a line divides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from unrolled.diagram.lanes import BEFORE
from unrolled.diagram.placed import XY, Dot, PlacedNode, Route


@dataclass(frozen=True)
class Piece:
    """A straight piece of a line: horizontal or vertical."""

    net: str
    horizontal: bool
    x1: float
    y1: float
    x2: float
    y2: float
    is_vector: bool


def pieces(routes: Iterable[Route]) -> Iterator[Piece]:
    """Yield the straight pieces of lines, with the smaller coordinates first."""
    for route in routes:
        for (x1, y1), (x2, y2) in pairwise(route.points):
            yield Piece(
                route.net, y1 == y2, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), route.is_vector
            )


def crossing_points(routes: Sequence[Route]) -> set[XY]:
    """Return the points where lines of different nets cross."""
    found = list(pieces(routes))
    upright = [piece for piece in found if not piece.horizontal]
    return {
        (v.x1, h.y1)
        for h in found
        if h.horizontal
        for v in upright
        if h.net != v.net and h.x1 + 1 < v.x1 < h.x2 - 1 and v.y1 + 1 < h.y1 < v.y2 - 1
    }


def divisions(routes: Sequence[Route], nodes: Sequence[PlacedNode]) -> list[Dot]:
    """Return the points outside nodes from which a net's lines leave in three or more directions."""
    nets: dict[str, list[Piece]] = {}
    for piece in pieces(routes):
        nets.setdefault(piece.net, []).append(piece)
    dots: dict[XY, Dot] = {}
    for route in routes:
        if (
            route.kind == "rail"
            and route.points[0][1] != route.points[-1][1]
            and route.sources[0].startswith(BEFORE)
        ):
            x, y = route.points[1]  # it branches off the lane of its state
            dots[x, y] = Dot(x, y, route.sources[0], False)
    for net, lines in nets.items():
        for x, y in dict.fromkeys((x, y) for p in lines for x, y in ((p.x1, p.y1), (p.x2, p.y2))):
            sides = {
                "left": any(p.horizontal and p.y1 == y and p.x1 < x <= p.x2 for p in lines),
                "right": any(p.horizontal and p.y1 == y and p.x1 <= x < p.x2 for p in lines),
                "up": any(not p.horizontal and p.x1 == x and p.y1 < y <= p.y2 for p in lines),
                "down": any(not p.horizontal and p.x1 == x and p.y1 <= y < p.y2 for p in lines),
            }
            inside = any(abs(x - n.x) <= n.width / 2 + 1 and abs(y - n.y) <= n.height / 2 + 1 for n in nodes)
            if sum(sides.values()) > 2 and not inside:
                here = [p for p in lines if p.x1 <= x <= p.x2 and p.y1 <= y <= p.y2]
                dots.setdefault((x, y), Dot(x, y, net, all(p.is_vector for p in here)))
    return list(dots.values())

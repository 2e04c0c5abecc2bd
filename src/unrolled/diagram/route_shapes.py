"""The shapes that a line between two points of the grid can have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from unrolled.diagram.board import Ints, Segments

_FORBIDDEN = 10**9

Point = tuple[int, int]
P = TypeVar("P", bound=tuple[float, float])

# A simple route runs horizontally to the x of its turn, vertically to the y of its turn, horizontally to the
# x of its end and vertically to its end. Pieces without length are not drawn.
_X1, _X2, _AFTER_X1, _BEFORE_X2 = range(4)  # indices into the coordinates below
_Y1, _Y2, _BELOW_Y1, _ABOVE_Y1, _BELOW_Y2, _ABOVE_Y2 = range(6)
_SIMPLE = (
    (_X1, _Y2),
    (_X2, _Y2),
    (_AFTER_X1, _Y2),
    (_BEFORE_X2, _Y2),
    (_X1, _BELOW_Y1),
    (_X1, _ABOVE_Y1),
    (_X1, _BELOW_Y2),
    (_X1, _ABOVE_Y2),
    (_AFTER_X1, _BELOW_Y1),
    (_AFTER_X1, _ABOVE_Y1),
)
_TURN_X, _TURN_Y = np.array(_SIMPLE).T
_ENDS_UPRIGHT = np.array([False, True, False, False, True, True, True, True, True, True])
_FROM_LANE = np.array([False] * 8 + [True] * 2)


def simple_routes(
    start: tuple[Ints, Ints],
    end: tuple[Ints, Ints],
    lane_start: NDArray[np.bool_],
    outward: NDArray[np.bool_],
) -> tuple[Segments, Ints]:
    """Return simple routes for a line of each placement.

    Args:
        start: The x and y where each line starts, ``(batch,)``.
        end: The x and y where it ends.
        lane_start: Whether it starts at the left end of a lane.
        outward: Whether it ends at the right end, so that its last piece is horizontal.

    Returns:
        The pieces of the routes, ``(batch, routes, 4)``, and an additional cost of each route.
    """
    (x1, y1), (x2, y2) = start, end
    xs = np.stack([x1, x2, x1 + 1, x2 - 1], 1)
    ys = np.maximum(np.stack([y1, y2, y1 - 1, y1 + 1, y2 - 1, y2 + 1], 1), 0)
    turn_x, turn_y = xs[:, _TURN_X], ys[:, _TURN_Y]
    start_x, start_y = np.broadcast_to(x1[:, None], turn_x.shape), np.broadcast_to(y1[:, None], turn_x.shape)
    stop_x, stop_y = np.broadcast_to(x2[:, None], turn_x.shape), np.broadcast_to(y2[:, None], turn_x.shape)
    pieces = [
        (start_y, start_x, turn_x),
        (turn_x, start_y, turn_y),
        (turn_y, turn_x, stop_x),
        (stop_x, turn_y, stop_y),
    ]
    line, first, last = (np.stack(part, -1) for part in zip(*pieces, strict=True))
    vertical = np.broadcast_to(np.array([0, 1, 0, 1]), line.shape)
    extra = np.where(outward[:, None] & _ENDS_UPRIGHT, _FORBIDDEN, 0)
    extra += np.where(~lane_start[:, None] & _FROM_LANE, _FORBIDDEN, 0)
    return Segments(vertical, line, np.minimum(first, last), np.maximum(first, last)), extra


def all_routes(start: Point, end: Point, top: int, last: str) -> list[tuple[Point, ...]]:
    """Return routes of up to five pieces between two points.

    They leave and enter nodes at any side, and turn between columns and between rows. One of them never runs
    through a node, wherever the nodes are.

    Args:
        start: Where the route starts.
        end: Where it ends.
        top: The highest row.
        last: Direction of the last piece: ``"across"`` to the right end, ``"upright"`` to a node on a lane,
            ``"any"`` otherwise.
    """
    (x1, y1), (x2, y2) = start, end
    left, right = min(x1, x2) - 1, max(x1, x2) + 1
    columns = [m for m in range(max(1, left), right + 1) if m % 2]
    rows = [m for m in range(max(1, min(y1, y2) - 1), min(top, max(y1, y2) + 1) + 1) if m % 2]
    near_x1, near_x2 = [m for m in (x1 + 1, x1 - 1) if m > 0], [m for m in (x2 - 1, x2 + 1) if m > 0]
    near_y1, near_y2 = [m for m in (y1 + 1, y1 - 1) if m > 0], [m for m in (y2 + 1, y2 - 1) if m > 0]
    across = [((x1, y2),), *[((m, y1), (m, y2)) for m in columns]]
    across += [((x1, m), (n, m), (n, y2)) for m in near_y1 for n in near_x2]
    across += [((n, y1), (n, m), (k, m), (k, y2)) for n in near_x1 for m in rows for k in near_x2]
    upright: list[tuple[Point, ...]] = [((x2, y1),), *[((x1, m), (x2, m)) for m in rows]]
    upright += [((n, y1), (n, m), (x2, m)) for n in near_x1 for m in near_y2]
    upright += [((x1, m), (n, m), (n, k), (x2, k)) for m in near_y1 for n in columns for k in near_y2]
    if last == "across":
        inner = [turns for turns in across if turns[-1][0] <= x2]
    else:
        inner = upright if last == "upright" else across + upright
    routes = dict.fromkeys(simplified((start, *turns, end)) for turns in inner)
    return list(routes)


def simplified(points: Sequence[P]) -> tuple[P, ...]:
    """Return a route without the points where it doesn't turn."""
    kept: list[P] = []
    for point in points:
        if kept and kept[-1] == point:
            continue
        while len(kept) > 1 and (
            kept[-2][0] == kept[-1][0] == point[0] or kept[-2][1] == kept[-1][1] == point[1]
        ):
            kept.pop()
        kept.append(point)
    return tuple(kept)

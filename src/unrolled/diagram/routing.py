"""Routes of all lines of a placement, on a grid of half columns and half rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unrolled.diagram.board import Board, Ints, Segments
from unrolled.diagram.lanes import BEFORE, Edge, Wiring

FIRST = 2  # column 0; lanes start at 0, branches are at 1
_FORBIDDEN = 10**9
_COLUMN, _ROW, _RAISED, _UNORDERED = 220, 300, 350, 15
_COLLISION, _LANE_ORDER, _BACKWARD, _RAIL_CROSSING = 30000, 12000, 1400, 350

Point = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Where nodes are: the column and row of each, and the height of each lane.

    Attributes:
        columns: Column of each node.
        rows: Row of each node from 1 on, counted from below. It is unused for nodes on a lane.
        order: Position of each lane, counted from below.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class GridRoute:
    """One line on the grid.

    Attributes:
        net: What it carries: the id of a source, or ``"rail N"`` for the line of several rails.
        points: Its corners.
        edge: The edge that it draws, if it is one.
        lane: The state along whose lane it runs, if it does.
        tap: The rail line that it branches off, if it does.
        node: The node that it ends at; None at the right end, or on a rail.
    """

    net: str
    points: tuple[Point, ...]
    edge: Edge | None = None
    lane: str | None = None
    tap: int | None = None
    node: int | None = None


class Router:
    """Routes the lines of a wiring.

    Args:
        wiring: The connections.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.base = 2 * max(0, len(wiring.floor) - 1)  # the row of the rails; more outputs are below
        self.group_nets = [group_net(group) for group in wiring.groups]
        names = [*self.group_nets, *[self.net_of(edge) for edge in wiring.edges]]
        names += [BEFORE + name for name in wiring.lanes]
        names += [wiring.ids[node] for spine in wiring.spines for node in spine]
        self.nets = {name: k for k, name in enumerate(dict.fromkeys(names))}
        self._edge_nets = np.array([self.nets[self.net_of(edge)] for edge in wiring.edges], np.int64)
        self._lane_of = np.array(wiring.lane_of, np.int64)
        tapped = {tap.node for tap in wiring.taps}
        layers = [k for k, kind in enumerate(wiring.kinds) if kind == "layer"]
        self._layers = np.array(layers, np.int64)
        self._low = np.array([k for k in layers if k in tapped and wiring.lane_of[k] < 0], np.int64)
        self.line_taps = sorted({(wiring.group_of(tap.rail), tap.node) for tap in wiring.taps})
        self._lane_starts = np.array(
            [
                edge.start is None and edge.source.removeprefix(BEFORE) in wiring.lanes
                for edge in wiring.edges
            ],
            bool,
        )
        self._outward = np.array([edge.end is None and edge.rail is None for edge in wiring.edges], bool)
        self._to_rail = np.array([edge.rail is not None for edge in wiring.edges], bool)

    def net_of(self, edge: Edge) -> str:
        """Return the net of an edge: that of its source."""
        source = edge.source
        below = edge.start is None and (source == "x" or source.removeprefix(BEFORE) in self.wiring.floor)
        return self.group_nets[self.wiring.group_of(source)] if below else source

    def positions(self, placements: list[Placement]) -> tuple[Ints, Ints, Ints, Ints]:
        """Return the x and y of nodes, the y of lanes and the x of the right end."""
        columns = np.array([p.columns for p in placements], np.int64)
        rows = np.array([p.rows for p in placements], np.int64)
        order = np.array([p.order for p in placements], np.int64).reshape(len(placements), -1)
        inner = np.where(self._lane_of < 0, rows, 0).max(1, initial=0)
        lanes = self.base + 2 * (inner[:, None] + 1 + order)
        y = self.base + 2 * rows
        on_lane = self._lane_of >= 0
        y[:, on_lane] = lanes[:, self._lane_of[on_lane]]
        return FIRST + 2 * columns, y, lanes, FIRST + 2 * (columns.max(1, initial=0) + 1)

    def ends(self, x: Ints, y: Ints, lanes: Ints, right: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return where each edge starts and ends, ``(batch, edges)`` each."""
        shape = (len(x), len(self.wiring.edges))
        x1, y1, x2, y2 = (np.empty(shape, np.int64) for _ in range(4))
        for k, edge in enumerate(self.wiring.edges):
            state = edge.source.removeprefix(BEFORE)
            if edge.start is not None:
                x1[:, k], y1[:, k] = x[:, edge.start], y[:, edge.start]
            elif self._lane_starts[k]:
                x1[:, k], y1[:, k] = 1, lanes[:, self.wiring.lanes.index(state)]
            else:
                x1[:, k], y1[:, k] = 1, self.base
            if edge.end is not None:
                x2[:, k], y2[:, k] = x[:, edge.end], y[:, edge.end]
            elif edge.rail is not None:
                x2[:, k], y2[:, k] = x1[:, k] + 1, self.base
            else:
                assert edge.state is not None
                x2[:, k], y2[:, k] = right, self.base - 2 * self.wiring.floor.index(edge.state)
        return x1, y1, x2, y2

    def costs(self, placements: list[Placement]) -> Ints:
        """Return the cost of each placement, with a few simple routes tried for each line."""
        x, y, lanes, right = self.positions(placements)
        board = Board(len(placements), len(self.nets), x, y)
        total = self._placement_costs(x, y, right) + _COLLISION * board.collisions
        for net, points in self._fixed(x, y, lanes, right):
            xs, ys = (np.stack(np.broadcast_arrays(*values), -1) for values in zip(*points, strict=True))
            segments = Segments.between(xs, ys)
            nets = np.full(len(x), net)
            routes = Segments(*(part[:, None] for part in _fields(segments)))
            total += board.cost(nets, routes)[:, 0]
            board.add(nets, segments)
        x1, y1, x2, y2 = self.ends(x, y, lanes, right)
        total += np.where(x2 < x1, _BACKWARD + 300 * (x1 - x2), 0).sum(1)
        length = abs(x2 - x1) + abs(y2 - y1)
        by_length = np.argsort(length, 1, kind="stable")
        every = np.arange(len(x))
        for rank in range(len(self.wiring.edges)):
            edge = by_length[:, rank]
            ends = [values[every, edge] for values in (x1, y1, x2, y2)]
            segments, extra = _simple_routes(*ends, self._lane_starts[edge], self._outward[edge])
            cost = board.cost(self._edge_nets[edge], segments) + extra
            best = cost.argmin(1)
            total += cost[every, best]
            board.add(self._edge_nets[edge], Segments(*(part[every, best] for part in _fields(segments))))
        return total

    def _placement_costs(self, x: Ints, y: Ints, right: Ints) -> Ints:
        total = _COLUMN // 2 * (right - FIRST)
        inner = np.where(self._lane_of < 0, y - self.base, 0).max(1, initial=2)
        total += _ROW // 2 * inner
        total += _RAISED * ((y[:, self._low] - self.base) // 2 - 1).sum(1)
        layers = x[:, self._layers]
        later = np.triu(np.ones((len(self._layers),) * 2, bool), 1)
        total += _UNORDERED * ((layers[:, :, None] > layers[:, None, :]) & later).sum((1, 2))
        for spine in self.wiring.spines:
            for before, after in zip(spine, spine[1:], strict=False):
                back = x[:, before] - x[:, after]
                total += np.where(back >= 0, _LANE_ORDER + 500 * back, 0)
        last = [x[:, [node for g, node in self.line_taps if g == group]].max(1, initial=0)
                for group in range(len(self.wiring.groups))]  # fmt: skip
        for group, node in self.line_taps:
            for above in range(group):
                total += _RAIL_CROSSING * (last[above] > x[:, node])
        for edge in self.wiring.edges:
            if edge.rail is not None:  # a rail starts at its node and runs to the right
                group = self.wiring.group_of(edge.rail)
                for other, node in self.line_taps:
                    if other == group:
                        back = x[:, edge.start] - x[:, node]
                        total += np.where(back >= 0, _BACKWARD + 300 * back, 0)
        return total

    def _fixed(self, x: Ints, y: Ints, lanes: Ints, right: Ints) -> list[tuple[int, list[tuple[Ints, Ints]]]]:
        """Return the net and the points of the lines without a choice: lanes, rails and taps."""
        found: list[tuple[int, list[tuple[Ints, Ints]]]] = []
        zero, base = np.zeros_like(right), np.full_like(right, self.base)
        for lane, name in enumerate(self.wiring.lanes):
            start, net, height = zero, self.nets[BEFORE + name], lanes[:, lane]
            for node in self.wiring.spines[lane]:
                found.append((net, [(start, height), (np.maximum(x[:, node], start), height)]))
                start, net = np.maximum(x[:, node], start), self.nets[self.wiring.ids[node]]
            found.append((net, [(start, height), (right, height)]))
        for group, members in enumerate(self.wiring.groups):
            net = self.nets[self.group_nets[group]]
            taps = [node for g, node in self.line_taps if g == group]
            for rail in members:
                if self.wiring.leaves_lane(rail):
                    height = lanes[:, self.wiring.lanes.index(rail.removeprefix(BEFORE))]
                    found.append((net, [(zero + 1, height), (zero + 1, base)]))
            if taps:
                found.append((net, [(zero + 1, base), (x[:, taps].max(1), base)]))
            found += [(net, [(x[:, node], base), (x[:, node], y[:, node])]) for node in taps]
        return found

    def route(self, placement: Placement) -> tuple[list[GridRoute], int]:
        """Route every line of one placement, with all shapes of routes tried.

        Args:
            placement: The placement. No two nodes share a place.

        Returns:
            The routes, and the cost of all.
        """
        x, y, lanes, right = self.positions([placement])
        board = Board(1, len(self.nets), x, y)
        routes: list[GridRoute] = []
        total = int(self._placement_costs(x, y, right)[0])
        end = int(right[0])
        names = {net: name for name, net in self.nets.items()}

        def draw(net: int, points: tuple[Point, ...]) -> None:
            xs, ys = (np.array([[p[axis] for p in points]], np.int64) for axis in (0, 1))
            board.add(np.array([net]), Segments.between(xs, ys))

        for lane, name in enumerate(self.wiring.lanes):
            height, start, net = int(lanes[0, lane]), 0, self.nets[BEFORE + name]
            for node in (*self.wiring.spines[lane], None):
                stop = end if node is None else int(x[0, node])
                points = ((start, height), (stop, height))
                draw(net, points)
                routes.append(GridRoute(names[net], points, lane=name, node=node))
                if node is not None:
                    start, net = stop, self.nets[self.wiring.ids[node]]
        for group in range(len(self.wiring.groups)):
            net = self.nets[self.group_nets[group]]
            columns = [int(x[0, node]) for g, node in self.line_taps if g == group]
            draw(net, ((1, self.base), (max(columns, default=1), self.base)))
        occupied = set(zip(x[0].tolist(), y[0].tolist(), strict=True))
        for group, node in sorted(self.line_taps, key=lambda tap: int(y[0, tap[1]])):
            net, (nx, ny) = self.nets[self.group_nets[group]], (int(x[0, node]), int(y[0, node]))
            shapes: list[tuple[Point, ...]] = [((nx, self.base), (nx, ny))]
            if any((nx, between) in occupied for between in range(self.base + 1, ny)):
                shapes = [
                    _simplified(((nx + d, self.base), (nx + d, turn), (nx, turn), (nx, ny)))
                    for d in (-1, 1)
                    for turn in (ny - 1, ny)
                ]
            points, cost = self._best(board, net, shapes)
            total += cost
            draw(net, points)
            routes.append(GridRoute(self.group_nets[group], points, tap=group, node=node))
        x1, y1, x2, y2 = (values[0].tolist() for values in self.ends(x, y, lanes, right))
        by_length = sorted(range(len(x1)), key=lambda k: abs(x2[k] - x1[k]) + abs(y2[k] - y1[k]))
        top = int(max(lanes[0].max(initial=0), y.max(initial=0))) + 1
        for k in by_length:
            edge = self.wiring.edges[k]
            shapes = all_routes((x1[k], y1[k]), (x2[k], y2[k]), top, bool(self._outward[k]))
            points, cost = self._best(board, int(self._edge_nets[k]), shapes)
            total += cost
            draw(int(self._edge_nets[k]), points)
            routes.append(GridRoute(self.net_of(edge), points, edge=edge, node=edge.end))
        return routes, total

    def _best(self, board: Board, net: int, shapes: list[tuple[Point, ...]]) -> tuple[tuple[Point, ...], int]:
        size = max(len(points) for points in shapes)
        padded = [(*points, *[points[-1]] * (size - len(points))) for points in shapes]
        values = np.array([padded], np.int64)
        cost = board.cost(np.array([net]), Segments.between(values[..., 0], values[..., 1]))[0]
        best = int(cost.argmin())
        return shapes[best], int(cost[best])


def group_net(group: tuple[str, ...]) -> str:
    """Return the net of a rail line: its source, or all sources of a joined line."""
    return group[0] if len(group) == 1 and not group[0].startswith(BEFORE) else "rail " + " ".join(group)


def _fields(segments: Segments) -> tuple[Ints, Ints, Ints, Ints]:
    return segments.vertical, segments.line, segments.low, segments.high


# A simple route runs horizontally to the x of its turn, vertically to the y of its turn, horizontally to the x of
# its end and vertically to its end. Pieces without length are not drawn.
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


def _simple_routes(
    x1: Ints, y1: Ints, x2: Ints, y2: Ints, lane_start: NDArray[np.bool_], outward: NDArray[np.bool_]
) -> tuple[Segments, Ints]:
    """Return the pieces of simple routes, ``(batch, routes, 4)``, and an additional cost of each route."""
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
    line, start, stop = (np.stack(part, -1) for part in zip(*pieces, strict=True))
    vertical = np.broadcast_to(np.array([0, 1, 0, 1]), line.shape)
    extra = np.where(outward[:, None] & _ENDS_UPRIGHT, _FORBIDDEN, 0)
    extra += np.where(~lane_start[:, None] & _FROM_LANE, _FORBIDDEN, 0)
    return Segments(vertical, line, np.minimum(start, stop), np.maximum(start, stop)), extra


def all_routes(start: Point, end: Point, top: int, outward: bool) -> list[tuple[Point, ...]]:
    """Return routes of up to five pieces between two points.

    They leave and enter nodes at any side, and turn between columns and between rows. One of them never runs
    through a node, wherever the nodes are.

    Args:
        start, end: The points.
        top: The highest row.
        outward: Whether the route ends at the right end, so that its last piece is horizontal.
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
    inner = [turns for turns in across if turns[-1][0] <= x2] if outward else across + upright
    routes = dict.fromkeys(_simplified((start, *turns, end)) for turns in inner)
    return list(routes)


def _simplified(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Leave out points where a route doesn't turn."""
    kept: list[Point] = []
    for point in points:
        if kept and kept[-1] == point:
            continue
        while len(kept) > 1 and (
            kept[-2][0] == kept[-1][0] == point[0] or kept[-2][1] == kept[-1][1] == point[1]
        ):
            kept.pop()
        kept.append(point)
    return tuple(kept)

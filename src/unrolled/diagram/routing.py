"""Routes of all lines of a placement, on a grid of half columns and half rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from unrolled.diagram.board import Board, Ints, Segments
from unrolled.diagram.lanes import BEFORE, Edge, Wiring
from unrolled.diagram.route_shapes import Point, all_routes, simple_routes, simplified

FIRST = 2  # column 0; lanes start at 0, branches are at 1
_SIZE_COSTS, _NARROW_COSTS = (220, 300), (120, 1500)  # of a column and of a row
_RAISED, _UNORDERED = 350, 15
_COLLISION, _LANE_ORDER, _BACKWARD, _RAIL_CROSSING = 30000, 12000, 1400, 600


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
        narrow: Whether few rows matter more than few columns, for upright layouts.
    """

    def __init__(self, wiring: Wiring, narrow: bool = False) -> None:
        self.wiring = wiring
        self.narrow = narrow
        self._column_cost, self._row_cost = _NARROW_COSTS if narrow else _SIZE_COSTS
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
        board = Board(len(placements), len(self.nets), x, y, _last(y, lanes, right))
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
            start = x1[every, edge], y1[every, edge]
            end = x2[every, edge], y2[every, edge]
            segments, extra = simple_routes(start, end, self._lane_starts[edge], self._outward[edge])
            cost = board.cost(self._edge_nets[edge], segments) + extra
            best = cost.argmin(1)
            total += cost[every, best]
            board.add(self._edge_nets[edge], Segments(*(part[every, best] for part in _fields(segments))))
        return total

    def _placement_costs(self, x: Ints, y: Ints, right: Ints) -> Ints:
        total = self._column_cost // 2 * (right - FIRST)
        inner = np.where(self._lane_of < 0, y - self.base, 0).max(1, initial=2)
        total += self._row_cost // 2 * inner
        total += _RAISED * ((y[:, self._low] - self.base) // 2 - 1).sum(1)
        layers = x[:, self._layers]
        later = np.triu(np.ones((len(self._layers),) * 2, bool), 1)
        total += _UNORDERED * ((layers[:, :, None] > layers[:, None, :]) & later).sum((1, 2))
        for spine in self.wiring.spines:
            for before, after in pairwise(spine):
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
        board = Board(1, len(self.nets), x, y, _last(y, lanes, right))
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
                along = ((start, height), (stop, height))
                draw(net, along)
                routes.append(GridRoute(names[net], along, lane=name, node=node))
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
                    simplified(((nx + d, self.base), (nx + d, turn), (nx, turn), (nx, ny)))
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
            on_lane = edge.end is not None and self.wiring.lane_of[edge.end] >= 0
            last = "across" if self._outward[k] else "upright" if on_lane else "any"
            shapes = all_routes((x1[k], y1[k]), (x2[k], y2[k]), top, last)
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


def _last(y: Ints, lanes: Ints, right: Ints) -> int:
    """Return the last row or column of the grid: a line may run above the nodes and lanes."""
    return 1 + int(max(y.max(initial=0), lanes.max(initial=0), right.max()))


def _fields(segments: Segments) -> tuple[Ints, Ints, Ints, Ints]:
    return segments.vertical, segments.line, segments.low, segments.high

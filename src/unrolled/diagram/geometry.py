"""From the grid to pixels: the sizes of nodes, and the positions of nodes, lines and ports."""

from __future__ import annotations

from itertools import pairwise

from unrolled.diagram.crossings import crossing_points, divisions
from unrolled.diagram.lanes import BEFORE, INPUT, Wiring
from unrolled.diagram.model import Diagram
from unrolled.diagram.placed import XY, Arrow, Layout, PlacedNode, Port, Route
from unrolled.diagram.route_shapes import Point, simplified
from unrolled.diagram.routing import FIRST, GridRoute, Placement, Router, group_net
from unrolled.diagram.shapes import CIRCLE, border, direction, line_path, node_size
from unrolled.diagram.tracks import Tracks, assign_tracks

EDGE, LEFT, RIGHT, INPUT_X, CHANNEL_X = 14.0, 72.0, 74.0, 51.0, 65.0
GAP, ROW, TOP, TRACK, RAIL_GAP, PORT_GAP = 18.0, 74.0, 46.0, 9.0, 12.0, 48.0
BELOW_RAILS, RAIL_TURN = 52.0, 16.0
UPRIGHT_ROW, UPRIGHT_GAP, UPRIGHT_TOP = 62.0, 24.0, 32.0
_NODE_MARGIN, _NODE_SPACING = 6.0, 14.0


class Geometry:
    """Computes the positions for one placement.

    Args:
        diagram: The diagram.
        router: The router of its wiring.
        placement: Where its nodes are on the grid.
        spacing: Distance between rows and between columns, relative to the usual one.
        upright: Whether the axes will be swapped, by ``turned_upright``. Then nodes are higher than wide.
    """

    def __init__(
        self,
        diagram: Diagram,
        router: Router,
        placement: Placement,
        spacing: float = 1.0,
        upright: bool = False,
    ) -> None:
        self.diagram = diagram
        self.wiring: Wiring = router.wiring
        self.base = router.base
        self.upright = upright
        sizes = [node_size(node) for node in diagram.nodes]
        self.sizes = [(h, w, r) for w, h, r in sizes] if upright else sizes
        x, y, lanes, right = router.positions([placement])
        self.grid = list(zip(x[0].tolist(), y[0].tolist(), strict=True))
        self.lanes = dict(zip(self.wiring.lanes, lanes[0].tolist(), strict=True))
        self.end = int(right[0])
        self.routes, self.cost = router.route(placement)
        self.branches = {
            rail: ((1, self.lanes[rail.removeprefix(BEFORE)]), (1, self.base))
            for rail in self.wiring.rails
            if self.wiring.leaves_lane(rail)
        }
        self.tracks = self._assign_tracks()
        self.columns = self._column_positions(spacing)
        self.rows = self._row_positions(spacing)
        self.nodes = self._place_nodes()

    def _assign_tracks(self) -> Tracks:
        lines: list[tuple[str, tuple[Point, ...], bool]] = [
            (route.net, route.points, route.lane is not None) for route in self.routes
        ]
        for rail, points in self.branches.items():
            group = self.wiring.groups[self.wiring.group_of(rail)]
            lines.append((group_net(group), (*points, (2, self.base)), False))
        return assign_tracks(lines, [group_net(group) for group in self.wiring.groups])

    def _column_positions(self, spacing: float) -> dict[int, float]:
        count = (self.end - FIRST) // 2
        widths = [0.0] * count
        for (x, _), (w, _, _) in zip(self.grid, self.sizes, strict=True):
            widths[(x - FIRST) // 2] = max(widths[(x - FIRST) // 2], w)
        extra = TRACK * (self.tracks.count(1, 1) - 1)
        positions = {0: EDGE, 1: CHANNEL_X + extra / 2}
        edge = LEFT + extra + GAP / 2
        for column, w in enumerate(widths):
            x = FIRST + 2 * column
            gap = GAP * spacing + TRACK * (self.tracks.count(1, x + 1) - 1)
            positions[x] = edge + w / 2
            positions[x + 1] = edge + w + gap / 2
            edge += w + gap
        self.width = edge - GAP / 2 + RIGHT
        positions[self.end] = self.width - EDGE
        return positions

    def _row_positions(self, spacing: float) -> dict[int, float]:
        top = max([y for _, y in self.grid] + list(self.lanes.values()), default=self.base + 2)
        above = self.tracks.count(0, top + 1) if self.tracks.runs.get((0, top + 1)) else 0
        y, channel = TOP + TRACK * above, TOP + TRACK * above - ROW / 2
        if self.upright:
            tallest = self._row_height(top)
            y = max(UPRIGHT_TOP, tallest / 2 + 8) + TRACK * above
            channel = (y - tallest / 2) / 2
        positions = {top + 1: channel, top: y}
        for row in range(top - 2, self.base - 1, -2):
            distance, middle = self._row_distance(row, spacing)
            gap = distance + TRACK * (self.tracks.count(0, row + 1) - 1)
            positions[row + 1] = y + gap / 2 + middle
            y += gap
            positions[row] = y
        positions[self.base] -= 2
        self.rail_y: dict[str, float] = {}
        self.deep = positions[self.base]
        below = self.deep  # where the next state can enter
        for k, group in enumerate(self.wiring.groups):
            enters = any(rail.startswith(BEFORE) and rail not in self.branches for rail in group)
            self.deep = max(self.deep + RAIL_GAP * (k > 0), below if enters else 0.0)
            below = self.deep + PORT_GAP if enters else below
            self.rail_y.update(dict.fromkeys(group, self.deep))
        return positions

    def _row_height(self, row: int) -> float:
        heights = [h for (_, y), (_, h, _) in zip(self.grid, self.sizes, strict=True) if y == row]
        return max(heights, default=CIRCLE)

    def _row_distance(self, row: int, spacing: float) -> tuple[float, float]:
        """Return the distance of a row to the one above, and where lines between them run, from halfway."""
        if not self.upright:
            return ROW * spacing, 0.0
        above = self._row_height(row + 2)
        if row == self.base:
            return above / 2 + 2 * UPRIGHT_GAP, above / 4
        below = self._row_height(row)
        return max(UPRIGHT_ROW, (above + below) / 2 + UPRIGHT_GAP) * spacing, (above - below) / 4

    def _place_nodes(self) -> list[PlacedNode]:
        lane_names = [self.wiring.lanes[lane] if lane >= 0 else None for lane in self.wiring.lane_of]
        return [
            PlacedNode(node.id, self.columns[x], self.rows[y], *size, lane)
            for node, (x, y), size, lane in zip(
                self.diagram.nodes, self.grid, self.sizes, lane_names, strict=True
            )
        ]

    def layout(self) -> Layout:
        """Return the positions of everything but the labels of nodes."""
        taps = self._taps()
        outputs = self._output_heights()
        lanes = [self._lane(route) for route in self.routes if route.lane is not None]
        edges = [
            self._edge(route, outputs)
            for route in self.routes
            if route.edge is not None and route.edge.rail is None
        ]
        rails = self._rails()
        routes = (*rails, *taps, *edges, *lanes)
        height = max([self.deep + BELOW_RAILS, *[y + PORT_GAP for y in outputs.values()]])
        ports = self._ports(outputs, height)
        out = next(p for p in ports if p.side == "out" and p.name == self.diagram.states[0].name)
        return Layout(
            self.width,
            height,
            tuple(self.nodes),
            routes,
            tuple(ports),
            tuple(divisions(routes, self.nodes)),
            tuple((name, self.rows[row]) for name, row in self.lanes.items()),
            (self.width - 48, out.y),
            len(crossing_points(routes)),
            sum(len(route.points) - 2 for route in edges),
        )

    # Lines

    def _pixels(self, route: GridRoute, first: float | None = None, last: float | None = None) -> list[XY]:
        """Return the corners of a route in pixels.

        Args:
            route: The route.
            first: Height of its start, if that isn't the height of its row.
            last: Height of its end, if that isn't the height of its row.
        """
        pieces = list(pairwise(route.points))
        places: list[tuple[int, float]] = []  # direction of each piece, and its coordinate across it
        for k, ((x1, y1), (x2, y2)) in enumerate(pieces):
            vertical = int(x1 == x2)
            line = x1 if vertical else y1
            middle = (self.columns if vertical else self.rows).get(line, 0.0)
            if not vertical and k == 0 and first is not None:
                middle = first
            elif not vertical and k == len(pieces) - 1 and last is not None:
                middle = last
            elif not (not vertical and line <= self.base):
                run = self.tracks.find(route.net, (x1, y1), (x2, y2))
                middle += run.offset * self._track_gap(vertical, line)
            places.append((vertical, middle))
        (sx, sy), (ex, ey) = route.points[0], route.points[-1]
        start_x, end_x = self.columns[sx], self.columns[ex]
        start_y = self.rows[sy] if first is None else first
        end_y = self.rows[ey] if last is None else last
        points: list[XY] = []
        for k in range(len(places) + 1):
            near = places[max(0, k - 1) : k + 1]
            x = next((c for vertical, c in near if vertical), start_x if k == 0 else end_x)
            y = next((c for vertical, c in near if not vertical), start_y if k == 0 else end_y)
            points.append((x, y))
        return points

    def _track_gap(self, vertical: int, line: int) -> float:
        """Return the distance of tracks. At nodes, all lines must end on the smallest one."""
        if line % 2:
            return TRACK
        count = self.tracks.count(vertical, line)
        runs = [run for run in self.tracks.runs[vertical, line] if run.count > 1]
        halves = [
            size[vertical == 0] / 2
            for place, size in zip(self.grid, self.sizes, strict=True)
            if place[1 - vertical] == line
            and any(run.low - 1 <= 2 * place[vertical] <= run.high + 1 for run in runs)
        ]
        room = 2 * (min(halves, default=CIRCLE / 2) - _NODE_MARGIN)
        return min(_NODE_SPACING, room / max(1, count - 1))

    def _finished(
        self, kind: str, net: str, sources: tuple[str, ...], points: list[XY], target: int | None,
        weighted: bool, sign: int = 1, state: str | None = None, start: int | None = None,
    ) -> Route:  # fmt: skip
        """Cut a line at the borders of its nodes and give it an arrow."""
        points = list(simplified(points))
        arrow = minus = None
        if start is not None:
            points[0] = border(self.nodes[start], points[0], points[1])
        if target is not None:
            node = self.nodes[target]
            (x, y), (before_x, before_y) = points[-1], points[-2]
            dx, dy = direction(x - before_x), direction(y - before_y)
            x, y = border(node, points[-1], points[-2], 1.5)
            points[-1] = (x, y)
            arrow = Arrow(x, y, dx, dy)
            if sign < 0:
                minus = (x - dx * 12 + (10 if dy else 0), y - dy * 12 - dx * 9)
        name = self.diagram.nodes[target].id if target is not None else None
        path = line_path(points, arrow)
        return Route(kind, net, sources, name, state, tuple(points), path, weighted, sign, arrow, minus)

    def _lane(self, route: GridRoute) -> Route:
        y = self.rows[route.points[0][1]]
        points = [(self.columns[x], y) for x, _ in route.points]
        start = None if route.net.startswith(BEFORE) else self.wiring.ids.index(route.net)
        sign = 1
        if route.node is not None:
            terms = self.diagram.nodes[route.node].terms
            sign = next((t.sign for t in terms if t.source == route.net and not t.weighted), 1)
        return self._finished(
            "lane", route.net, (route.net,), points, route.node, False, sign, route.lane, start
        )

    def _taps(self) -> list[Route]:
        found: list[tuple[GridRoute, list[XY]]] = []
        starts = self._rail_starts()
        self.rail_ends: dict[int, float] = {}  # the right end of each rail
        self.rail_left_ends: dict[int, float] = {}  # its left end, if it also runs to the left
        for route in self.routes:
            if route.tap is not None:
                tap = route.tap
                points = self._pixels(route, first=self.rail_y[self.wiring.groups[tap][0]])
                found.append((route, points))
                x = points[0][0]
                if x >= starts.get(tap, 0.0):
                    self.rail_ends[tap] = max(self.rail_ends.get(tap, x), x)
                else:
                    self.rail_left_ends[tap] = min(self.rail_left_ends.get(tap, x), x)
        taps = []
        for route, points in found:
            assert route.tap is not None
            assert route.node is not None
            group = self.wiring.groups[route.tap]
            of_node = [t for t in self.wiring.taps if t.node == route.node and t.rail in group]
            x, y = points[0]
            if x == self.rail_ends.get(route.tap):  # the last tap is the end of the rail, with a corner
                points = [(x - RAIL_TURN, y), *points]
            elif x == self.rail_left_ends.get(route.tap):
                points = [(x + RAIL_TURN, y), *points]
            sources = tuple(tap.rail for tap in of_node)
            sign = min(tap.sign for tap in of_node)
            weighted = any(tap.weighted for tap in of_node)
            taps.append(self._finished("tap", route.net, sources, points, route.node, weighted, sign))
        return taps

    def _rail_starts(self) -> dict[int, float]:
        """Return where rails that a node feeds start."""
        return {
            self.wiring.group_of(r.edge.rail): self._pixels(r, last=self.rail_y[r.edge.rail])[-1][0]
            for r in self.routes
            if r.edge is not None and r.edge.rail is not None
        }

    def _rails(self) -> list[Route]:
        rails = []
        below = max([self.deep, *[self.rail_y[rail] for rail in self.wiring.rails]]) + BELOW_RAILS - 16
        for k, group in enumerate(self.wiring.groups):
            net, y = group_net(group), self.rail_y[group[0]]
            end = self.rail_ends.get(k, LEFT + RAIL_TURN) - RAIL_TURN
            inner = [rail for rail in group if rail != INPUT]
            for rail in group:
                stop = end if rail == (inner[0] if inner else INPUT) else LEFT
                start = None
                if rail == INPUT:
                    points = [(INPUT_X, below), (INPUT_X, y), (stop, y)]
                elif rail in self.branches:
                    run = self.tracks.find(net, *self.branches[rail])
                    x = self.columns[1] + run.offset * TRACK
                    lane = self.rows[self.branches[rail][0][1]]
                    points = [(EDGE, lane), (x, lane), (x, y), (max(stop, x), y)]
                elif rail.startswith(BEFORE):
                    points = [(EDGE, y), (stop, y)]
                else:
                    route = next(r for r in self.routes if r.edge is not None and r.edge.rail == rail)
                    assert route.edge is not None
                    start = route.edge.start
                    points = self._pixels(route, last=y)
                    if k in self.rail_left_ends:
                        left = [*points, (self.rail_left_ends[k] + RAIL_TURN, y)]
                        rails.append(self._finished("rail", net, (rail,), left, None, True, start=start))
                    if k not in self.rail_ends:
                        continue
                    points.append((max(stop, points[-1][0]), y))
                rails.append(self._finished("rail", net, (rail,), points, None, True, start=start))
        return rails

    def _edge(self, route: GridRoute, outputs: dict[str, float]) -> Route:
        edge = route.edge
        assert edge is not None
        last = outputs[edge.state] if edge.state is not None else None
        first = None
        if edge.start is None and route.points[0][1] == self.base:
            first = self.rail_y[edge.source]
        points = self._pixels(route, last=last, first=first)
        if edge.start is None:
            name = edge.source.removeprefix(BEFORE)
            start = (EDGE, self.rows[self.lanes[name]]) if name in self.lanes else (EDGE, points[0][1])
            if len(route.points) == 2 and last is not None and first is not None and first != last:
                points = [(LEFT, first), (LEFT, last), points[-1]]
            points = [start, *points]
        return self._finished(
            "edge",
            route.net,
            (edge.source,),
            points,
            edge.end,
            edge.weighted,
            edge.sign,
            edge.state,
            edge.start,
        )

    # Ports

    def _output_heights(self) -> dict[str, float]:
        """Return the height at which each state without a lane leaves: that of its rail, if that is free."""
        heights: dict[str, float] = {}
        for state in self.wiring.floor:
            route = next(r for r in self.routes if r.edge is not None and r.edge.state == state)
            own = self.rail_y.get(BEFORE + state, self.rows[self.base])
            turn = route.points[-2]
            start = self.columns[turn[0]] + (TRACK * self.tracks.count(1, turn[0]) if turn[0] % 2 else 0)
            blocked = [
                self.rail_ends.get(k, 0.0) + TRACK > start
                for k, group in enumerate(self.wiring.groups)
                if self.rail_y[group[0]] == own and group_net(group) != route.net
            ]
            if any(abs(own - y) < PORT_GAP for y in heights.values()) or any(blocked):
                own = max([self.deep + PORT_GAP / 2, *[y + PORT_GAP for y in heights.values()]])
            heights[state] = own
        return heights

    def _ports(self, outputs: dict[str, float], height: float) -> list[Port]:
        ports = []
        for name, row in self.lanes.items():
            ports += [
                _port("in", name, 4.0, self.rows[row]),
                _port("out", name, self.width - 4, self.rows[row]),
            ]
        for name in self.wiring.floor:
            if BEFORE + name in self.rail_y:
                ports.append(_port("in", name, 4.0, self.rail_y[BEFORE + name]))
            ports.append(_port("out", name, self.width - 4, outputs[name]))
        if INPUT in self.rail_y:
            y = self.deep + BELOW_RAILS - 16
            ports.append(Port("below", INPUT, INPUT_X, y, "start", INPUT_X + 9, y + 10, None))
        return ports


def _port(side: str, name: str, x: float, y: float) -> Port:
    anchor = "start" if side == "in" else "end"
    end = EDGE if side == "in" else x - EDGE + 4
    return Port(side, name, end, y, anchor, x, y - 11, y + 19)

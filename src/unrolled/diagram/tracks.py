"""Lines of different nets on the same row or column of the grid, moved apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations

from unrolled.diagram.route_shapes import Point

_MOST_PERMUTED = 6


@dataclass
class Run:
    """A connected part of a net on one row or column of the grid.

    Places are in halves of the grid's unit: a line ends at the border of its node, not in its middle.

    Attributes:
        net: The net.
        low, high: Where it starts and ends.
        turns: The places where a line of the net leaves it, and the side: 1 to larger coordinates, or -1.
        fixed: Whether it stays in the middle, as a lane does.
        track: Its position among the runs beside it, from 0.
        count: Number of tracks where it is.
    """

    net: str
    low: int
    high: int
    turns: list[tuple[int, int]] = field(default_factory=list)
    fixed: bool = False
    track: int = 0
    count: int = 1

    def overlaps(self, other: Run) -> bool:
        """Whether two runs share a point, so that they can't be on the same track."""
        return self.low <= other.high and other.low <= self.high

    @property
    def offset(self) -> float:
        """Position relative to the middle, in tracks."""
        return 0.0 if self.fixed else self.track - (self.count - 1) / 2


@dataclass
class Tracks:
    """The runs on each line of the grid, by direction (1 for columns) and coordinate."""

    runs: dict[tuple[int, int], list[Run]]

    def find(self, net: str, start: Point, stop: Point) -> Run:
        """Return the run that a straight piece of a net is part of."""
        vertical = int(start[0] == stop[0])
        middle = start[vertical] + stop[vertical]
        found = self.runs[vertical, start[1 - vertical]]
        return next(run for run in found if run.net == net and run.low <= middle <= run.high)

    def count(self, vertical: int, line: int) -> int:
        """Return the number of tracks of a row or column, at least 1."""
        return max((run.count for run in self.runs.get((vertical, line), ())), default=1)


def assign_tracks(lines: Iterable[tuple[str, Sequence[Point], bool]], ordered: Sequence[str] = ()) -> Tracks:
    """Give lines of different nets that run on one another tracks of their own.

    Args:
        lines: Net and corners of each line, and whether it stays in the middle.
        ordered: Nets whose order from left to right, or from below, is kept.

    Returns:
        The tracks.
    """
    pieces: dict[tuple[int, int], list[Run]] = {}
    for net, points, fixed in lines:
        for k, ((x1, y1), (x2, y2)) in enumerate(pairwise(points)):
            vertical = int(x1 == x2)
            line, start, stop = (x1, y1, y2) if vertical else (y1, x1, x2)
            run = Run(net, 2 * min(start, stop), 2 * max(start, stop), fixed=fixed)
            for place, neighbor in ((start, k - 1), (stop, k + 2)):
                if 0 <= neighbor < len(points):
                    side = points[neighbor][1 - vertical] - line
                    run.turns.append((2 * place, 1 if side > 0 else -1))
                elif place < start + stop - place:
                    run.low += 1
                else:
                    run.high -= 1
            pieces.setdefault((vertical, line), []).append(run)
    rank = {net: k for k, net in enumerate(ordered)}
    runs = {key: _merged(found) for key, found in pieces.items()}
    for found in runs.values():
        for component in _components(found):
            _arrange(component, rank)
    return Tracks(runs)


def _merged(pieces: list[Run]) -> list[Run]:
    """Join pieces of the same net that touch."""
    merged: list[Run] = []
    for piece in sorted(pieces, key=lambda run: (run.net, run.low, run.high)):
        last = merged[-1] if merged else None
        if last and last.net == piece.net and piece.low <= last.high:
            last.high = max(last.high, piece.high)
            last.turns += piece.turns
            last.fixed |= piece.fixed
        else:
            merged.append(piece)
    return merged


def _components(runs: list[Run]) -> list[list[Run]]:
    """Return the groups of runs that overlap one another, directly or through others."""
    components: list[list[Run]] = []
    end = -1
    for run in sorted(runs, key=lambda run: (run.low, run.high, run.net)):
        if components and run.low <= end:
            components[-1].append(run)
            end = max(end, run.high)
        else:
            components.append([run])
            end = run.high
    return components


def _arrange(runs: list[Run], rank: dict[str, int]) -> None:
    """Put runs on tracks in the order with the fewest crossings."""
    if len(runs) == 1:
        return
    free = [run for run in runs if not run.fixed]

    def cost(order: Sequence[Run]) -> int:
        return sum(_crossings(a, b, rank) for k, a in enumerate(order) for b in order[k + 1 :])

    if len(free) <= _MOST_PERMUTED:
        order: Sequence[Run] = min(permutations(free), key=cost)
    else:
        chosen: list[Run] = []
        for run in free:
            places = [[*chosen[:k], run, *chosen[k:]] for k in range(len(chosen) + 1)]
            chosen = min(places, key=cost)
        order = chosen
    for k, run in enumerate(order):
        run.track = max((before.track + 1 for before in order[:k] if before.overlaps(run)), default=0)
    count = max((run.track for run in order), default=0) + 1
    for run in order:
        run.count = count


def _crossings(before: Run, after: Run, rank: dict[str, int]) -> int:
    """Return the crossings of two runs, the first on the side of smaller coordinates."""
    if not before.overlaps(after):
        return 0
    found = sum(side > 0 and after.low <= place <= after.high for place, side in before.turns)
    found += sum(side < 0 and before.low <= place <= before.high for place, side in after.turns)
    if before.net in rank and after.net in rank and rank[before.net] > rank[after.net]:
        found += 1
    return 2 * found

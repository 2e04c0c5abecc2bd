"""Search for a placement with few crossings and bends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from unrolled.diagram.board import LINES
from unrolled.diagram.lanes import Wiring
from unrolled.diagram.routing import Placement, Router

_MAX_ROW = 6
_MAX_COLUMNS = 28
_BATCH, _ATTEMPTS, _KEPT, _SAME_COST = 96, 4, 12, 1
_STARTS, _PATIENCE = 2, 4


class _Random:
    """A small generator of random numbers, the same on every platform."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self._state >> 33) % limit

    def sign(self) -> int:
        return 1 - 2 * self.below(2)


@dataclass
class _Neighbors:
    """The nodes that each node reads, and those that read it, through edges."""

    reads: list[list[int]] = field(default_factory=list)
    readers: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, wiring: Wiring) -> _Neighbors:
        count = len(wiring.kinds)
        found = cls([[] for _ in range(count)], [[] for _ in range(count)])
        pairs = [(e.start, e.end) for e in wiring.edges if e.start is not None and e.end is not None]
        pairs += [pair for spine in wiring.spines for pair in pairwise(spine)]
        for before, after in pairs:
            found.reads[after].append(before)
            found.readers[before].append(after)
        return found


def first_placement(wiring: Wiring, highest: int = 3) -> Placement:
    """Place nodes in the order of computation: layers in the lowest row, the rest above and to the right.

    Args:
        wiring: The connections.
        highest: The highest row.
    """
    neighbors = _Neighbors.of(wiring)
    count = len(wiring.kinds)
    rows = [0] * count
    for k in range(count):
        if wiring.lane_of[k] < 0:
            below = [rows[p] for p in neighbors.reads[k] if wiring.lane_of[p] < 0]
            rows[k] = min(max(below, default=0) + 1, highest)
    columns = [0] * count
    used: set[tuple[int, int]] = set()
    for k in range(count):
        lane = wiring.lane_of[k]
        place = rows[k] if lane < 0 else -1 - lane
        column = max((columns[p] for p in neighbors.reads[k]), default=0)
        if lane >= 0:
            spine = wiring.spines[lane]
            position = spine.index(k)
            if position:
                column = max(column, columns[spine[position - 1]] + 1)
        while (column, place) in used:
            column += 1
        columns[k] = column
        used.add((column, place))
    return _without_gaps(columns, rows, range(len(wiring.lanes)))


def search(router: Router, rounds: int, seed: int = 1) -> list[Placement]:
    """Search for good placements.

    In each round, random changes are made to the best placements so far, and all are evaluated together. If
    that finds nothing better, the search starts anew with :func:`first_placement`.

    Args:
        router: The router of the wiring.
        rounds: Largest number of rounds.
        seed: Seed of the random changes.

    Returns:
        The best placements, best first. In each, every node has a place of its own and lanes run forward.
    """
    first = first_placement(router.wiring, 2 if router.narrow else 3)
    highest = router.base + 2 * (_MAX_ROW + len(router.wiring.lanes)) + 4
    if not first.columns or max(first.columns) >= _MAX_COLUMNS or highest > LINES:
        return [first]  # nothing to search for, or too large for fast masks
    start = [(int(router.costs([first])[0]), first)]
    mover = _Mover(router.wiring, _Random(seed))
    best = list(start)
    for _ in range(_STARTS):
        kept, known, waited = list(start), {first}, 0
        while rounds > 0 and waited < _PATIENCE:
            children = mover.children([placement for _, placement in kept], known)
            if not children:
                break
            before = kept[0][0]
            kept = _best([*kept, *zip(router.costs(children).tolist(), children, strict=True)])
            waited = 0 if kept[0][0] < before else waited + 1
            rounds -= 1
        best = _best([*best, *(found for found in kept if found not in best)])
    return [placement for _, placement in best]


def _best(found: list[tuple[int, Placement]]) -> list[tuple[int, Placement]]:
    """Return the best placements, few of each cost: many alike would leave no room for others."""
    kept: list[tuple[int, Placement]] = []
    same: dict[int, int] = {}
    for cost, placement in sorted(found, key=lambda one: one[0]):
        same[cost] = same.get(cost, 0) + 1
        if same[cost] <= _SAME_COST:
            kept.append((cost, placement))
        if len(kept) == _KEPT:
            break
    return kept


class _Mover:
    """Random changes to placements."""

    def __init__(self, wiring: Wiring, random: _Random) -> None:
        self.wiring = wiring
        self.random = random
        self.neighbors = _Neighbors.of(wiring)

    def is_valid(self, placement: Placement) -> bool:
        """Whether no two nodes share a place, and lanes run forward."""
        columns, lane_of = placement.columns, self.wiring.lane_of
        places = {
            (column, row if lane < 0 else -1 - lane)
            for column, row, lane in zip(columns, placement.rows, lane_of, strict=True)
        }
        forward = all(columns[a] < columns[b] for spine in self.wiring.spines for a, b in pairwise(spine))
        return forward and len(places) == len(columns)

    def children(self, parents: list[Placement], known: set[Placement]) -> list[Placement]:
        """Return a batch of valid placements that aren't known yet, each a changed parent."""
        found: list[Placement] = []
        for k in range(_ATTEMPTS * _BATCH):
            rank = min(self.random.below(len(parents)), self.random.below(len(parents)))
            child = self.changed(parents[rank], 1 + (k % 4 == 0) + (k % 8 == 0))
            if child not in known and max(child.columns) < _MAX_COLUMNS and self.is_valid(child):
                known.add(child)
                found.append(child)
            if len(found) == _BATCH:
                break
        return found

    def changed(self, placement: Placement, moves: int) -> Placement:
        """Return a placement with a number of random changes."""
        columns, rows, order = list(placement.columns), list(placement.rows), list(placement.order)
        for _ in range(moves):
            self._move(columns, rows, order)
        return _without_gaps(columns, rows, order)

    def _move(self, columns: list[int], rows: list[int], order: list[int]) -> None:
        random, count = self.random, len(columns)
        k = random.below(count)
        free = self.wiring.lane_of[k] < 0
        kind = random.below(100)
        if kind < 22:
            columns[k] = max(0, columns[k] + random.sign())
        elif kind < 36 and free:
            rows[k] = max(1, min(_MAX_ROW, rows[k] + random.sign()))
        elif kind < 46:
            start, change = columns[k], random.sign()
            columns[:] = [c + change if c >= start and c + change >= 0 else c for c in columns]
        elif kind < 58:
            j = random.below(count)
            columns[k], columns[j] = columns[j], columns[k]
            if free and self.wiring.lane_of[j] < 0:
                rows[k], rows[j] = rows[j], rows[k]
        elif kind < 76:
            self._between_neighbors(k, columns, rows)
        elif kind < 94 or len(order) < 2:
            self._with_sources(k, columns)
        else:
            a, b = random.below(len(order)), random.below(len(order))
            order[a], order[b] = order[b], order[a]

    def _between_neighbors(self, k: int, columns: list[int], rows: list[int]) -> None:
        """Move a node anywhere between what it reads and what reads it."""
        low = max((columns[p] for p in self.neighbors.reads[k]), default=0)
        high = min((columns[p] for p in self.neighbors.readers[k]), default=max(columns) + 1)
        columns[k] = low + self.random.below(max(1, high - low + 1))
        if self.wiring.lane_of[k] < 0 and self.random.below(2):
            rows[k] = 1 + self.random.below(min(_MAX_ROW, max(rows) + 1))

    def _with_sources(self, k: int, columns: list[int]) -> None:
        """Move a node together with all nodes that only it reads."""
        group, left = {k}, [k]
        while left:
            for p in self.neighbors.reads[left.pop()]:
                if len(self.neighbors.readers[p]) == 1 and p not in group:
                    group.add(p)
                    left.append(p)
        change = self.random.sign() * (1 + self.random.below(3))
        if all(columns[j] + change >= 0 for j in group):
            for j in group:
                columns[j] += change


def _without_gaps(columns: Sequence[int], rows: Sequence[int], order: Sequence[int]) -> Placement:
    """Leave out empty columns and rows."""
    present = sorted(set(columns))
    if present[-1:] != [len(present) - 1]:
        compact = {column: k for k, column in enumerate(present)}
        columns = [compact[column] for column in columns]
    levels = sorted({row for row in rows if row > 0})
    if levels and levels[-1] != len(levels):
        height = {0: 0} | {row: k + 1 for k, row in enumerate(levels)}
        rows = [height[row] for row in rows]
    return Placement(tuple(columns), tuple(rows), tuple(order))

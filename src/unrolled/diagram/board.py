"""Lines on a grid, for many placements at once: bit masks find what crosses or overlaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Masks = NDArray[Any]  # unsigned integers of 64 bits, or Python's integers on a larger grid

LINES = 64  # rows and columns of a grid whose masks have 64 bits

LENGTH, SHARED = 60, 44  # for each half column or row; a line that a net already has costs less
CROSSING, TOUCH, OVERLAP = 900, 800, 6000
THROUGH = 15000
BEND = 130  # for each piece of a route

_count_large = np.vectorize(int.bit_count, otypes=[np.int64])


def _count(masks: Masks) -> Ints:
    """Return the number of bits that are set in each mask."""
    count: Ints
    if masks.dtype == object:
        count = _count_large(masks)
    elif hasattr(np, "bitwise_count"):
        count = np.bitwise_count(masks).astype(np.int64)
    else:  # numpy 1
        count = np.unpackbits(masks[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.int64)
    return count


@dataclass(frozen=True)
class Segments:
    """Straight pieces of lines on the grid.

    Attributes:
        vertical: 0 for a horizontal piece, 1 for a vertical one.
        line: Its row, or its column if it is vertical.
        low, high: Where it starts and ends along that line. A piece without length is ignored.
    """

    vertical: Ints
    line: Ints
    low: Ints
    high: Ints

    @classmethod
    def between(cls, x: Ints, y: Ints) -> Segments:
        """Return the pieces between points, which are along the last axis."""
        vertical = (x[..., 1:] == x[..., :-1]).astype(np.int64)
        start = np.where(vertical, y[..., :-1], x[..., :-1])
        stop = np.where(vertical, y[..., 1:], x[..., 1:])
        line = np.where(vertical, x[..., 1:], y[..., 1:])
        return cls(vertical, line, np.minimum(start, stop), np.maximum(start, stop))


class Board:
    """The nodes and lines of a batch of placements on a grid of half columns and half rows.

    Args:
        batch: Number of placements.
        nets: Number of nets. Lines of the same net may run on one another.
        x: Columns of the nodes, ``(batch, nodes)``.
        y: Rows of the nodes.
        last: The last row or column of the grid.
    """

    def __init__(self, batch: int, nets: int, x: Ints, y: Ints, last: int) -> None:
        self._batch = batch
        self._lines = last + 1
        self._type = np.dtype(np.uint64 if self._lines <= LINES else object)
        rows = 2 * batch
        self._nodes: Masks = np.zeros((rows, self._lines), self._type)
        self._runs: Masks = np.zeros((rows, self._lines), self._type)  # unit intervals that a line covers
        self._touched: Masks = np.zeros((rows, self._lines), self._type)  # where perpendicular lines are
        self._own_runs: Masks = np.zeros((nets * rows, self._lines), self._type)
        self._own_touched: Masks = np.zeros((nets * rows, self._lines), self._type)
        self._every = np.arange(batch, dtype=np.int64)
        self._places = np.arange(self._lines, dtype=np.int64)
        self.collisions: Ints = np.zeros(batch, np.int64)
        every = self._every
        for k in range(x.shape[1]):
            bit = self._bits(x[:, k])
            self.collisions += (self._nodes[every, y[:, k]] & bit) != 0
            self._nodes[every, y[:, k]] |= bit
            self._nodes[batch + every, x[:, k]] |= self._bits(y[:, k])

    def _bits(self, places: Ints) -> Masks:
        """Return masks with one bit each."""
        result: Masks = np.ones((), self._type) << places.astype(self._type)
        return result

    def cost(self, net: Ints, segments: Segments) -> Ints:
        """Return the cost of routes. A corner on a node costs as much as a line through it.

        Args:
            net: Net of each placement's route, ``(batch,)``.
            segments: The pieces of alternative routes, ``(batch, routes, pieces)``.

        Returns:
            The costs, ``(batch, routes)``.
        """
        row = segments.vertical * self._batch + self._every[:, None, None]
        index = row * self._lines + segments.line
        own = index + net[:, None, None] * self._runs.size
        first, last = self._bits(segments.low), self._bits(segments.high)
        run = last - first
        lines, nodes = self._runs.take(index), self._nodes.take(index)
        own_lines = self._own_runs.take(own)
        meets = (run | last) & self._touched.take(index) & ~self._own_touched.take(own) & ~nodes
        length = segments.high - segments.low
        at_ends = (first | last) & meets
        cost = LENGTH * length - SHARED * _count(run & own_lines)
        cost += CROSSING * _count(meets) + TOUCH * _count(at_ends)
        cost += OVERLAP * ((run & lines & ~own_lines) != 0)
        cost += THROUGH * _count(run & ~first & nodes) + THROUGH // 2 * _count((first | last) & nodes)
        drawn = length > 0
        cost += BEND
        result: Ints = (cost * drawn).sum(-1)
        return result

    def add(self, net: Ints, segments: Segments) -> None:
        """Draw one route for each placement: pieces of shape ``(batch, pieces)``."""
        of_net = net * 2 * self._batch
        for piece in range(segments.line.shape[1]):
            vertical, line = segments.vertical[:, piece], segments.line[:, piece]
            low, high = segments.low[:, piece], segments.high[:, piece]
            drawn = high > low
            if not drawn.any():
                continue
            run = self._bits(high) - self._bits(low)
            row = vertical * self._batch + self._every
            self._runs[row, line] |= run
            self._own_runs[row + of_net, line] |= run
            bit = self._bits(line) * drawn
            covered = (self._places >= low[:, None]) & (self._places <= high[:, None])
            bits = covered * bit[:, None]
            crosswise = (1 - vertical) * self._batch + self._every
            self._touched[crosswise] |= bits
            self._own_touched[crosswise + of_net] |= bits

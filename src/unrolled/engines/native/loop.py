"""One compiled loop over time, and how it is called."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines import log
from unrolled.engines.native import build
from unrolled.engines.native.emit import emit
from unrolled.engines.native.graph import Split
from unrolled.engines.native.products import products
from unrolled.engines.native.program import HEADER, per_row, width

_LINE = 64  # bytes: what is written by one thread shares no line with what another one writes
_FEW = 4  # rows and steps up to which weights are packed a block at a time, in every step
_WORTH = 60_000  # multiplications in a step from which on threads pay


class Loop:
    """One compiled loop: its split, its source and its library."""

    def __init__(self, part: Split, dtype: torch.dtype) -> None:
        self.part = part
        self.emitted = emit(part, dtype)
        log.emit.info("a loop in %s\n%s", dtype, self.emitted.source)
        self._products = products(dtype)
        self._run = build.load(self.emitted.source).run
        self._run.restype = None
        self._places: dict[str, list[tuple[int, Any]]] = {}
        for place, (kind, what) in enumerate(self.emitted.pointers):
            self._places.setdefault(kind, []).append((place, what))
        self._sizes = ctypes.c_int64 * (HEADER + len(self.emitted.sizes))
        self._pointers = ctypes.c_void_p * len(self.emitted.pointers)
        self._item = dtype.itemsize
        self._kept = [(place, node, width(node)) for place, node in self._places.get("kept", [])]
        self._work = sum(len(pack.products) * pack.width * pack.depth for pack in self.emitted.packs)
        self._work += 20 * sum(width(node) for node in part.loop if per_row(node)) // 4

    def __call__(
        self,
        values: dict[fx.Node, Any],
        initial: tuple[Tensor, ...],
        steps: int,
        back: bool,
        rows: int,
        starts: Tensor | None = None,
    ) -> list[Tensor]:
        """Run over all steps; what is kept goes into ``values``.

        Args:
            values: the arrays of what the loop reads: of every row of every step, or of parameters.
            initial: the states before the first step, each ``(rows, width)``.
            steps: how many.
            back: from the last step to the first.
            rows: the batch: the rows of the step with most.
            starts: int64, where each step's rows begin and the last one's end, where steps differ in rows;
                they never grow from a step to the next.

        Returns:
            For each state its values after every step, ``(all rows, width)``, with the initial one's rows
            before them: or behind them, going back.
        """
        like = initial[0]
        whole = steps * rows if starts is None else int(starts[-1])
        threads = self._threads(rows)
        direct = steps <= 2 and rows <= _FEW
        pointers = self._pointers()
        if starts is not None:
            pointers[0] = starts.data_ptr()
        states = []
        working = self._working(rows, threads, direct)
        for (first, k), (new, _), (grown, _) in zip(
            *(self._places.get(kind, ()) for kind in ("initial", "new", "grown")), strict=True
        ):
            part = initial[k]
            columns = part.shape[1]
            state = part.new_empty(rows + whole, columns)
            state[whole if back else 0 : rows + whole if back else rows] = part
            base = state.data_ptr()
            pointers[first] = base + (whole * columns * self._item if back else 0)
            pointers[new] = base + (0 if back else rows * columns * self._item)
            states.append(state)
            working.append((grown, 0 if starts is None else rows * columns))
        alive = []  # until the call is over
        for place, node in self._places.get("array", ()):
            array = values[node]
            if array.dtype != like.dtype or not array.is_contiguous():
                array = array.to(like.dtype).contiguous()
                alive.append(array)
            pointers[place] = array.data_ptr()
        for place, node in self._places.get("matrix", ()):
            pointers[place] = values[node].data_ptr()
        for place, node, columns in self._kept:
            array = values[node] = like.new_empty(whole, columns)
            pointers[place] = array.data_ptr()
        line = _LINE // self._item
        room = like.new_empty(sum(size + line for _, size in working))
        address = room.data_ptr()
        for place, size in working:
            pointers[place] = address
            address += (size + line - 1) // line * _LINE
        sizes = self._sizes(steps, rows, back, threads, direct, 0, *self.emitted.sizes)
        for node, at in self.emitted.strides:
            sizes[HEADER + at], sizes[HEADER + at + 1] = values[node].stride()
        if rows and steps:
            self._run(sizes, pointers, self._products.table)
        for _, node, _ in self._kept:
            if node.meta["val"].dtype is torch.bool:
                values[node] = values[node].bool()
        return states

    def _working(self, rows: int, threads: int, direct: bool) -> list[tuple[int, int]]:
        """What the loop needs for itself: pointers, and how many elements behind each."""
        places, lanes = self._places, _LINE // self._item
        found = [(place, rows * width(node)) for place, node in places.get("scratch", ())]
        found += [(place, rows * threads) for place, _ in places.get("scalars", ())]
        for place, pack in places.get("pack", ()):
            panels = (pack.width + lanes - 1) // lanes
            found.append((place, 0 if direct else panels * lanes * len(pack.products) * pack.depth))
        return found

    def _threads(self, rows: int) -> int:
        return torch.get_num_threads() if self._work * rows > _WORTH else 1

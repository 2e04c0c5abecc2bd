"""One compiled loop over time, and how it is called."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines import log
from unrolled.engines.compiler.batch_layout import Layout, ShiftedState
from unrolled.engines.compiler.ir import per_row, width
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.views import places
from unrolled.engines.native.kernel_spec import HEADER, THREADS, Emitted
from unrolled.engines.native.matmul import both, products
from unrolled.engines.native.toolchain import build

_WORTH = 60_000  # multiplications in a step from which on threads pay
_WORTH_APART = 500_000  # in a call, where threads never meet: each keeps its own rows, or columns
_SMALL = 2**18  # bytes of packed weights that each thread may read in every step for its own rows
_FEW_ROWS = 8  # of each thread, at least, where rows are shared
_DIRECT = 2  # steps up to which weights are packed a block at a time, in every step
_ROWS_AT_ONCE = 256  # of a product with the input: from these on its weights are read seldom enough
_HOISTED = 2**20  # bytes of such products that a thread keeps, at most
NO_MEMORY = "no memory for what a loop over time keeps for itself"


@dataclass(slots=True)
class KernelCall:
    """A loop with all that it is called with: addresses, and the tensors behind them."""

    run: int
    sizes: array.array[int]
    threads: int
    pointers: array.array[int]
    table: int
    alive: list[Any]

    def arguments(self) -> tuple[int, int, int, int]:
        """The loop and its arguments as addresses."""
        return self.run, self.sizes.buffer_info()[0], self.pointers.buffer_info()[0], self.table


_call = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def launch(jobs: Sequence[KernelCall]) -> None:
    """Run loops that don't depend on one another: two at the same time, where there are two threads.

    Raises:
        MemoryError: there is no memory for what a loop keeps for itself.
    """
    if len(jobs) == 2 and jobs[0].threads == jobs[1].threads == 1 and torch.get_num_threads() > 1:
        done = both(jobs[0].arguments(), jobs[1].arguments())
    else:
        done = True
        for job in jobs:
            _, sizes, pointers, table = job.arguments()
            done = function(job.run)(sizes, pointers, table) and done
    if not done:
        raise MemoryError(NO_MEMORY)


@functools.cache
def function(address: int) -> Any:
    """A loop to call: with the addresses of its sizes, of its pointers and of the products."""
    return _call(address)


class Kernel:
    """One compiled loop: its split, its source and its library.

    Args:
        part: the split.
        emitted: its source.
        dtype: of all values.
    """

    def __init__(
        self,
        part: LoopPartition,
        emitted: Emitted,
        dtype: torch.dtype,
    ) -> None:
        self.part = part
        self.emitted = emitted
        log.emit.info("a loop in %s\n%s", dtype, emitted.source)
        self._products = products(dtype)
        self._library = library = build.load(emitted.source)  # its code is called as long as this loop is
        self._address = ctypes.cast(library.run, ctypes.c_void_p).value or 0
        self._dtype = dtype
        self._keeps = [(node, width(node)) for node in part.keeps]
        hoisted_rows = {node.args[0] for node in emitted.hoisted}
        sums = [(pack, len(pack.products) * pack.width) for pack in emitted.packs]
        hoisted = [pack.products[0].row in hoisted_rows for pack, _ in sums]
        self._hoisted = sum(many for (_, many), early in zip(sums, hoisted, strict=True) if early)
        weights = [many * pack.depth for pack, many in sums]
        self._read = sum(many for many, early in zip(weights, hoisted, strict=True) if not early)
        self._work = sum(weights) + 5 * sum(width(node) for node in part.loop if per_row(node))
        self._sizes: dict[tuple[Any, ...], tuple[array.array[int], int]] = {}
        needs = [node for kind, node in emitted.pointers if kind in ("array", "matrix")]
        self.needs = list(dict.fromkeys(needs))
        self._places = places(node for node in self.needs if not per_row(node))
        self.bases = list(dict.fromkeys(self._base(node) for node in self.needs))
        self._shifted = [node for kind, node in emitted.pointers if kind == "first"]
        self._recipe = [self._source(kind, what) for kind, what in emitted.pointers]

    def _base(self, node: fx.Node) -> fx.Node:
        return node if per_row(node) else self._places[node].base

    def _source(self, kind: str, what: Any) -> tuple[int, int]:
        """What a pointer points to: a place among the addresses of :meth:`job`, and bytes behind it."""
        bases, states = len(self.bases), len(self.part.old)
        match kind:
            case "starts":
                return 1, 0
            case "array" | "matrix":
                offset = 0 if per_row(what) else self._places[what].offset
                return 2 + self.bases.index(self._base(what)), offset * self._dtype.itemsize
            case "initial" | "states" | "final":
                number = ("initial", "states", "final").index(kind)
                return 2 + bases + number * states + what, 0
            case "kept":
                return 2 + bases + 3 * states + self.part.keeps.index(what), 0
            case "first":
                return 2 + bases + 3 * states + len(self._keeps) + self._shifted.index(what), 0
        return 0, 0  # a pack: its matrices are packed anew in every call

    def job(
        self,
        values: dict[fx.Node, Any],
        initial: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
        final: Sequence[Tensor | None],
        like: Tensor,
        layout: Layout,
        back: bool,
        threads: int,
    ) -> KernelCall:
        """Everything ready for a call; what it keeps for others is put into ``values``.

        Args:
            values: the arrays of what the loop reads, of every row of every step, or of parameters.
            initial: the states before the first step, each ``(batch, width)``; None: zeros.
            kept: for each state where its values after every step go, ``(all rows, width)``; None: nowhere.
            final: for each state where each row's last value goes, ``(batch, width)``; None: nowhere.
            like: a tensor of the dtype.
            layout: of the rows.
            back: from the last step to the first.
            threads: at most.
        """
        addresses = []
        alive: list[Any] = [values, initial, kept, final]
        for node in self.bases:
            value = values[node]
            if type(value) is ShiftedState:
                value = value.state
            elif value.dtype is not self._dtype or not value.is_contiguous():
                value = value.to(self._dtype).contiguous()
                alive.append(value)
            addresses.append(value.data_ptr())
        states = (*initial, *kept, *final)
        addresses += [0 if state is None else state.data_ptr() for state in states]
        for node, columns in self._keeps:
            made = values[node] = like.new_empty(layout.rows, columns)
            addresses.append(made.data_ptr())
        moved = 0
        for node in self._shifted:
            value = values[node]
            if type(value) is ShiftedState:
                moved = 1 if value.back else -1
                first = value.first()
                alive.append(first)
                addresses.append(first.data_ptr())
            else:
                addresses.append(0)
        return self.call(addresses, layout, back, threads, moved, alive)

    def call(
        self,
        addresses: list[int],
        layout: Layout,
        back: bool,
        threads: int,
        moved: int,
        alive: list[Any],
        packed: bool = False,
    ) -> KernelCall:
        """A call with the addresses of the bases, of the initial, kept and final states, and of the rest.

        With ``packed`` the matrices are packed in memory of the caller's, see :meth:`packs`.
        """
        regular = layout.starts is None
        key = (layout.steps, layout.batch, regular, back, threads, moved, packed)
        if not regular:
            alive.append(layout)
        found = self._sizes.get(key)
        if found is None:
            if len(self._sizes) > 1000:  # lengths that always differ
                self._sizes.clear()
            numbers = self._numbers(layout, back, threads, moved, packed)
            found = self._sizes[key] = numbers, numbers[THREADS]
        starts = 0 if layout.starts is None else layout.starts.data_ptr()
        every = [0, starts, *addresses]
        pointers = array.array("q", [every[k] + offset for k, offset in self._recipe])
        return KernelCall(self._address, *found, pointers, self._products.table, alive)

    def pointers_to(self, address: int) -> list[int]:
        """The places of the pointers that lead to one of the addresses of :meth:`call`."""
        return [place for place, (k, _) in enumerate(self._recipe) if k == 2 + address]

    def packs(self) -> list[tuple[int, int]]:
        """For each group of packed matrices its place among the pointers, and how many elements it has."""
        lanes = self._products.lanes
        return [
            (place, -(-pack.width // lanes) * lanes * len(pack.products) * pack.depth)
            for place, (kind, pack) in enumerate(self.emitted.pointers)
            if kind == "pack"
        ]

    def _numbers(
        self, layout: Layout, back: bool, threads: int, moved: int, packed: bool
    ) -> array.array[int]:
        steps, rows = layout.steps, layout.batch
        direct = steps <= _DIRECT and not packed
        apart = layout.starts is None and self._work * rows * steps > _WORTH_APART
        by_rows = (
            apart
            and threads > 1
            and self._read * self._dtype.itemsize <= _SMALL
            and rows >= threads * (_FEW_ROWS if self.emitted.packs else 1)
        )
        if not by_rows and not (apart and self.emitted.apart) and self._work * rows < _WORTH:
            threads = 1
        panels = -(-max(map(width, self.part.new)) // self._products.lanes)
        turns = (
            apart
            and self.emitted.apart
            and panels < threads
            and rows * steps >= 2 * threads * _ROWS_AT_ONCE
            and not (by_rows or packed or self.emitted.late)
        )
        at_once = 1 if by_rows else min(steps, -(-_ROWS_AT_ONCE // max(rows, 1)))
        most = _HOISTED * threads // max(1, rows * self._hoisted * self._dtype.itemsize)
        hoisted = steps if direct and not by_rows else max(1, min(at_once, most))
        numbers = array.array("q", [steps, rows, back, threads, direct, by_rows, 0, hoisted, turns])
        assert len(numbers) == HEADER
        numbers.extend(self.emitted.sizes)
        for node, at in self.emitted.strides:
            numbers[HEADER + at], numbers[HEADER + at + 1] = self._places[node].strides
        for _, at in self.emitted.shifts:
            numbers[HEADER + at] = moved
        return numbers

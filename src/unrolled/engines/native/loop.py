"""One compiled loop over time, and how it is called."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines.native import build
from unrolled.engines.native.emit import emit
from unrolled.engines.native.graph import Split
from unrolled.engines.native.layout import Before, Layout
from unrolled.engines.native.products import both, products
from unrolled.engines.native.program import HEADER, per_row, width
from unrolled.engines.native.views import Place, places

_WORTH = 60_000  # multiplications in a step from which on threads pay
_WORTH_BY_ROWS = 500_000  # in a call, where each thread keeps its own rows and they never meet
_SMALL = 2**18  # bytes of packed weights that each thread may read for its own rows
_FEW_ROWS = 8  # of each thread, at least, where rows are shared
_DIRECT = 2  # steps up to which weights are packed a block at a time, in every step
_ROWS_AT_ONCE = 64  # of a product with the input: from these on its weights are read seldom enough
_HOISTED = 2**18  # bytes of such products that a thread keeps, at most


@dataclass
class Job:
    """A loop with all that it is called with: addresses, and the tensors behind them."""

    run: int
    sizes: array.array[int]
    pointers: array.array[int]
    table: int
    alive: list[Any]

    def arguments(self) -> tuple[int, int, int, int]:
        """The loop and its arguments as addresses."""
        return self.run, self.sizes.buffer_info()[0], self.pointers.buffer_info()[0], self.table


_call = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def execute(jobs: Sequence[Job]) -> None:
    """Run loops that don't depend on one another: two at the same time, where there are two threads.

    Raises:
        MemoryError: there is no memory for what a loop keeps for itself.
    """
    if len(jobs) == 2 and torch.get_num_threads() > 1 and jobs[0].sizes[3] == jobs[1].sizes[3] == 1:
        done = both(jobs[0].arguments(), jobs[1].arguments())
    else:
        done = all([_function(job.run)(*job.arguments()[1:]) for job in jobs])
    if not done:
        raise MemoryError("no memory for what a loop over time keeps for itself")


@functools.cache
def _function(address: int) -> Any:
    return _call(address)


class Loop:
    """One compiled loop: its split, its source and its library.

    Args:
        part: the split.
        dtype: of all values.
        shifted: states of another loop that are read as they were before each step.
        whole: products that are computed before the loop since others read them too.
    """

    def __init__(
        self,
        part: Split,
        dtype: torch.dtype,
        shifted: Collection[fx.Node] = (),
        whole: Collection[fx.Node] = (),
    ) -> None:
        self.part = part
        self.emitted = emitted = emit(part, dtype, shifted, whole)
        self._products = products(dtype)
        library = build.load(emitted.source)
        self._address = ctypes.cast(library.run, ctypes.c_void_p).value or 0
        self._library = library  # its code is called as long as this loop is
        self._item = dtype.itemsize
        self._kept = [(place, node, width(node)) for place, (kind, node) in self._of("kept")]
        self._arrays = [(place, node) for place, (_, node) in self._of("array")]
        self._first = {node: place for place, (_, node) in self._of("first")}
        self._matrices = [(place, node) for place, (_, node) in self._of("matrix")]
        self._states = [
            (place, *(next(p for p, (_, k) in self._of(kind) if k == number) for kind in ("states", "final")))
            for place, (_, number) in self._of("initial")
        ]
        self._widths = [width(old) for old in part.old]
        products_of = [(pack.products[0].row, len(pack.products) * pack.width * pack.depth) for pack in emitted.packs]
        hoisted_rows = {node.args[0] for node in emitted.hoisted}
        self._hoisted = sum(
            len(pack.products) * pack.width for pack in emitted.packs if pack.products[0].row in hoisted_rows
        )
        self._weights = sum(work for _, work in products_of)
        self._work = self._weights + 5 * sum(width(node) for node in part.loop if per_row(node))
        self._sizes: dict[tuple[Any, ...], array.array[int]] = {}

    def _of(self, kind: str) -> list[tuple[int, tuple[str, Any]]]:
        return [(place, pair) for place, pair in enumerate(self.emitted.pointers) if pair[0] == kind]

    @functools.cached_property
    def needs(self) -> list[fx.Node]:
        """What the loop reads from outside: nodes whose values, or whose bases' values, it is given."""
        return [*(node for _, node in self._arrays), *(node for _, node in self._matrices)]

    @functools.cached_property
    def _places(self) -> dict[fx.Node, Place]:
        return places(node for node in self.needs if not per_row(node))

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
    ) -> Job:
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
        pointers = array.array("q", bytes(8 * len(self.emitted.pointers)))
        alive: list[Any] = [initial, kept, final, layout]
        rows = layout.rows
        if layout.starts is not None:
            pointers[0] = layout.starts.data_ptr()
        for k, (first, whole, last) in enumerate(self._states):
            for place, tensor in ((first, initial[k]), (whole, kept[k]), (last, final[k])):
                if tensor is not None:
                    pointers[place] = tensor.data_ptr()
        moved = 0
        for place, node in self._arrays:
            value = self._value(node, values)
            if isinstance(value, Before):
                moved = 1 if value.back else -1
                start = value.initial
                if start is None:
                    start = value.state.new_zeros(value.batch, value.state.shape[1])
                alive.append(start)
                pointers[self._first[node]] = start.data_ptr()
                value = value.state
            elif value.dtype != like.dtype or not value.is_contiguous():
                value = value.to(like.dtype).contiguous()
            alive.append(value)
            pointers[place] = value.data_ptr()
        for place, node in self._matrices:
            pointers[place] = self._matrix(node, values)
        for place, node, columns in self._kept:
            made = values[node] = like.new_empty(rows, columns)
            pointers[place] = made.data_ptr()
        key = (layout.steps, layout.batch, layout.starts is None, back, threads, moved)
        sizes = self._sizes.get(key)
        if sizes is None:
            if len(self._sizes) > 1000:  # lengths that always differ
                self._sizes.clear()
            sizes = self._sizes[key] = self._numbers(layout, back, threads, moved)
        return Job(self._address, sizes, pointers, self._products.table, alive)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if per_row(node):
            return values[node]
        place = self._places[node]
        return place.of(values[place.base], 0)

    def _matrix(self, node: fx.Node, values: dict[fx.Node, Any]) -> int:
        place = self._places[node]
        base = values[place.base]
        return int(base.data_ptr()) + place.offset * self._item

    def _numbers(self, layout: Layout, back: bool, threads: int, moved: int) -> array.array[int]:
        steps, rows = layout.steps, layout.batch
        direct = steps <= _DIRECT
        by_rows = (
            threads > 1
            and layout.starts is None
            and self._weights * self._item <= _SMALL
            and rows >= _FEW_ROWS * threads
            and self._work * rows * steps > _WORTH_BY_ROWS
        )
        if not by_rows and self._work * rows < _WORTH:
            threads = 1
        at_once = 1 if by_rows else min(steps, -(-_ROWS_AT_ONCE // max(rows, 1)))
        most = _HOISTED * threads // max(1, rows * self._hoisted * self._item)
        hoisted = steps if direct else max(1, min(at_once, most))
        numbers = array.array("q", [steps, rows, back, threads, direct, by_rows, 0, hoisted])
        assert len(numbers) == HEADER
        numbers.extend(self.emitted.sizes)
        for node, at in self.emitted.strides:
            numbers[HEADER + at], numbers[HEADER + at + 1] = self._places[node].strides
        for _, at in self.emitted.shifts:
            numbers[HEADER + at] = moved
        return numbers

"""Generate the Triton source of a loop whose matrices are read anew in each step.

One program computes a tile of rows over all time steps, level by level. A phase loops over blocks of its
columns, and a product over blocks of its matrix, so neither has a size limit. A level stores its results in
memory, with a barrier before the next level. Each state has two buffers, for the values before and after a
step.

In a persistent kernel, several programs run at the same time and share the blocks of columns of a tile of
rows. After each level, they synchronize. Each of them computes all scalars of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx

from unrolled.engines.compiler.generated_code import without_parentheses
from unrolled.engines.compiler.kernel_ir import (
    Buffer,
    Group,
    KernelIR,
    Level,
    Load,
    Memory,
    Phase,
    Scalar,
    Sum,
)
from unrolled.engines.compiler.views import TensorView
from unrolled.engines.gpu.choice import Choice
from unrolled.engines.gpu.instructions import Body
from unrolled.engines.gpu.kernel_source import (
    KernelSpec,
    Source,
    Tile,
    full,
    times,
)
from unrolled.engines.gpu.pieces import padded
from unrolled.engines.gpu.triton_ops import REDUCTIONS, literal
from unrolled.engines.gpu.tuning import (
    BLOCK_COLUMNS,
    BLOCK_DEPTH,
    SHARED_BLOCK_COLUMNS,
    SHARED_BLOCK_DEPTH,
    WARPS,
)


class StreamedKernel:
    """Generates the source of one kernel.

    Args:
        kernel: Its IR.
        views: Its inputs and matrices without rows, as views of tensors that are none.
        shared: Whether several programs share the columns of a row.
    """

    def __init__(self, kernel: KernelIR, views: dict[fx.Node, TensorView], shared: bool = False) -> None:
        self.kernel, self.shared = kernel, shared
        self.columns = SHARED_BLOCK_COLUMNS if shared else BLOCK_COLUMNS
        self.depth = SHARED_BLOCK_DEPTH if shared else BLOCK_DEPTH
        self.meetings = 0
        self.views = views
        self.source = Source(kernel.dtype, kernel.storage)
        self.has_shifted = False

    def emit(self, choice: Choice) -> KernelSpec:
        """Return the source."""
        source = self.source
        self._load_states()
        source.line("old = rows + (step % 2) * stride")
        source.line("new = rows + (1 - step % 2) * stride")
        self._keep_ended_rows()
        for level in self.kernel.levels:
            for scalar in level.scalars:
                self._scalar(scalar)
            self._phases(level)
            if level.phases or any(scalar.buffers for scalar in level.scalars):
                self._barrier()
        meetings = self.meetings
        self._store_final_states()
        if self.has_shifted:
            inside = "inside = live & (before >= 0) & (before < steps * stride)"
            source.step[:0] = ["before = at + SHIFT * stride", inside]
        if not self.shared:
            return source.render(WARPS, choice)
        widths = [phase.width for phase in self.kernel.phases()]
        blocks = -(-max([*widths, *(state.width for state in self.kernel.states)]) // self.columns)
        return source.render(WARPS, choice, blocks, meetings)

    def _barrier(self) -> None:
        """Synchronize all programs of a tile of rows, or only the threads of one program."""
        if not self.shared:
            self.source.line("tl.debug_barrier()")
            return
        self.meetings += 1
        arrived = self.source.argument("arrived", "arrived", "arrived")
        self.source.line("goal += parts")
        self.source.line(self.source.call("meet", f"{arrived} + tl.program_id(0)", "goal"))

    # --- states ---

    def _load_states(self) -> None:
        """Copy the initial states to where the first step reads them."""
        source = self.source
        for k, state in enumerate(self.kernel.states):
            initial = source.argument("initial", k, f"initial{k}")
            with self._blocks(state.width, "in_batch") as size:
                source.line(f"value = tl.zeros((ROWS, {size}), DT)")
                source.line(f"if {initial} is not None:")
                load = source.load(f"{initial} + {times('rows', state.width)} + c", "m")
                source.line(f"    value = {load}")
                source.line(f"tl.store({self._state(k)} + {times('rows', state.width)} + c, value, m)")
        self._barrier()
        first = ["part = tl.program_id(1)", "goal = part * 0"] if self.shared else []
        source.head += [*first, *source.step]
        source.step, self.meetings = [], 0

    def _keep_ended_rows(self) -> None:
        """Copy the states of rows that have no such step."""
        source = self.source
        source.line("if lengths is not None:")
        source.depth += 1
        for k, state in enumerate(self.kernel.states):
            with self._blocks(state.width, "in_batch & (live == 0)"):
                source.line(f"value = {self._own_load(self._state(k), times('old', state.width) + ' + c')}")
                source.line(f"tl.store({self._state(k)} + {times('new', state.width)} + c, value, m)")
        source.depth -= 1

    def _store_final_states(self) -> None:
        source, step = self.source, self.source.step
        source.step = []
        source.line("last = rows + (count % 2) * stride")
        for k, state in enumerate(self.kernel.states):
            final = source.argument("final", k, f"final{k}")
            source.line(f"if {final} is not None:")
            source.depth += 1
            with self._blocks(state.width, "in_batch"):
                source.line(f"value = {self._own_load(self._state(k), times('last', state.width) + ' + c')}")
                source.line(f"tl.store({final} + {times('rows', state.width)} + c, value, m)")
            source.depth -= 1
        source.tail, source.step = source.step, step

    def _state(self, number: int) -> str:
        return self._workspace(f"s{number}", 2, self.kernel.states[number].width)

    def _workspace(self, name: str, copies: int, columns: int) -> str:
        return self.source.argument("workspace", (name, copies, columns), name)

    def _own_load(self, pointer: str, address: str, mask: str = "m") -> str:
        """Return a load of values that this kernel has stored.

        If other programs have stored them, the load must bypass the cache of the multiprocessor.
        """
        options = ', cache_modifier=".cg"' if self.shared else ""
        return self.source.load(f"{pointer} + {address}", mask, options)

    # --- levels ---

    @contextmanager
    def _blocks(self, width: int, live: str = "live", whole: bool = False) -> Iterator[int]:
        """Add a loop over blocks of columns: their numbers are ``c``, and those to store are ``m``.

        Args:
            width: Number of columns.
            live: Which rows exist.
            whole: Whether each program goes over all blocks, also if several share them.

        Yields:
            The number of columns of a block.
        """
        source, size = self.source, min(self.columns, max(16, padded(width)))
        if self.shared and not whole:
            source.line(f"for first in range(part * {size}, {width}, parts * {size}):")
        else:
            source.line(f"for first in range(0, {width}, {size}):")
        source.depth += 1
        source.line(f"c = first + tl.arange(0, {size})[None, :]")
        source.line(f"m = {live} & (c < {width})")
        yield size
        source.depth -= 1

    def _phases(self, level: Level) -> None:
        for phase in level.phases:
            with self._blocks(phase.width) as size:
                sums = [self._sums(group, phase.width, size) for group in phase.groups]
                tiles = _BlockTiles(self, size, "c", phase.width, phase, sums)
                values = [store.value for store in phase.stores]
                body = Body(self.source, tiles, phase.instructions, values)
                for store in phase.stores:
                    column = f"{store.offset} + c" if store.offset else "c"
                    self._store(store.buffer, column, full(body.named(store.value), size), "m")

    def _scalar(self, scalar: Scalar) -> None:
        """Compute a number for each row. What it reduces is reduced block by block."""
        source, name = self.source, f"scalar{scalar.number}"
        if scalar.width == 1:
            body = Body(source, _BlockTiles(self, 1, "", 1), scalar.instructions, [scalar.result])
            source.line(f"{name} = {without_parentheses(full(body.operand(scalar.result), 1))}")
        else:
            reduction = REDUCTIONS[scalar.reduction]
            neutral = literal(reduction.neutral)
            source.line(f"{name} = tl.full((ROWS, 1), {neutral}, DT)")
            with self._blocks(scalar.width, whole=True) as size:
                tiles = _BlockTiles(self, size, "c", scalar.width)
                body = Body(source, tiles, scalar.instructions, [scalar.result])
                value = full(body.operand(scalar.result), size)
                value = f"tl.where(c < {scalar.width}, {without_parentheses(value)}, {neutral})"
                part = source.apply(reduction.whole, [Tile(value, size, True)], [None])
                parts = [Tile(name, 1, True), Tile(part, 1, True)]
                joined = source.apply(reduction.join, parts, [None, None])
                source.line(f"{name} = {without_parentheses(joined)}")
        for buffer in scalar.buffers:
            self._store(buffer, "", name, "live & (part == 0)" if self.shared else "live")

    def _store(self, buffer: Buffer, column: str, value: str, mask: str) -> None:
        source, (pointer, row) = self.source, self._place(buffer)
        value = without_parentheses(value)
        columns = f" + {column}" if column else ""
        source.line(f"tl.store({pointer} + {times(row, buffer.width)}{columns}, {value}, {mask})")
        if buffer.memory is Memory.NEW_STATE:
            every = source.argument("all_steps", buffer.index, f"steps{buffer.index}")
            source.line(f"if {every} is not None:")
            source.line(f"    tl.store({every} + {times('at', buffer.width)}{columns}, {value}, {mask})")

    def _place(self, buffer: Buffer) -> tuple[str, str]:
        """Return the pointer to a buffer with rows, and the row in it."""
        match buffer.memory:
            case Memory.INPUT:
                return self.source.value(self.kernel.inputs[buffer.index].node), "at"
            case Memory.STATE:
                return self._state(buffer.index), "old"
            case Memory.NEW_STATE:
                return self._state(buffer.index), "new"
            case Memory.SAVED:
                node = self.kernel.saved[buffer.index]
                return self.source.argument("saved", node, f"saved{buffer.index}"), "at"
            case _:
                return self._workspace(f"scratch{buffer.index}", 1, buffer.width), "rows"

    def load(self, buffer: Buffer, column: str, mask: str, size: int) -> Tile:
        """Load columns of a buffer.

        Args:
            buffer: The buffer.
            column: Expression of the numbers of the columns. Empty for the first one.
            mask: Which of them exist. Empty if all do.
            size: How many there are.
        """
        source, name = self.source, self.source.numbered("v")
        columns = f" + {column}" if column else ""
        if buffer.memory is Memory.INPUT and not buffer.per_row:
            view = self.views[self.kernel.inputs[buffer.index].node]
            offset = f" + {view.offset}" if view.offset else ""
            source.line(f"{name} = {source.load(f'{source.value(view.base)}{offset}{columns}', mask)}")
            return Tile(name, size, False)
        is_shifted = buffer.memory is Memory.INPUT and self.kernel.inputs[buffer.index].shifted
        self.has_shifted |= is_shifted
        masked = f" & ({mask})" if mask else ""
        pointer, row = self._place(buffer)
        row, live = ("before", "inside") if is_shifted else (row, "live")
        address, mask = f"{times(row, buffer.width)}{columns}", f"{live}{masked}"
        if buffer.memory is Memory.INPUT:
            source.line(f"{name} = {source.load(f'{pointer} + {address}', mask)}")
        else:
            source.line(f"{name} = {self._own_load(pointer, address, mask)}")
        if is_shifted:
            node = self.kernel.inputs[buffer.index].node
            initial = source.argument("shifted_initial", node, f"{pointer}_initial")
            address = f"{initial} + {times('rows', buffer.width)}{columns}"
            source.line(f"if {initial} is not None:")
            source.line(f"    initial = {source.load(address, f'live & (inside == 0){masked}')}")
            source.line(f"    {name} = tl.where(inside, {name}, initial)")
        return Tile(name, size, True)

    # --- products ---

    def _sums(self, group: Group, width: int, size: int) -> list[Tile]:
        """Add a loop over the depth of the products of a row, and return their sums."""
        source, depth = self.source, group.depth
        assert group.buffer is not None
        names = [source.numbered("a") for _ in group.products]
        for name in names:
            source.line(f"{name} = tl.zeros((ROWS, {size}), DT)")
        # At least two blocks: Triton would move the loads of a single one to before the steps, into registers
        # that it doesn't have. Compiled for sm_90, that spilled 752 bytes of four gates with 128 units.
        block = min(self.depth, max(16, padded(depth) // (2 if self.shared else 1)))
        source.line(f"for k in range(0, {depth}, {block}):")
        source.depth += 1
        source.line(f"d = k + tl.arange(0, {block})")
        row = full(self.load(group.buffer, "d[None, :]", f"d[None, :] < {depth}", block), block)
        for name, product in zip(names, group.products, strict=True):
            view = self.views[product.matrix]
            down, across = view.strides
            start = view.offset + product.offset * across
            offset = f" + {start}" if start else ""
            address = (
                f"{source.value(view.base)}{offset} + {times('d[:, None]', down)} + {times('c', across)}"
            )
            weight = source.factor(source.load(address, f"(d[:, None] < {depth}) & (c < {width})"))
            options = "input_precision=PRECISION, out_dtype=DT"
            source.line(f"{name} = tl.dot({source.factor(row)}, {weight}, {name}, {options})")
        source.depth -= 1
        return [Tile(name, size, True) for name in names]

    def hoisted(self, phase: Phase, one: Sum, size: int) -> Tile:
        """Load columns of a product that is computed before the loop."""
        product, name = phase.hoisted[one.group].products[one.index], self.source.numbered("v")
        key = (product.row, product.matrix)
        pointer = self.source.argument("hoisted", key, f"product{len(self.source.arguments)}")
        columns = int(product.matrix.meta["val"].shape[1])
        offset = f" + {product.offset}" if product.offset else ""
        load = self.source.load(f"{pointer} + {times('at', columns)}{offset} + c", "m")
        self.source.line(f"{name} = {load}")
        return Tile(name, size, True)


@dataclass(frozen=True)
class _BlockTiles:
    """What a block of a phase or a scalar reads, see :class:`~unrolled.engines.gpu.instructions.Tiles`."""

    kernel: StreamedKernel
    size: int
    column: str
    width: int
    phase: Phase | None = None
    sums: list[list[Tile]] | None = None

    def load(self, load: Load) -> Tile:
        if load.broadcast:
            return self.kernel.load(load.buffer, "", "", 1)
        column, mask = f"{load.offset} + {self.column}" if load.offset else self.column, f"c < {self.width}"
        if not self.column:
            column, mask = str(load.offset or ""), ""
        return self.kernel.load(load.buffer, column, mask, self.size)

    def sum(self, one: Sum) -> Tile:
        assert self.phase is not None
        assert self.sums is not None
        if one.hoisted:
            return self.kernel.hoisted(self.phase, one, self.size)
        return self.sums[one.group][one.index]

    def scalar(self, number: int) -> Tile:
        return Tile(f"scalar{number}", 1, True)

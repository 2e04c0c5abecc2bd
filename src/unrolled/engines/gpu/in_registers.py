"""Generate the Triton source of a loop whose values fit in registers.

One program computes a tile of rows over all time steps. The states, and all values of a step, are tiles in
registers, and the matrices of the loop are loaded once, before it. Values are cut into pieces, see
``pieces.py``: a tile holds one piece, padded with columns of which nothing is known. So they are replaced
before a product or a reduction reads them.

If each column of a step depends on this column only, there may be a program for each block of columns.
"""

from __future__ import annotations

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
from unrolled.engines.gpu.pieces import Pieces
from unrolled.engines.gpu.triton_ops import REDUCTIONS, literal
from unrolled.engines.gpu.tuning import MAX_PIECES, WARPS, WARPS_OF_WIDE_TILES, WIDE_TILE


class RegisterKernel:
    """Generates the source of one kernel.

    Args:
        kernel: Its IR.
        views: Its inputs and matrices without rows, as views of tensors that are none.
        block: Number of columns of a program, if each computes some columns only. 0: all.
    """

    def __init__(self, kernel: KernelIR, views: dict[fx.Node, TensorView], block: int = 0) -> None:
        self.kernel, self.block = kernel, block
        self.source = Source(kernel.dtype, kernel.storage, block)
        self.pieces = Pieces(kernel, MAX_PIECES)
        self.views = views
        self.tiles: dict[tuple[Memory, int, int], Tile] = {}  # by buffer and first column
        self.loaded: dict[tuple[Buffer, int, int], Tile] = {}
        self.unpadded: dict[str, str] = {}
        self.scalars: dict[int, Tile] = {}
        self.has_shifted = False

    def emit(self, choice: Choice) -> KernelSpec:
        """Return the source."""
        self._load_states()
        for level in self.kernel.levels:
            self._level(level)
        self._finish_step()
        if self.has_shifted:
            inside = "inside = live & (before >= 0) & (before < steps * stride)"
            self.source.step[:0] = ["before = at + SHIFT * stride", inside]
        if self.block:
            width = max(phase.width for phase in self.kernel.phases())
            return self.source.render(WARPS, choice, blocks=-(-width // self.block))
        warps = WARPS_OF_WIDE_TILES if self.pieces.columns > WIDE_TILE else WARPS
        return self.source.render(warps, choice)

    # --- states ---

    def _state_pieces(self, number: int) -> list[tuple[int, int]]:
        return self.pieces.of_buffer(Buffer(Memory.STATE, number, self.kernel.states[number].width))

    def _load_states(self) -> None:
        """Load the initial states, each piece into a variable that the loop carries."""
        source = self.source
        for k, state in enumerate(self.kernel.states):
            pointer = source.argument("initial", k, f"initial{k}")
            lines: tuple[list[str], list[str]] = ([], [])
            for j, (offset, width) in enumerate(self._state_pieces(k)):
                name = f"s{k}_{j}"
                load = self._memory_load(pointer, "rows", state.width, offset, width, "in_batch")
                lines[0].append(f"    {name} = tl.zeros((ROWS, {self.source.padded(width)}), DT)")
                lines[1].append(f"    {name} = {load}")
                self.tiles[Memory.STATE, k, offset] = Tile(name, self.source.padded(width), True)
            source.head += [f"if {pointer} is None:", *lines[0], "else:", *lines[1]]

    def _finish_step(self) -> None:
        """Store the new states, hand them to the next step, and store the final ones after the loop."""
        source = self.source
        moves = []
        for k, state in enumerate(self.kernel.states):
            pieces = self._state_pieces(k)
            stores = []
            pointer = source.argument("all_steps", k, f"steps{k}")
            final = source.argument("final", k, f"final{k}")
            source.tail.append(f"if {final} is not None:")
            for j, (offset, width) in enumerate(pieces):
                tile = full(self.tiles[Memory.NEW_STATE, k, offset], self.source.padded(width))
                name, new = f"s{k}_{j}", f"n{k}_{j}"
                source.line(f"{new} = {tile}")
                stores.append(f"    {self._memory_store(pointer, 'at', state.width, offset, width, new)}")
                moves.append(f"{name} = {new} if lengths is None else tl.where(live, {new}, {name})")
                store = self._memory_store(final, "rows", state.width, offset, width, name, "in_batch")
                source.tail.append(f"    {store}")
            source.step += [f"if {pointer} is not None:", *stores]
        source.step += moves

    # --- levels ---

    def _level(self, level: Level) -> None:
        for scalar in level.scalars:
            self._scalar(scalar)
        stored: list[tuple[Buffer, int, int, Tile]] = []
        for phase in level.phases:
            results = [store.value for store in phase.stores]
            for start, width in self.pieces.of_body(phase):
                tiles = _PieceTiles(self, start, width, phase)
                body = Body(self.source, tiles, phase.instructions, results)
                stored += [
                    (store.buffer, store.offset + start, width, body.named(store.value))
                    for store in phase.stores
                ]
        for buffer, offset, width, tile in stored:  # only now: phases of a level don't read each other's
            self._store(buffer, offset, width, tile)

    def _scalar(self, scalar: Scalar) -> None:
        """Compute a number for each row. What it reduces is reduced piece by piece."""
        source, total = self.source, None
        for start, width in self.pieces.of_body(scalar):
            tiles = _PieceTiles(self, start, width)
            body = Body(source, tiles, scalar.instructions, [scalar.result])
            tile = body.operand(scalar.result)
            text = tile.text
            if scalar.reduction is not None:
                reduction = REDUCTIONS[scalar.reduction]
                if width > 1:
                    whole = Tile(full(tile, self.source.padded(width)), self.source.padded(width), True)
                    text = self._without_padding(whole, width, reduction.neutral)
                    whole = Tile(text, self.source.padded(width), True)
                    text = source.apply(reduction.whole, [whole], [None])
                if total is not None:
                    text = source.apply(
                        reduction.join, [Tile(total, 1, True), Tile(text, 1, True)], [None] * 2
                    )
            total = text
        assert total is not None
        name = f"scalar{scalar.number}"
        source.line(f"{name} = {without_parentheses(total)}")
        tile = self.scalars[scalar.number] = Tile(name, 1, True)
        for buffer in scalar.buffers:
            self._store(buffer, 0, 1, tile)

    def _store(self, buffer: Buffer, offset: int, width: int, tile: Tile) -> None:
        self.tiles[buffer.memory, buffer.index, offset] = tile
        if buffer.memory is Memory.SAVED:
            node = self.kernel.saved[buffer.index]
            pointer = self.source.argument("saved", node, f"saved{buffer.index}")
            value = full(tile, self.source.padded(width))
            self.source.line(self._memory_store(pointer, "at", buffer.width, offset, width, value))

    # --- memory ---

    def _address(self, pointer: str, row: str, stride: int, offset: int, width: int) -> str:
        parts = [pointer, times(row, stride)]
        parts += [str(offset)] if offset else []
        columns = self.source.columns(width)
        return " + ".join([*parts, columns] if columns else parts)

    def _mask(self, width: int, live: str) -> str:
        mask = self.source.column_mask(width)
        return f"{live} & {mask}" if mask else live

    def _memory_load(
        self, pointer: str, row: str, stride: int, offset: int, width: int, live: str = "live"
    ) -> str:
        address = self._address(pointer, row, stride, offset, width)
        return self.source.load(address, self._mask(width, live))

    def _memory_store(
        self, pointer: str, row: str, stride: int, offset: int, width: int, value: str, live: str = "live"
    ) -> str:
        address = self._address(pointer, row, stride, offset, width)
        return f"tl.store({address}, {without_parentheses(value)}, {self._mask(width, live)})"

    def load(self, buffer: Buffer, offset: int, width: int) -> Tile:
        """Return the tile with columns of a buffer. Those of an input are loaded once in a step."""
        if buffer.memory is not Memory.INPUT:
            return self.tiles[buffer.memory, buffer.index, offset]
        key = (buffer, offset, width)
        if key not in self.loaded:
            self.loaded[key] = self._load_input(buffer, offset, width)
        return self.loaded[key]

    def _load_input(self, buffer: Buffer, offset: int, width: int) -> Tile:
        source, one = self.source, self.kernel.inputs[buffer.index]
        name = source.numbered("v")
        if not buffer.per_row:
            view = self.views[one.node]
            parts = [source.value(view.base), str(view.offset + offset), source.columns(width)]
            address = " + ".join(part for part in parts if part not in ("", "0"))
            source.head.append(f"{name} = {source.load(address, source.column_mask(width))}")
            return Tile(name, self.source.padded(width), False)
        pointer, live, row = source.value(one.node), "live", "at"
        if one.shifted:
            self.has_shifted = True
            live, row = "inside", "before"
        load = self._memory_load(pointer, row, buffer.width, offset, width, live)
        source.line(f"{name} = {load}")
        if one.shifted:
            initial = source.argument("shifted_initial", one.node, f"{pointer}_initial")
            load = self._memory_load(initial, "rows", buffer.width, offset, width, "live & (inside == 0)")
            source.step += [f"if {initial} is not None:", f"    {name} = tl.where(inside, {name}, {load})"]
        return Tile(name, self.source.padded(width), True)

    def hoisted(self, group: Group, index: int, start: int, width: int) -> Tile:
        """Load columns of a product that is computed before the loop."""
        product = group.products[index]
        key = (product.row, product.matrix)
        pointer = self.source.argument("hoisted", key, f"product{len(self.source.arguments)}")
        columns = int(product.matrix.meta["val"].shape[1])
        name = self.source.numbered("v")
        load = self._memory_load(pointer, "at", columns, product.offset + start, width)
        self.source.line(f"{name} = {load}")
        return Tile(name, self.source.padded(width), True)

    # --- products ---

    def product(self, group: Group, index: int, start: int, width: int) -> str:
        """Return the expression of columns of a product: the sum over the pieces of its row."""
        product, buffer = group.products[index], group.buffer
        assert buffer is not None
        source, total = self.source, ""
        for first, depth in self.pieces.of_buffer(buffer):
            tile = self.load(buffer, first, depth)
            row = Tile(full(tile, self.source.padded(depth)), self.source.padded(depth), True)
            weight = self._weight(product.matrix, first, depth, product.offset + start, width)
            if width == 1 or depth == 1:  # tl.dot needs at least 16 of each
                text = f"{row.text} * {weight}"
                if depth > 1:
                    text = f"tl.sum({self._without_padding(row, depth, 0.0)} * {weight}, 1, keep_dims=True)"
                total = f"({total} + {text})" if total else f"({text})"
                continue
            factors = f"{source.factor(self._without_padding(row, depth, 0.0))}, {weight}"
            added = ""
            if total:
                added = f", {source.numbered('v')}"
                source.line(f"{added[2:]} = {without_parentheses(total)}")
            total = f"tl.dot({factors}{added}, input_precision=PRECISION, out_dtype=DT)"
        return total

    def _weight(self, matrix: fx.Node, first: int, depth: int, column: int, width: int) -> str:
        """Return the variable with a block of a matrix, which is loaded before the loop."""
        source, view = self.source, self.views[matrix]
        down, across = view.strides
        start = view.offset + first * down + column * across
        masks = []
        if width == 1:  # one column: as a row
            index = times(source.columns(depth), down) if depth > 1 else ""
            masks = [source.column_mask(depth)] if depth > 1 else []
        elif depth == 1:
            index = times(source.columns(width), across)
            masks = [source.column_mask(width)]
        else:
            index = f"{times(source.depths(depth), down)} + {times(source.columns(width), across)}"
            masks = [source.depth_mask(depth), source.column_mask(width)]
        parts = [source.value(view.base), str(start), index]
        address = " + ".join(part for part in parts if part not in ("", "0"))
        load = source.load(address, " & ".join(mask for mask in masks if mask))
        load = load if 1 in (width, depth) else source.factor(load)
        return source.in_head(("weight", matrix, first, depth, column, width), "w", load)

    def _without_padding(self, tile: Tile, width: int, neutral: float) -> str:
        """Return a tile with a number in the columns beyond its width."""
        mask = self.source.column_mask(width)
        if not mask:
            return tile.text
        text = f"tl.where({mask}, {without_parentheses(tile.text)}, {literal(neutral)})"
        if text not in self.unpadded:
            self.unpadded[text] = self.source.numbered("r")
            self.source.line(f"{self.unpadded[text]} = {text}")
        return self.unpadded[text]


@dataclass(frozen=True)
class _PieceTiles:
    """What a piece of a phase or a scalar reads, see :class:`Tiles`."""

    kernel: RegisterKernel
    start: int
    width: int
    phase: Phase | None = None

    def load(self, load: Load) -> Tile:
        if load.broadcast:
            return self.kernel.load(load.buffer, 0, 1)
        return self.kernel.load(load.buffer, load.offset + self.start, self.width)

    def sum(self, one: Sum) -> Tile:
        assert self.phase is not None
        if one.hoisted:
            return self.kernel.hoisted(self.phase.hoisted[one.group], one.index, self.start, self.width)
        text = self.kernel.product(self.phase.groups[one.group], one.index, self.start, self.width)
        return Tile(text, self.kernel.source.padded(self.width), True)

    def scalar(self, number: int) -> Tile:
        return self.kernel.scalars[number]

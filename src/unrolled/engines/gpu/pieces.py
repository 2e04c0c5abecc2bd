"""Cut the values of a loop into pieces that fit together, because Triton can't slice a tile in registers.

A value of a step is held as tiles in registers, one for each *piece*: a run of its columns. A load takes a
whole piece. So a value must be cut wherever a phase reads a part of it, and a phase, which computes each
column for itself, must be cut wherever a value that it reads or stores is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from unrolled.engines.compiler.kernel_ir import (
    Buffer,
    Instruction,
    KernelIR,
    Load,
    Memory,
    Phase,
    Scalar,
)

Piece = tuple[int, int]  # the first column, and the number of columns
_Key = tuple[Memory, int]
_MIN_COLUMNS = 16  # of a factor of tl.dot


def padded(width: int) -> int:
    """Return the number of columns of a tile: a power of two, as Triton requires."""
    return 1 if width == 1 else max(_MIN_COLUMNS, 1 << (width - 1).bit_length())


def buffer_key(buffer: Buffer) -> _Key:
    """Return what identifies the pieces of a buffer: a state before and after a step has the same ones."""
    memory = Memory.STATE if buffer.memory is Memory.NEW_STATE else buffer.memory
    return memory, buffer.index


class Pieces:
    """The pieces of the buffers, phases and scalars of a kernel that are held in registers.

    Args:
        kernel: The kernel.
        limit: Number of pieces of all phases and scalars. Beyond it, cutting ends.

    Attributes:
        fit: Whether there are no more.
    """

    def __init__(self, kernel: KernelIR, limit: int) -> None:
        self._kernel = kernel
        self._borders: dict[_Key, set[int]] = {}
        self._cuts: dict[int, set[int]] = {}  # of phases and scalars, by id
        bodies: list[Phase | Scalar] = [*kernel.phases()]
        bodies += [scalar for level in kernel.levels for scalar in level.scalars]
        links = [link for body in bodies for link in _links(body)]
        for body in bodies:
            self._cuts[id(body)] = {0, body.width}
        for buffer, _, _ in links:
            self._borders[buffer_key(buffer)] = {0, buffer.width}
        count, changed = 0, True
        while changed and count <= limit:
            changed = self._propagate(links)
            count = sum(len(cuts) - 1 for cuts in self._cuts.values())
        self.fit = count <= limit

    def _propagate(self, links: list[tuple[Buffer, int, Phase | Scalar]]) -> bool:
        """Give the buffer and the phase of each link the same cuts. Return whether there were new ones."""
        changed = False
        for buffer, offset, body in links:
            borders, cuts = self._borders[buffer_key(buffer)], self._cuts[id(body)]
            new_cuts = {b - offset for b in borders if 0 < b - offset < body.width} - cuts
            new_borders = {cut + offset for cut in cuts} - borders
            cuts |= new_cuts
            borders |= new_borders
            changed |= bool(new_cuts or new_borders)
        return changed

    @property
    def columns(self) -> int:
        """The number of columns of the widest tile."""
        rows = [group.buffer for phase in self._kernel.phases() for group in phase.groups]
        depths = [width for buffer in rows if buffer is not None for _, width in self.of_buffer(buffer)]
        widths = [width for cuts in self._cuts.values() for _, width in _pieces(cuts)]
        return max([1, *map(padded, (*depths, *widths))])

    @property
    def matrix_bytes(self) -> int:
        """The size of all blocks of matrices that products read in a step."""
        blocks = {}
        for phase in self._kernel.phases():
            for group in phase.groups:
                assert group.buffer is not None
                for product in group.products:
                    for first, depth in self.of_buffer(group.buffer):
                        for start, width in self.of_body(phase):
                            key = (product.matrix, first, depth, product.offset + start, width)
                            blocks[key] = padded(depth) * padded(width)
        return sum(blocks.values()) * self._kernel.storage.itemsize

    def of_body(self, body: Phase | Scalar) -> list[Piece]:
        """Return the pieces of a phase, or of the columns that a scalar reads."""
        return _pieces(self._cuts[id(body)])

    def of_buffer(self, buffer: Buffer) -> list[Piece]:
        """Return the pieces of a buffer. An input that is read from memory has one."""
        return _pieces(self._borders.get(buffer_key(buffer), {0, buffer.width}))


def _links(body: Phase | Scalar) -> Iterable[tuple[Buffer, int, Phase | Scalar]]:
    """Yield the buffers in registers that a phase or scalar reads or stores, and their first column there."""
    instructions: Sequence[Instruction] = body.instructions
    for one in instructions:
        if isinstance(one, Load) and not one.broadcast and one.buffer.memory is not Memory.INPUT:
            yield one.buffer, one.offset, body
    if isinstance(body, Phase):
        for store in body.stores:
            yield store.buffer, store.offset, body


def _pieces(borders: Iterable[int]) -> list[Piece]:
    return [(start, end - start) for start, end in itertools.pairwise(sorted(borders))]

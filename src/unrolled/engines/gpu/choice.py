"""The choice of a kernel strategy for a loop. The thresholds are in ``tuning.py``."""

from __future__ import annotations

from dataclasses import dataclass

from unrolled.engines.compiler.kernel_ir import KernelIR, Load, Memory
from unrolled.engines.gpu.pieces import Pieces
from unrolled.engines.gpu.tuning import MAX_BYTES, MAX_COLUMNS, MAX_PIECES

SCAN, REGISTERS, PERSISTENT, STREAMED = "scan", "registers", "persistent", "streamed"

STRATEGIES = {
    SCAN: "each column of a step depends only on itself, so each program computes a block of columns",
    REGISTERS: "all values of a step are in registers, and all matrices on chip",
    PERSISTENT: "programs share the columns of a row, read matrices in each step, and synchronize by level",
    STREAMED: "one program computes all columns of a row, and reads matrices in each step, block by block",
}
"""What each strategy does, in the order of preference."""


@dataclass(frozen=True)
class Choice:
    """A strategy that can run a loop.

    Attributes:
        strategy: One of :data:`STRATEGIES`.
        reason: Why it is chosen.
    """

    strategy: str
    reason: str


def choose(kernel: KernelIR) -> list[Choice]:
    """Return the strategies that can run a loop, the fastest first.

    The next strategy is used if the device has too little memory. It is also used if the tiles of rows of a
    batch occupy all multiprocessors, because several programs then can't share the columns of a row.
    """
    if is_columnwise(kernel):
        reason = "each column of a step depends only on itself"
        return [Choice(strategy, reason) for strategy in (SCAN, STREAMED, PERSISTENT)]
    pieces = Pieces(kernel, MAX_PIECES)
    obstacle = _too_large_for_registers(pieces)
    choices = []
    if not obstacle:
        size = pieces.matrix_bytes
        fits = f"its matrices of {_kib(size)} fit on chip" if size else "it has no matrices"
        choices.append(Choice(REGISTERS, f"{fits}, and its values fit in registers"))
        obstacle = "the device has too little on-chip memory for the registers strategy"
    if not any(phase.groups for phase in kernel.phases()):
        return [*choices, Choice(STREAMED, obstacle), Choice(PERSISTENT, obstacle)]
    busy = "the batch occupies all multiprocessors"
    return [*choices, Choice(PERSISTENT, obstacle), Choice(STREAMED, f"{obstacle}, and {busy}")]


def is_columnwise(kernel: KernelIR) -> bool:
    """Return whether each column of a step depends only on the same column of other values.

    All values of such a step have the same number of columns. States and saved values may consist of several
    blocks of that many columns.
    """
    phases = list(kernel.phases())
    widths = {phase.width for phase in phases}
    if len(widths) != 1 or any(phase.groups for phase in phases) or kernel.scalar_count:
        return False
    [width] = widths
    loads = [one for phase in phases for one in phase.instructions if isinstance(one, Load)]
    kept = [one for one in loads if one.buffer.memory is not Memory.INPUT]
    stores = [store for phase in phases for store in phase.stores]
    places = [(one.offset, one.buffer.width) for one in kept]
    places += [(store.offset, store.buffer.width) for store in stores]
    aligned = all(offset % width == 0 and size % width == 0 for offset, size in places)
    return aligned and width > 1 and not any(one.broadcast for one in kept)


def _too_large_for_registers(pieces: Pieces) -> str:
    """Return why the values don't fit in registers, or the matrices on chip. Empty if they do."""
    if not pieces.fit:
        return f"slices cut a step into more than {MAX_PIECES} pieces"
    if pieces.columns > MAX_COLUMNS:
        return f"a value has {pieces.columns} columns with padding, but registers hold up to {MAX_COLUMNS}"
    if pieces.matrix_bytes > MAX_BYTES:
        return f"its matrices need {_kib(pieces.matrix_bytes)} on chip, but up to {_kib(MAX_BYTES)} fit"
    return ""


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB"

"""Verify a kernel IR: all that is read has been written, once, and inside its bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from unrolled.engines.compiler.ir import label
from unrolled.engines.compiler.kernel_dump import KernelDump
from unrolled.engines.compiler.kernel_ir import (
    Apply,
    Buffer,
    Group,
    Instruction,
    KernelIR,
    Level,
    Load,
    Memory,
    Operand,
    Phase,
    ReadScalar,
    Register,
    Scalar,
    Sum,
)

_INTEGER_SUMS = {torch.int8: {torch.int32}}  # products of other dtypes are summed in float32 or float64
_WRITABLE = (Memory.NEW_STATE, Memory.SAVED, Memory.SCRATCH)


class KernelError(AssertionError):
    """A kernel IR is inconsistent, which is a fault of the compiler."""


def verify(kernel: KernelIR) -> None:
    """Verify a kernel IR.

    Raises:
        KernelError: If it is inconsistent. The message names the level, and the kernel is printed below.
    """
    verifier = _Verifier(kernel)
    try:
        verifier.verify()
    except KernelError as error:
        raise KernelError(f"{error}\n{KernelDump(kernel)}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


class _Verifier:
    def __init__(self, kernel: KernelIR) -> None:
        self.kernel = kernel
        self.widths: dict[tuple[Memory, int], int] = {}
        for one in kernel.inputs:
            self.widths[Memory.INPUT, one.buffer.index] = one.buffer.width
        for k, state in enumerate(kernel.states):
            self.widths[Memory.STATE, k] = self.widths[Memory.NEW_STATE, k] = state.width
        for k, node in enumerate(kernel.saved):
            self.widths[Memory.SAVED, k] = node.meta["val"].shape[1]
        for k, scratch in enumerate(kernel.scratch):
            self.widths[Memory.SCRATCH, k] = scratch.width
        self.columns: dict[tuple[Memory, int], set[int]] = defaultdict(set)  # written at earlier levels
        self.of_deferred: set[tuple[Memory, int]] = set()  # buffers that deferred levels write
        self.scalars: dict[int, bool] = {}  # by number: whether a deferred level computes it

    def verify(self) -> None:
        deferred = False
        for number, level in enumerate(self.kernel.levels):
            _require(level.deferred or not deferred, f"level {number} follows a deferred level")
            deferred = level.deferred
            try:
                self._verify_level(level)
            except KernelError as error:
                raise KernelError(f"level {number}: {error}") from None
        for key, width in self.widths.items():
            if key[0] in _WRITABLE:
                missing = width - len(self.columns[key])
                _require(not missing, f"{missing} columns of {key[0].value}{key[1]} are never stored")

    def _verify_level(self, level: Level) -> None:
        written: list[tuple[Buffer, range]] = []
        for scalar in level.scalars:
            written += self._scalar(scalar, level.deferred)
        for phase in level.phases:
            written += self._phase(phase, level.deferred)
        for buffer, columns in written:
            key = buffer.memory, buffer.index
            _require(self.columns[key].isdisjoint(columns), f"columns of {buffer} are stored twice")
            self.columns[key].update(columns)
            if level.deferred:
                self.of_deferred.add(key)

    def _scalar(self, scalar: Scalar, deferred: bool) -> Iterator[tuple[Buffer, range]]:
        _require(scalar.number not in self.scalars, f"scalar {scalar.number} is computed twice")
        _require(scalar.width == 1 or scalar.reduction is not None, f"scalar {scalar.number} has columns")
        self._instructions(scalar.instructions, scalar.width, None, deferred)
        self._operand(scalar.result, len(scalar.instructions))
        self.scalars[scalar.number] = deferred
        for buffer in scalar.buffers:
            yield self._written(buffer, 0, 1)

    def _phase(self, phase: Phase, deferred: bool) -> Iterator[tuple[Buffer, range]]:
        for group in (*phase.groups, *phase.hoisted):
            self._group(group, phase.width)
        for group in phase.groups:
            _require(group.buffer is not None, f"{group} has no row in memory")
            if group.buffer is not None:
                _require(group.buffer.width == group.depth, f"{group} doesn't read the whole row")
                self._readable(group.buffer, range(group.depth), deferred)
        for group in phase.hoisted:
            _require(group.buffer is None, f"{group} is hoisted, but reads a buffer of the step")
        self._instructions(phase.instructions, phase.width, phase, deferred)
        for store in phase.stores:
            self._operand(store.value, len(phase.instructions))
            yield self._written(store.buffer, store.offset, phase.width)

    def _group(self, group: Group, width: int) -> None:
        _require(bool(group.products), "a group has no products")
        rows = {product.row for product in group.products}
        _require(len(rows) == 1, f"{group} reads more than one row")
        sums = _INTEGER_SUMS.get(group.dtype, {torch.float32, torch.float64})
        _require(group.sum_dtype in sums, f"{group} can't be summed in {group.sum_dtype}")
        for product in group.products:
            depth, columns = product.matrix.meta["val"].shape
            _require(depth == group.depth, f"{group}: {label(product.matrix)} has {depth} rows")
            _require(
                0 <= product.offset <= columns - width,
                f"{group}: {label(product.matrix)} has {columns} columns",
            )

    def _instructions(
        self, instructions: list[Instruction], width: int, phase: Phase | None, deferred: bool
    ) -> None:
        for position, instruction in enumerate(instructions):
            match instruction:
                case Load(buffer, offset, broadcast):
                    if broadcast:
                        _require(buffer.width == 1 and offset == 0, f"{instruction} has more than one column")
                    self._readable(buffer, range(offset, offset + (1 if broadcast else width)), deferred)
                case Sum(number, index, hoisted):
                    groups = [] if phase is None else phase.hoisted if hoisted else phase.groups
                    exists = number < len(groups) and index < len(groups[number].products)
                    _require(exists, f"there is no {instruction}")
                case ReadScalar(number):
                    _require(number in self.scalars, f"{instruction} is read before it is computed")
                    _require(self.scalars[number] is deferred, f"{instruction} has rows of one step only")
                case Apply(_, operands):
                    for operand in operands:
                        self._operand(operand, position)

    def _operand(self, operand: Operand, position: int) -> None:
        if isinstance(operand, Register):
            _require(0 <= operand.index < position, f"{operand} is read before it is computed")

    def _readable(self, buffer: Buffer, columns: range, deferred: bool) -> None:
        """Check that columns of a buffer exist, and that they have been stored before this level."""
        key = buffer.memory, buffer.index
        self._in_bounds(buffer, columns)
        if buffer.memory is Memory.STATE:
            state = self.kernel.states[buffer.index]
            _require(not deferred and not state.deferred, f"{buffer} is unknown when it is read")
        if buffer.memory in _WRITABLE:
            _require(self.columns[key].issuperset(columns), f"{buffer} is read before it is stored")
            scratch = buffer.memory is Memory.SCRATCH
            if deferred and scratch:
                _require(self.kernel.scratch[buffer.index].whole_block, f"{buffer} has rows of one step only")
            if deferred and buffer.memory is Memory.NEW_STATE and key not in self.of_deferred:
                of_block = self.kernel.states[buffer.index].read_by_deferred
                _require(of_block, f"{buffer} has rows of one step only")

    def _in_bounds(self, buffer: Buffer, columns: range) -> None:
        width = self.widths.get((buffer.memory, buffer.index))
        _require(width is not None, f"there is no {buffer}")
        _require(buffer.width == width, f"{buffer} has {width} columns, not {buffer.width}")
        _require(columns.start >= 0 and columns.stop <= buffer.width, f"{buffer} has no columns {columns}")

    def _written(self, buffer: Buffer, offset: int, width: int) -> tuple[Buffer, range]:
        columns = range(offset, offset + width)
        _require(buffer.memory in _WRITABLE, f"{buffer} can't be written")
        self._in_bounds(buffer, columns)
        return buffer, columns

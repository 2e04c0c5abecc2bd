"""The kernel IR: what a loop computes in each step, for code generators to print.

A kernel runs over time steps. All values have shape ``(rows, width)``. A step goes through the *levels* of
:class:`~unrolled.engines.compiler.schedule.Schedule`. What a level stores, any later level may read whole. At
a level, the scalars of each row are computed first. Then each *phase* computes all columns of the values of
one width: it accumulates the sums of its products, applies operations to them, and stores the results. A
register holds as many columns of a value as the phase has, from a first column on.

The IR has no device-specific part. How rows and columns are split among threads is up to a code generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import fx

from unrolled.engines.compiler.ir import label
from unrolled.engines.fork_safety import lazy_property


class Memory(Enum):
    """Where the values of a buffer come from, or go to."""

    INPUT = "in"  # values of every step, or of parameters
    STATE = "old"  # a state before the step
    NEW_STATE = "new"  # a state after the step
    SAVED = "saved"  # values of every step, for the caller
    SCRATCH = "scratch"  # between the levels of a step


@dataclass(frozen=True)
class Buffer:
    """Values in memory.

    Attributes:
        memory: Its kind.
        index: Its number among the buffers of this kind.
        width: Number of columns.
        per_row: Whether each row has values of its own. If not, all rows read the same.
    """

    memory: Memory
    index: int
    width: int
    per_row: bool = True

    def __str__(self) -> str:
        return f"{self.memory.value}{self.index}"


@dataclass(frozen=True)
class Register:
    """The result of an instruction of the same phase or scalar."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Load:
    """Columns of a buffer, from column ``offset`` on.

    Attributes:
        broadcast: Whether the buffer's only column is read for all columns of the phase.
    """

    buffer: Buffer
    offset: int
    broadcast: bool = False

    def __str__(self) -> str:
        column = "0 for all" if self.broadcast else f"{self.offset}:"
        return f"load {self.buffer}[{column}]"


@dataclass(frozen=True)
class Sum:
    """The sum of a product of the phase: of a group, or of a hoisted group.

    Attributes:
        group: Number of the group.
        index: Number of the product in its group.
        hoisted: Whether it is a hoisted group.
    """

    group: int
    index: int
    hoisted: bool = False

    def __str__(self) -> str:
        return f"{'hoisted sum' if self.hoisted else 'sum'} {self.group}.{self.index}"


@dataclass(frozen=True)
class ReadScalar:
    """A scalar, the same for all columns of a row."""

    number: int

    def __str__(self) -> str:
        return f"scalar {self.number}"


@dataclass(frozen=True)
class Apply:
    """An operation on single columns.

    Attributes:
        target: The operator of ``torch.ops.aten``, or one of the compiler's own functions.
        operands: Its operands, registers or numbers. Booleans are 1 or 0.
        alpha: The factor of the second operand of an addition or subtraction.
    """

    target: object
    operands: tuple[Register | float, ...]
    alpha: float = 1

    def __str__(self) -> str:
        name = str(getattr(self.target, "__name__", self.target)).split(".")[0]
        alpha = "" if self.alpha == 1 else f", alpha={self.alpha}"
        return f"{name}({', '.join(map(str, self.operands))}{alpha})"


Instruction = Load | Sum | ReadScalar | Apply
Operand = Register | float


@dataclass(frozen=True)
class Product:
    """The matrix product ``row @ matrix[:, offset:]``, as a phase accumulates it."""

    row: fx.Node
    matrix: fx.Node
    offset: int


@dataclass(frozen=True)
class Group:
    """Products of the same row, which a phase accumulates together.

    Attributes:
        products: The products.
        buffer: The buffer with the row. None if they are hoisted: then the row is known before the loop, and
            a code generator may compute the sums for many steps at once.
        depth: Number of terms of each sum.
        dtype: Dtype in which the matrices are stored. In int8, each column has a scale, and the row is
            quantized to int8 when it is read; see :func:`unrolled.cells.quantized_products.quantized_mm`.
        sum_dtype: Dtype in which the sums are accumulated. Registers with sums have the dtype of the kernel.
        row_scale: For int8: the fixed scale of the rows. If 0, each row has its own.
    """

    products: tuple[Product, ...]
    buffer: Buffer | None
    depth: int
    dtype: torch.dtype
    sum_dtype: torch.dtype
    row_scale: float = 0.0

    def __str__(self) -> str:
        row = label(self.products[0].row) if self.buffer is None else str(self.buffer)
        matrices = ", ".join(f"{label(p.matrix)}[:, {p.offset}:]" for p in self.products)
        dtypes = "" if self.dtype is self.sum_dtype else f", {self.dtype} in {self.sum_dtype}"
        return f"{row} @ {matrices}{dtypes}"


@dataclass(frozen=True)
class Store:
    """Write a register, or a number, into a buffer from column ``offset`` on."""

    value: Operand
    buffer: Buffer
    offset: int

    def __str__(self) -> str:
        return f"store {self.buffer}[{self.offset}:] = {self.value}"


@dataclass
class Phase:
    """A pass over the columns of all values of one width, at one level.

    Attributes:
        width: Number of columns.
        groups: Groups of products that are accumulated in every step.
        hoisted: Hoisted groups.
        instructions: What is computed of each column; the register of an instruction is its position.
        stores: What is stored, after the instructions.
    """

    width: int
    groups: list[Group] = field(default_factory=list)
    hoisted: list[Group] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)


@dataclass
class Scalar:
    """A number for each row.

    Attributes:
        number: Its number.
        width: Number of columns that it reads.
        instructions: What is computed of each column.
        result: The register with the scalar, or with the columns that are reduced to it.
        reduction: The operator that reduces the columns. None if there is one column.
        buffers: Buffers in which it is stored.
    """

    number: int
    width: int
    instructions: list[Instruction]
    result: Operand
    reduction: object | None
    buffers: list[Buffer]


@dataclass
class Level:
    """A part of a step. It may read whatever the levels before it have stored.

    Attributes:
        scalars: Scalars, in the order in which they are computed.
        phases: Phases, in any order.
        deferred: Whether it may run after the steps of a block, for all their rows at once.
    """

    scalars: list[Scalar]
    phases: list[Phase]
    deferred: bool


@dataclass(frozen=True)
class Input:
    """A value that steps read.

    Attributes:
        node: The value.
        buffer: Its buffer.
        shifted: Whether it is the state of another loop before the step: the value that the loop had stored a
            step earlier, or its initial state.
    """

    node: fx.Node
    buffer: Buffer
    shifted: bool


@dataclass(frozen=True)
class CarriedState:
    """A state that a step hands to the next one.

    Attributes:
        width: Number of columns.
        deferred: Whether deferred levels compute it, so that no step reads it.
        read_by_deferred: Whether deferred levels read it.
    """

    width: int
    deferred: bool
    read_by_deferred: bool


@dataclass(frozen=True)
class ScratchBuffer:
    """A buffer between levels.

    Attributes:
        width: Number of columns.
        whole_block: Whether deferred levels read or write it, so that it has all rows of a block of steps.
    """

    width: int
    whole_block: bool


@dataclass
class KernelIR:
    """A loop over time.

    Attributes:
        dtype: Dtype of all buffers, registers and scalars.
        storage: Dtype of inputs, initial and returned states, and saved values in memory. If it differs from
            ``dtype``, it is a half-precision dtype, and the operands of matrix products are rounded to it.
        inputs: Inputs of a step.
        states: States.
        saved: Values that are stored for the caller in every step.
        scratch: Buffers between levels.
        levels: Levels of a step, in order.
    """

    dtype: torch.dtype
    storage: torch.dtype
    inputs: list[Input]
    states: list[CarriedState]
    saved: list[fx.Node]
    scratch: list[ScratchBuffer]
    levels: list[Level]

    def phases(self, deferred: bool | None = None) -> Iterator[Phase]:
        """Return the phases of all levels, or only of those that are deferred or not."""
        for level in self.levels:
            if deferred is None or level.deferred is deferred:
                yield from level.phases

    @property
    def scalar_count(self) -> int:
        """The number of scalars."""
        return sum(len(level.scalars) for level in self.levels)

    @property
    def has_deferred(self) -> bool:
        """Whether some levels are deferred."""
        return any(level.deferred for level in self.levels)

    @lazy_property
    def columnwise(self) -> bool:
        """Whether a step is one phase without products, in which each column reads only itself of the states.

        Then whoever computes a column in one step can go on to the next step.
        """
        phases = list(self.phases(deferred=False))
        if len(phases) > 1 or any(phase.groups for phase in phases):
            return False
        if any(level.scalars for level in self.levels if not level.deferred):
            return False
        return not any(
            isinstance(one, Load)
            and one.buffer.memory is Memory.STATE
            and (one.offset or one.buffer.width != phase.width)
            for phase in phases
            for one in phase.instructions
        )

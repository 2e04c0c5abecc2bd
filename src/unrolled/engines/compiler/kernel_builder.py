"""Build the kernel IR of a loop from its schedule."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from unrolled.cells.quantized_products import FORMATS
from unrolled.engines import log
from unrolled.engines.compiler.ir import is_batched, is_number, is_product, is_quantized, is_reduction, width
from unrolled.engines.compiler.kernel_dump import KernelDump
from unrolled.engines.compiler.kernel_ir import (
    Apply,
    Buffer,
    CarriedState,
    Group,
    Input,
    Instruction,
    KernelIR,
    Level,
    Load,
    Memory,
    Operand,
    Phase,
    Product,
    ReadScalar,
    Register,
    Scalar,
    ScratchBuffer,
    Store,
    Sum,
)
from unrolled.engines.compiler.kernel_verifier import verify
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.schedule import Pass, Schedule

aten = torch.ops.aten

_SAME_COLUMNS = {aten.expand.default, aten.clone.default, aten._to_copy.default}


def build_kernel(
    partition: LoopPartition,
    dtype: torch.dtype,
    shifted: Collection[fx.Node] = (),
    whole: Collection[fx.Node] = (),
    max_group: int = 8,
    storage: torch.dtype | None = None,
) -> KernelIR:
    """Build the kernel IR of a loop.

    Args:
        partition: The partition that contains the loop.
        dtype: Dtype of all values.
        shifted: States of another loop. This loop reads their value before each step.
        whole: Products to compute for all steps before the loop, because others read them, too.
        max_group: Maximum number of products in a group.
        storage: Dtype of the tensors of a call. That of all values by default.

    Raises:
        KernelError: If the environment variable ``UNROLLED_VERIFY`` is set and the kernel is inconsistent.
    """
    # Only products of this prologue: in the backward, those of the forward are saved values.
    products = (n for n in partition.prologue if is_product(n))
    hoisted = {n for n in products if n in partition.inputs and n not in whole}
    # A phase has as many columns of each sum as of its other values, so it can't broadcast a sum.
    loop = set(partition.loop)
    hoisted -= {n for n in hoisted if width(n) == 1 and any(width(m) > 1 for m in loop & n.users.keys())}
    # Only the forward loop has deferred values, and only the backward loop has shifted states.
    schedule = Schedule(partition, hoisted, allow_deferred=not shifted)
    kernel = _Builder(schedule, dtype, shifted, hoisted, max_group).build(storage or dtype)
    log.kernel.info("%s", KernelDump(kernel))
    if os.environ.get("UNROLLED_VERIFY"):
        verify(kernel)
    return kernel


class _Builder:
    def __init__(
        self,
        schedule: Schedule,
        dtype: torch.dtype,
        shifted: Collection[fx.Node],
        hoisted: set[fx.Node],
        max_group: int,
    ) -> None:
        self.schedule = schedule
        self.partition = partition = schedule.partition
        self.dtype, self.shifted, self.hoisted, self.max_group = dtype, shifted, hoisted, max_group
        self.inputs: dict[fx.Node, Input] = {}
        self.written: dict[fx.Node, list[Buffer]] = {}  # where a stored value is written; the first is read
        self.scratch: list[ScratchBuffer] = []
        of_block = {*schedule.read_by_deferred, *schedule.deferred}
        for node in schedule.stored:
            size = width(node)
            buffers = [
                Buffer(Memory.NEW_STATE, k, size) for k, new in enumerate(partition.new_states) if new is node
            ]
            if node in partition.saved:
                buffers.append(Buffer(Memory.SAVED, partition.saved.index(node), size))
            if not buffers:
                buffers.append(Buffer(Memory.SCRATCH, len(self.scratch), size, is_batched(node)))
                self.scratch.append(ScratchBuffer(size, node in of_block))
            self.written[node] = buffers

    def build(self, storage: torch.dtype) -> KernelIR:
        schedule, partition = self.schedule, self.partition
        levels = []
        for number, passes in enumerate(schedule.passes()):
            deferred = bool(schedule.deferred) and number >= schedule.first_deferred_level
            scalars = [
                self._scalar(node, index)
                for node, index in schedule.scalars.items()
                if schedule.levels[node] == number
            ]
            levels.append(Level(scalars, [self._phase(number, one) for one in passes], deferred))
        states = zip(partition.old_states, partition.new_states, strict=True)
        return KernelIR(
            dtype=self.dtype,
            storage=storage,
            inputs=list(self.inputs.values()),
            states=[
                CarriedState(width(old), new in schedule.deferred, new in schedule.read_by_deferred)
                for old, new in states
            ],
            saved=partition.saved,
            scratch=self.scratch,
            levels=levels,
        )

    def read_buffer(self, node: fx.Node) -> Buffer:
        """Return the buffer in which a step finds a value."""
        partition = self.partition
        if node in partition.old_states:
            return Buffer(Memory.STATE, partition.old_states.index(node), width(node))
        if node in self.schedule.inside:
            return self.written[node][0]
        if node not in self.inputs:
            buffer = Buffer(Memory.INPUT, len(self.inputs), width(node), is_batched(node))
            self.inputs[node] = Input(node, buffer, node in self.shifted)
        return self.inputs[node].buffer

    def _scalar(self, node: fx.Node, number: int) -> Scalar:
        body = _Body(self, self.schedule.levels[node])
        reduction, columns = None, 1
        if is_reduction(node):
            operand = cast(fx.Node, node.args[0])
            reduction, columns = node.target, width(operand)
            result = body.read(operand, 0, columns)
        else:
            result = body.compute(node, 0, 1)
        return Scalar(number, columns, body.instructions, result, reduction, self.written.get(node, []))

    def _phase(self, level: int, one: Pass) -> Phase:
        phase = Phase(one.width)
        body = _Body(self, level, phase)
        for value, stored, column in one.stores:
            result = body.read(value, 0, one.width)
            phase.stores += [Store(result, buffer, column) for buffer in self.written[stored]]
        return phase


class _Body:
    """The instructions of a phase or of a scalar, while they are collected.

    Args:
        builder: The builder of the kernel.
        level: The level.
        phase: The phase whose products may be read. None for a scalar.
    """

    def __init__(self, builder: _Builder, level: int, phase: Phase | None = None) -> None:
        self.builder = builder
        self.level = level
        self.phase = phase
        self.instructions: list[Instruction] = [] if phase is None else phase.instructions
        self._values: dict[tuple[fx.Node, int], Operand] = {}  # by value and first column

    def read(self, value: object, offset: int, columns: int) -> Operand:
        """Return the register with columns of a value from ``offset`` on, or a number."""
        if not isinstance(value, fx.Node):
            return float(cast(float, value))
        if is_number(value):
            return float(cast(float, value.args[1]))
        if (value, offset) not in self._values:
            self._values[value, offset] = self._find(value, offset, columns)
        return self._values[value, offset]

    def _find(self, node: fx.Node, offset: int, columns: int) -> Operand:
        """Load columns of a value, or compute them."""
        builder, schedule = self.builder, self.builder.schedule
        if node in schedule.scalars:
            return self._add(ReadScalar(schedule.scalars[node]))
        if node in schedule.stored and schedule.levels[node] < self.level:
            return self._load(node, offset, columns)
        if node in builder.hoisted:
            return self._sum(node, offset, hoisted=True)
        if node not in schedule.inside:
            return self._load(node, offset, columns)
        return self.compute(node, offset, columns)

    def compute(self, node: fx.Node, offset: int, columns: int) -> Operand:
        """Compute columns of a value of the loop."""
        target, args = node.target, node.args

        def operand(value: object) -> Operand:
            is_broadcast = isinstance(value, fx.Node) and width(value) == 1
            return self.read(value, 0 if is_broadcast else offset, columns)

        if is_product(node):
            return self._sum(node, offset, hoisted=False)
        if target is aten.slice.Tensor:
            start = args[2] if len(args) > 2 and args[2] else 0
            return self.read(args[0], offset + cast(int, start), columns)
        if target is aten.cat.default:
            for value in cast("list[fx.Node]", args[0]):
                if offset < width(value):
                    return self.read(value, offset, columns)
                offset -= width(value)
        if target in _SAME_COLUMNS:
            return operand(args[0])
        operands = tuple(operand(value) for value in args[:3])
        return self._add(Apply(target, operands, cast(float, node.kwargs.get("alpha", 1))))

    def _load(self, node: fx.Node, offset: int, columns: int) -> Register:
        buffer = self.builder.read_buffer(node)
        return self._add(Load(buffer, offset, broadcast=buffer.width == 1 and columns > 1))

    def _sum(self, node: fx.Node, offset: int, hoisted: bool) -> Register:
        """Add a product to a group of the phase, and return the register with its sum."""
        assert self.phase is not None, f"{node} should have been stored"
        row, matrix = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        product = Product(row, matrix, offset)
        dtype, sum_dtype, scale = self._product_format(node)
        groups = self.phase.hoisted if hoisted else self.phase.groups
        for number, group in enumerate(groups):
            if product in group.products and (group.dtype, group.row_scale) == (dtype, scale):
                return self._add(Sum(number, group.products.index(product), hoisted))
        for number, group in enumerate(groups):
            is_same = group.products[0].row is row and (group.dtype, group.row_scale) == (dtype, scale)
            if is_same and len(group.products) < self.builder.max_group:
                index = len(group.products)
                groups[number] = replace(group, products=(*group.products, product))
                return self._add(Sum(number, index, hoisted))
        buffer = None if hoisted else self.builder.read_buffer(row)
        groups.append(Group((product,), buffer, width(row), dtype, sum_dtype, scale))
        return self._add(Sum(len(groups) - 1, 0, hoisted))

    def _product_format(self, node: fx.Node) -> tuple[torch.dtype, torch.dtype, float]:
        """Return the dtypes of a product's matrix and of its sums, and the fixed scale of its row."""
        dtype = self.builder.dtype
        if not is_quantized(node):
            return dtype, dtype, 0.0
        stored = FORMATS[cast(str, node.args[2])]
        return stored, torch.int32 if stored is torch.int8 else dtype, cast(float, node.args[3])

    def _add(self, instruction: Instruction) -> Register:
        self.instructions.append(instruction)
        return Register(len(self.instructions) - 1)

"""A backend that runs kernel IR with torch's own operations, to check the IR, and code generated from it.

It shares nothing with code generators: it runs one step after another, each level and each instruction on all
columns at once. What is deferred runs after the last step, on the rows of all steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines import backends
from unrolled.engines.compiler.batch_layout import Layout, materialize
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import is_batched, width
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
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.views import resolve_views

aten = torch.ops.aten

_REDUCE = {
    aten.sum.dim_IntList: lambda v: v.sum(1, keepdim=True),
    aten.prod.dim_int: lambda v: v.prod(1, keepdim=True),
    aten.amax.default: lambda v: v.amax(1, keepdim=True),
    aten.amin.default: lambda v: v.amin(1, keepdim=True),
}
_OF_BOOLS = {
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.bitwise_not.default,
}


@dataclass
class Rows:
    """The values of some rows, at one step, or at all steps in the deferred levels.

    Attributes:
        count: Number of rows.
        buffers: Values in memory.
        scalars: Scalars, each ``(rows, 1)``.
        hoisted: What hoisted products read, for these rows.
    """

    count: int
    buffers: dict[tuple[Memory, int], Tensor]
    hoisted: dict[fx.Node, Tensor]
    scalars: dict[int, Tensor] = field(default_factory=dict)


class Interpreter:
    """A loop, see :class:`unrolled.engines.compiler.loops.Loop`."""

    def __init__(self, partition: LoopPartition, kernel: KernelIR) -> None:
        self.partition, self.kernel = partition, kernel
        groups = [group for phase in kernel.phases() for group in (*phase.groups, *phase.hoisted)]
        self._matrices = [product.matrix for group in groups for product in group.products]
        self._hoisted = [group.products[0].row for phase in kernel.phases() for group in phase.hoisted]
        inputs = [one.node for one in kernel.inputs]
        self.needs = list(dict.fromkeys([*inputs, *self._matrices, *self._hoisted]))
        self._views = resolve_views(node for node in self.needs if not is_batched(node))

    def call(
        self,
        values: dict[fx.Node, Any],
        initial: Sequence[Tensor | None],
        all_steps: Sequence[Tensor | None],
        final: Sequence[Tensor | None],
        like: Tensor,
        layout: Layout,
        reverse: bool,
        threads: int,
    ) -> InterpretedCall:
        for node in self.partition.saved:
            values[node] = like.new_empty(layout.rows, width(node))
        return InterpretedCall(self, values, initial, all_steps, final, layout, reverse)

    def value(self, node: fx.Node, values: dict[fx.Node, Any], rows: int) -> Tensor:
        """Return the value of an input or a matrix."""
        dtype = self.kernel.dtype
        if is_batched(node):
            return materialize(values[node]).reshape(rows, width(node)).to(dtype)
        view = self._views[node]
        return view.apply_to(materialize(values[view.base]), rows).to(dtype)


@dataclass
class InterpretedCall:
    """A call of a loop."""

    loop: Interpreter
    values: dict[fx.Node, Any]
    initial: Sequence[Tensor | None]
    all_steps: Sequence[Tensor | None]
    final: Sequence[Tensor | None]
    layout: Layout
    reverse: bool

    def run(self) -> None:
        loop, kernel, layout = self.loop, self.loop.kernel, self.layout
        self.tensors = {node: loop.value(node, self.values, layout.rows) for node in loop.needs}
        starts = layout.starts
        bounds = (
            [(t * layout.batch, (t + 1) * layout.batch) for t in range(layout.steps)]
            if starts is None
            else list(zip(starts.tolist(), starts.tolist()[1:], strict=False))
        )
        states = [
            torch.zeros(layout.batch, one.width, dtype=kernel.dtype) if state is None else state.clone()
            for one, state in zip(kernel.states, self.initial, strict=True)
        ]
        steps: dict[int, Rows] = {}
        for time in range(layout.steps)[:: -1 if self.reverse else 1]:
            begin, end = bounds[time]
            rows = steps[time] = self._rows(begin, end)
            for k, state in enumerate(states):
                rows.buffers[Memory.STATE, k] = state[: rows.count].clone()
            for level in kernel.levels:
                if not level.deferred:
                    self._level(level, rows)
            for k, state in enumerate(states):
                if not kernel.states[k].deferred:
                    state[: rows.count] = rows.buffers[Memory.NEW_STATE, k]
        in_order = [steps[time] for time in range(layout.steps)]
        all_rows = self._rows(0, layout.rows)
        for key in in_order[0].buffers:
            if key[0] not in (Memory.STATE, Memory.INPUT):
                all_rows.buffers[key] = torch.cat([rows.buffers[key] for rows in in_order])
        for level in kernel.levels:
            if level.deferred:
                self._level(level, all_rows)
        for k, one in enumerate(kernel.states):
            new = all_rows.buffers[Memory.NEW_STATE, k]
            if one.deferred:
                for time in range(layout.steps)[:: -1 if self.reverse else 1]:
                    begin, end = bounds[time]
                    states[k][: end - begin] = new[begin:end]
            every, last = self.all_steps[k], self.final[k]
            if every is not None:
                every.view(-1, one.width).copy_(new)
            if last is not None:
                last.copy_(states[k])
        for k, node in enumerate(kernel.saved):
            self.values[node].copy_(all_rows.buffers[Memory.SAVED, k])

    def _rows(self, begin: int, end: int) -> Rows:
        """Return the inputs of some rows."""
        buffers = {}
        for one in self.loop.kernel.inputs:
            value = self.tensors[one.node]
            value = value[begin:end] if one.buffer.per_row else value.reshape(1, one.buffer.width)
            buffers[Memory.INPUT, one.buffer.index] = value
        hoisted = {node: self.tensors[node][begin:end] for node in self.loop._hoisted}
        return Rows(end - begin, buffers, hoisted)

    def _level(self, level: Level, rows: Rows) -> None:
        for scalar in level.scalars:
            self._scalar(scalar, rows)
        stores: list[tuple[Buffer, int, Tensor]] = []
        for phase in level.phases:
            registers = self._run(phase.instructions, rows, phase.width, phase)
            for store in phase.stores:
                value = self._operand(store.value, registers).expand(rows.count, phase.width)
                stores.append((store.buffer, store.offset, value))
        for buffer, offset, value in stores:  # only now: phases of a level don't read each other's stores
            target = self._target(buffer, rows)
            target[:, offset : offset + value.shape[1]] = value

    def _scalar(self, scalar: Scalar, rows: Rows) -> None:
        registers = self._run(scalar.instructions, rows, scalar.width)
        value = self._operand(scalar.result, registers).expand(rows.count, scalar.width)
        if scalar.reduction is not None:
            value = _REDUCE[scalar.reduction](value)  # type: ignore[index]
        rows.scalars[scalar.number] = value
        for buffer in scalar.buffers:
            self._target(buffer, rows).copy_(value)

    def _target(self, buffer: Buffer, rows: Rows) -> Tensor:
        """Return a buffer to write to. What is not written is NaN."""
        key = buffer.memory, buffer.index
        if key not in rows.buffers:
            rows.buffers[key] = torch.full(
                (rows.count, buffer.width), torch.nan, dtype=self.loop.kernel.dtype
            )
        return rows.buffers[key]

    def _run(
        self, instructions: list[Instruction], rows: Rows, columns: int, phase: Phase | None = None
    ) -> list[Tensor]:
        registers: list[Tensor] = []
        for instruction in instructions:
            match instruction:
                case Load(buffer, offset, broadcast):
                    value = rows.buffers[buffer.memory, buffer.index]
                    registers.append(value[:, offset : offset + (1 if broadcast else columns)])
                case Sum(number, index, hoisted):
                    assert phase is not None
                    group = (phase.hoisted if hoisted else phase.groups)[number]
                    registers.append(self._sum(group, index, rows, phase.width))
                case ReadScalar(number):
                    registers.append(rows.scalars[number])
                case Apply(target, operands, alpha):
                    values = [self._operand(operand, registers) for operand in operands]
                    registers.append(self._apply(target, values, alpha))
        return registers

    def _sum(self, group: Group, index: int, rows: Rows, columns: int) -> Tensor:
        product = group.products[index]
        buffer = group.buffer
        row = rows.hoisted[product.row] if buffer is None else rows.buffers[buffer.memory, buffer.index]
        matrix = self.tensors[product.matrix][:, product.offset : product.offset + columns]
        return (row.to(group.sum_dtype) @ matrix.to(group.sum_dtype)).to(self.loop.kernel.dtype)

    def _operand(self, operand: Operand, registers: list[Tensor]) -> Tensor:
        if isinstance(operand, Register):
            return registers[operand.index]
        return torch.tensor([[operand]], dtype=self.loop.kernel.dtype)

    def _apply(self, target: Any, values: list[Tensor], alpha: float) -> Tensor:
        arguments: list[Any] = list(values)
        for k, argument in enumerate(target._schema.arguments[: len(values)]):
            if "Tensor" not in str(argument.type):
                arguments[k] = values[k].item()
        if target in _OF_BOOLS:
            arguments = [value.bool() for value in values]
        if target is aten.where.self:
            arguments[0] = values[0].bool()
        result: Tensor = target(*arguments) if alpha == 1 else target(*arguments, alpha=alpha)
        return result.to(self.loop.kernel.dtype)


@dataclass
class InterpretedLoop:
    """A loop, see :class:`unrolled.engines.compiler.loops.GeneratedLoop`."""

    partition: LoopPartition
    kernel: KernelIR

    def start(self) -> None:
        """Do nothing."""

    def load(self) -> Interpreter:
        return Interpreter(self.partition, self.kernel)


class InterpreterBackend:
    """See :class:`unrolled.engines.compiler.backend.Backend`.

    Attributes:
        kernels: The kernels that it has run since :func:`interpreted`.
    """

    name, captures = "interpreter", None
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64)

    def __init__(self) -> None:
        self.kernels: list[KernelIR] = []

    def tensor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def explain(self, compiled: CompiledCell, training: bool) -> str:
        return "its step is compiled"

    def supports(self, tensors: Sequence[Tensor], dtype: torch.dtype, in_graph: bool = False) -> str | None:
        return None if dtype in self.dtypes else f"{dtype} is not supported"

    def prepare(self, dtype: torch.dtype) -> None:
        """Nothing is compiled."""

    def compile(self, cell: Cell, dtype: torch.dtype, device: torch.device) -> CompiledCell:
        return CompiledCell(cell, dtype, self, device)

    def generate(self, partition: LoopPartition, kernel: KernelIR) -> InterpretedLoop:
        return InterpretedLoop(partition, kernel)

    def bulk_runner(self, dtype: torch.dtype) -> None:
        """Return None: torch computes products around loops."""

    def launch(self, calls: Sequence[InterpretedCall]) -> None:
        for call in calls:
            self.kernels.append(call.loop.kernel)
            call.run()


BACKEND = InterpreterBackend()  # only one, because compiled cells are kept with their backend


@contextlib.contextmanager
def interpreted() -> Iterator[InterpreterBackend]:
    """Run compiled loops with the interpreter."""
    BACKEND.kernels.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BY_DEVICE_TYPE, "cpu", BACKEND)
        yield BACKEND

"""The step of a cell as a kernel for one row, with its weights in the order in which C reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines.compiler.bulk_ops import BulkOps
from unrolled.engines.compiler.capture import CapturedStep, capture
from unrolled.engines.compiler.ir import UnsupportedError, ancestors, inputs_of, is_batched
from unrolled.engines.compiler.kernel_builder import build_kernel
from unrolled.engines.compiler.kernel_ir import Buffer, Group, KernelIR, Memory
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.errors import UnavailableError
from unrolled.engines.native.backend import BACKEND
from unrolled.engines.native.cpp_ops import check
from unrolled.export.words import pack_16_bits, pack_int8, row_size

_CPU = torch.device("cpu")
ALIGNMENT = 16  # numbers in a cache line


class Array:
    """Numbers one after another.

    Args:
        dtype: Their dtype.

    Attributes:
        size: How many there are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.size = 0
        self._dtype, self._parts = dtype, list[Tensor]()

    def add(self, part: Tensor, aligned: bool = True) -> int:
        """Append numbers, and return the index of the first.

        Args:
            part: The numbers.
            aligned: Whether they begin at a multiple of 64 bytes: loads that cross cache lines take twice
                the time.
        """
        if aligned and self.size % ALIGNMENT:
            self.add(torch.zeros(-self.size % ALIGNMENT), aligned=False)
        self._parts.append(part.detach().to(self._dtype).reshape(-1))
        self.size += part.numel()
        return self.size - part.numel()

    def tensor(self) -> Tensor:
        """Return all numbers."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, dtype=self._dtype)


@dataclass(frozen=True)
class PlacedGroup:
    """Where the matrices of a group of products lie.

    Attributes:
        weights: First index in the weights: of the matrices, ``(term, product, column)``, or if they are in
            int8, of their scales, ``(product, column)``.
        words: First index in the words of quantized matrices, ``(term / n, product, column)`` for n terms in
            a word.
    """

    weights: int = 0
    words: int = 0


QuantizedRow = tuple[Buffer, float]
"""A row that is quantized to int8, and its fixed scale, or 0."""


@dataclass
class StepKernel:
    """The step of a cell for one row.

    Attributes:
        kernel: What it computes.
        weights: Its parameters, and what is computed from parameters only: one array.
        words: Its quantized matrices.
        inputs: For each input of the kernel its first index in the weights, or None if it is ``x``.
        groups: For each phase, the places of its groups of products.
        state_offsets: First index of each state among all states of the cell.
        scratch_offsets: First index of each scratch buffer.
        row_offsets: First index of each row in int8, in the same memory.
        scratch_size: Number of values of this memory.
    """

    kernel: KernelIR
    weights: Tensor
    words: Tensor
    inputs: list[int | None]
    groups: list[list[PlacedGroup]]
    state_offsets: list[int]
    scratch_offsets: list[int]
    row_offsets: dict[QuantizedRow, int]
    scratch_size: int

    @property
    def state_size(self) -> int:
        """Number of values of all states."""
        return sum(state.width for state in self.kernel.states)

    def offset(self, buffer: Buffer) -> int:
        """Return the first index of a buffer in the memory that it is in."""
        match buffer.memory:
            case Memory.STATE | Memory.NEW_STATE:
                return self.state_offsets[buffer.index]
            case Memory.SCRATCH:
                return self.scratch_offsets[buffer.index]
            case _:
                return self.inputs[buffer.index] or 0


def step_kernel(cell: Cell) -> StepKernel:
    """Return the kernel of a bound cell's step in evaluation mode.

    All that is computed from the input is computed in the step, so that nothing happens before the loop.

    Raises:
        UnsupportedError: If the step can't be compiled, or isn't computed in float32.
    """
    captured = capture(cell, torch.float32, training=False)
    if captured.dtype is not torch.float32:
        raise UnsupportedError("its step is computed in float64, and C code is exported in float32 only")
    needed = ancestors(captured.new_states)
    nodes = [node for node in captured.graph.nodes if node in needed and node.op == "call_function"]
    loop = [node for node in nodes if is_batched(node)]
    for node in loop:
        check(node)
    read = inputs_of(loop) - set(loop) - set(captured.states)
    partition = LoopPartition(
        prologue=[node for node in nodes if not is_batched(node)],
        loop=loop,
        epilogue=[],
        inputs=[node for node in captured.graph.nodes if node in read],
        saved=[],
        old_states=captured.states,
        new_states=captured.new_states,
    )
    return _Packer(cell, captured, partition).pack()


class _Packer:
    """Packs the weights of a kernel."""

    def __init__(self, cell: Cell, captured: CapturedStep, partition: LoopPartition) -> None:
        self.kernel = build_kernel(partition, torch.float32)
        self.x = captured.x
        groups = [group for phase in self.kernel.phases() for group in phase.groups]
        needed = [one.node for one in self.kernel.inputs if not is_batched(one.node)]
        needed += [product.matrix for group in groups for product in group.products]
        self.values = _constant_values(cell, captured, partition, list(dict.fromkeys(needed)))
        self.weights, self.words = Array(torch.float32), Array(torch.int32)

    def pack(self) -> StepKernel:
        kernel = self.kernel
        groups = [[self.add_group(group, phase.width) for group in phase.groups] for phase in kernel.phases()]
        inputs: list[int | None] = []
        for one in kernel.inputs:
            if is_batched(one.node) and one.node is not self.x:
                raise UnsupportedError(
                    f"its step reads {one.node} for each row, and C code has no such input"
                )
            inputs.append(None if one.node is self.x else self.add(self.values[one.node].reshape(-1)))
        buffers = [one.width for one in kernel.scratch]
        rows = self.quantized_rows()
        places = _offsets([*buffers, *rows.values()])
        return StepKernel(
            kernel,
            self.weights.tensor(),
            self.words.tensor(),
            inputs,
            groups,
            _offsets([state.width for state in kernel.states]),
            places[: len(buffers)],
            dict(zip(rows, places[len(buffers) :], strict=True)),
            sum(buffers) + sum(rows.values()),
        )

    def add_group(self, group: Group, columns: int) -> PlacedGroup:
        """Append the matrices of a group, and return their place."""
        starts = [(self.values[product.matrix], product.offset) for product in group.products]
        matrices = torch.stack([matrix[:, start : start + columns] for matrix, start in starts], 1)
        if group.dtype is group.sum_dtype:
            return PlacedGroup(weights=self.add(matrices))
        if group.dtype is not torch.int8:
            return PlacedGroup(words=self.words.add(pack_16_bits(matrices, group.dtype)))
        words, scales = pack_int8(matrices)
        return PlacedGroup(self.add(scales), self.words.add(words))

    def quantized_rows(self) -> dict[QuantizedRow, int]:
        """Return the rows that products in int8 read, each with its size."""
        groups = [group for phase in self.kernel.phases() for group in phase.groups]
        return {quantized_row(one): row_size(one.depth) for one in groups if one.dtype is torch.int8}

    def add(self, value: Tensor) -> int:
        """Append a value to the weights, and return its first index."""
        return self.weights.add(value, aligned=value.dim() > 1)


def quantized_row(group: Group) -> QuantizedRow:
    """Return the row that a group in int8 reads."""
    assert group.buffer is not None
    return group.buffer, group.row_scale


def _constant_values(
    cell: Cell, captured: CapturedStep, partition: LoopPartition, needed: list[fx.Node]
) -> dict[fx.Node, Tensor]:
    """Return the values of nodes that depend on parameters only, as the engine computes them."""
    params = [getattr(cell, name).detach().contiguous() for name in cell.shapes()]
    values = {**captured.constants, **dict(zip(captured.params, params, strict=False))}
    runners = (BACKEND.bulk_runner(torch.float32), None)  # the second one is torch
    for runner in runners:
        results = dict(values)
        try:
            with torch.no_grad():
                BulkOps(partition.prologue, needed, (), torch.float32, runner, _CPU)(results, 1)
            return results
        except UnavailableError:  # there is no C++ compiler, for products of parameters
            continue
    raise AssertionError("torch computes any product")


def _offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:k]) for k in range(len(sizes))]

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

_CPU = torch.device("cpu")
ALIGNMENT = 16  # numbers in a cache line


@dataclass
class StepKernel:
    """The step of a cell for one row.

    Attributes:
        kernel: What it computes.
        weights: Its parameters, and what is computed from parameters only: one array.
        inputs: For each input of the kernel its first index in the weights, or None if it is ``x``.
        groups: For each phase, the first index in the weights of each group of products, which is packed as
            ``(term, product, column)``.
        state_offsets: First index of each state among all states of the cell.
        scratch_offsets: First index of each scratch buffer.
    """

    kernel: KernelIR
    weights: Tensor
    inputs: list[int | None]
    groups: list[list[int]]
    state_offsets: list[int]
    scratch_offsets: list[int]

    @property
    def state_size(self) -> int:
        """Number of values of all states."""
        return sum(state.width for state in self.kernel.states)

    @property
    def scratch_size(self) -> int:
        """Number of values of all scratch buffers."""
        return sum(buffer.width for buffer in self.kernel.scratch)

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
        self.parts: list[Tensor] = []
        self.size = 0

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
        weights = torch.cat(self.parts) if self.parts else torch.empty(0)
        states = _offsets([state.width for state in kernel.states])
        return StepKernel(
            kernel, weights, inputs, groups, states, _offsets([one.width for one in kernel.scratch])
        )

    def add_group(self, group: Group, columns: int) -> int:
        """Append the matrices of a group, and return their first index."""
        starts = [(self.values[product.matrix], product.offset) for product in group.products]
        return self.add(torch.stack([matrix[:, start : start + columns] for matrix, start in starts], 1))

    def add(self, value: Tensor) -> int:
        """Append a value to the weights, and return its first index.

        Matrices begin at a multiple of 64 bytes: loads that cross cache lines take twice the time.
        """
        if value.dim() > 1 and self.size % ALIGNMENT:
            self.add(torch.zeros(-self.size % ALIGNMENT))
        part = value.detach().to(torch.float32).reshape(-1)
        self.parts.append(part)
        self.size += part.numel()
        return self.size - part.numel()


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

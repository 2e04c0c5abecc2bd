"""A loop as a GPU kernel, and how it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from unrolled.engines import log
from unrolled.engines.compiler.batch_layout import Layout, ShiftedState, materialize
from unrolled.engines.compiler.ir import width
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.compiler.views import TensorView
from unrolled.engines.errors import UnavailableError
from unrolled.engines.gpu.codegen import parameter_views
from unrolled.engines.gpu.kernel_source import KernelSpec
from unrolled.engines.gpu.tuning import (
    COLUMN_ROWS,
    LARGE_BATCH,
    ROWS,
    SHARED_ROWS,
    SHARED_ROWS_OF_LARGE_BATCHES,
)


class Runtime(Protocol):
    """What compiles and launches kernels."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why kernels can't run on a device, or None if they can."""

    def load(self, source: str) -> Any:
        """Return the kernel with a source: ``kernel[grid](*arguments)`` launches it."""

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which kernels run on a device, in its current stream."""

    def is_capturing(self) -> bool:
        """Return whether a CUDA graph is being captured in the current stream."""

    def multiprocessors(self, device: torch.device) -> int:
        """Return the number of multiprocessors of a device."""

    def is_too_large(self, error: Exception) -> bool:
        """Return whether a launch failed because a kernel needs more resources than the device has."""

    def compilation_error(self, error: Exception) -> str | None:
        """Return why a kernel can't be compiled, given an error of a launch. None if it is another error."""


@dataclass
class CallTensors:
    """The tensors of a call, see :meth:`unrolled.engines.compiler.loops.Loop.call`."""

    values: dict[fx.Node, Any]
    initial: Sequence[Tensor | None]
    all_steps: Sequence[Tensor | None]
    final: Sequence[Tensor | None]
    like: Tensor


@dataclass
class GpuCall:
    """A kernel with its arguments.

    Attributes:
        loop: The loop.
        tensors: The tensors of the call.
        starts: The first row of each step, int64. None if all steps have the same rows.
        lengths: The number of steps of each row, int64, likewise.
        layout: Memory layout of the rows.
        reverse: Whether it runs from the last time step to the first.
        shift: Distance of shifted states, in time steps: -1, 0 or 1.
        device: Where it runs.
    """

    loop: GpuLoop
    tensors: CallTensors
    starts: Tensor | None
    lengths: Tensor | None
    layout: Layout
    reverse: bool
    shift: int
    device: torch.device

    def launch(self) -> None:
        """Launch the kernel in the current stream of its device.

        Raises:
            RuntimeError: If a CUDA graph is being captured, and the kernel hasn't run before.
            UnavailableError: If Triton can't compile the kernel.
        """
        loop = self.loop
        if loop.error is not None:
            raise UnavailableError(loop.error)
        with loop.runtime.guard(self.device):
            while True:
                grid = loop.choose(self.layout, self.device)
                try:
                    self._launch(grid)
                    return
                except Exception as error:
                    if not (loop.runtime.is_too_large(error) and loop.choose_next(grid.chosen)):
                        loop.error = loop.runtime.compilation_error(error)
                        if loop.error is None:
                            raise
                        raise UnavailableError(loop.error) from error

    def _launch(self, grid: Grid) -> None:
        loop, layout, chosen = self.loop, self.layout, grid.chosen
        options: dict[str, Any] = {
            "REVERSE": self.reverse,
            "SHIFT": self.shift,
            "PRECISION": precision(loop.dtype),
            "ROWS": grid.rows,
            "num_warps": loop.specs[chosen].warps,
            "enable_fp_fusion": True,  # the default of older versions of Triton; newer ones ask for a choice
        }
        if grid.meet:  # all programs must run at the same time, because they wait for each other
            options["launch_cooperative_grid"] = True
        pointers = (*loop.pointers(self.tensors, layout, grid), self.starts, self.lengths)
        key = (chosen, self.device, *(pointer is None for pointer in pointers), *options.values())
        if key not in loop.launched and loop.runtime.is_capturing():
            raise RuntimeError(
                "a recurrent layer can't be captured in a CUDA graph before its kernels are compiled: run "
                "the same call once before the capture"
            )
        numbers = (layout.steps, layout.batch, *([grid.parts] if grid.meet else []))
        loop.function(chosen)[grid.shape](*pointers, *numbers, **options)
        loop.launched.add(key)


@dataclass(frozen=True)
class Grid:
    """How a kernel is launched.

    Attributes:
        chosen: The number of the kernel.
        rows: Rows of a program.
        tiles: Number of tiles of rows.
        parts: Number of programs that share the columns of a tile. 0 if no programs share them.
        meet: Whether these programs wait for each other.
    """

    chosen: int
    rows: int
    tiles: int
    parts: int = 0
    meet: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of programs, by axis."""
        return (self.tiles, self.parts) if self.parts else (self.tiles,)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products in a loop: that of torch's recurrent layers on cuDNN."""
    if dtype is torch.float64:
        return "ieee"
    setting: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


class GpuLoop:
    """A loop, see :class:`~unrolled.engines.compiler.loops.Loop`.

    Args:
        partition: The partition that contains the loop.
        kernel: Its kernel IR.
        specs: The kernels that can run it, the fastest first.
        runtime: What compiles and launches them.

    Attributes:
        specs: The kernels.
        runtime: What compiles and launches them.
        dtype: Dtype that it computes in, and that of its workspaces.
        storage: Dtype of all other tensors. Values of parameters may have either.
        chosen: The number of the kernel that runs it: the first one for which the device has enough memory.
        launched: The kernels, with their options, that have run before.
        error: Why it can't run: Triton can't compile it. None if it can.
        needs: Values that the loop reads.
    """

    def __init__(
        self, partition: LoopPartition, kernel: KernelIR, specs: list[KernelSpec], runtime: Runtime
    ) -> None:
        self.specs, self.runtime = specs, runtime
        self.dtype, self.storage = kernel.dtype, kernel.storage
        self.chosen = 0
        self.launched: set[tuple[Any, ...]] = set()
        self.error: str | None = None
        self._functions: dict[int, Any] = {}
        self._saved = [(node, width(node)) for node in partition.saved]
        groups = [group for phase in kernel.phases() for group in (*phase.groups, *phase.hoisted)]
        matrices = [product.matrix for group in groups for product in group.products]
        hoisted = [group.products[0].row for phase in kernel.phases() for group in phase.hoisted]
        inputs = [one.node for one in kernel.inputs]
        self.needs: list[fx.Node] = list(dict.fromkeys([*inputs, *matrices, *hoisted]))
        self._shifted = [one.node for one in kernel.inputs if one.shifted]
        self._views = parameter_views(kernel)

    def function(self, number: int) -> Any:
        """Return a kernel. Triton compiles it when it is launched."""
        if number not in self._functions:
            spec = self.specs[number]
            log.engine.info(
                "GPU kernel in %s: %s, because %s", self.storage, spec.choice.strategy, spec.choice.reason
            )
            log.emit.info("a loop in %s\n%s", self.storage, spec.source)
            self._functions[number] = self.runtime.load(spec.source)
        return self._functions[number]

    def choose_next(self, number: int) -> bool:
        """Choose the next kernel, because the device has too little memory for one. False: there is none."""
        if number + 1 == len(self.specs):
            return False
        self.chosen = max(self.chosen, number + 1)
        return True

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
    ) -> GpuCall:
        """Prepare a call, see :meth:`unrolled.engines.compiler.loops.Loop.call`."""
        for node, columns in self._saved:
            values[node] = like.new_empty(layout.rows, columns)
        shifted = [values[node] for node in self._shifted if isinstance(values[node], ShiftedState)]
        shift = 0 if not shifted else 1 if shifted[0].reverse else -1
        tensors = CallTensors(values, initial, all_steps, final, like)
        starts, lengths = layout.on_device(like.device)
        return GpuCall(self, tensors, starts, lengths, layout, reverse, shift, like.device)

    def choose(self, layout: Layout, device: torch.device) -> Grid:
        """Return how to launch the first kernel that fits the number of rows."""
        for number in range(self.chosen, len(self.specs)):
            spec = self.specs[number]
            if not spec.meetings:
                rows = COLUMN_ROWS if spec.blocks else ROWS
                return Grid(number, rows, -(-layout.batch // rows), spec.blocks)
            rows = SHARED_ROWS if layout.batch <= LARGE_BATCH else SHARED_ROWS_OF_LARGE_BATCHES
            tiles = -(-layout.batch // rows)
            parts = min(spec.blocks, self.runtime.multiprocessors(device) // max(tiles, 1))
            is_last = number + 1 == len(self.specs)
            # Each meeting adds the number of programs to a number with 32 bits.
            if is_last or (parts > 1 and (spec.meetings * layout.steps + 1) * parts < 2**31):
                return Grid(number, rows, tiles, max(parts, 1), meet=True)
        raise AssertionError("a loop has a kernel")

    def pointers(self, tensors: CallTensors, layout: Layout, grid: Grid) -> list[Tensor | None]:
        """Return a tensor for each pointer of a kernel, or None."""
        arguments = self.specs[grid.chosen].arguments
        return [self._pointer(one.kind, one.target, tensors, layout, grid) for one in arguments]

    def _pointer(
        self, kind: str, target: Any, tensors: CallTensors, layout: Layout, grid: Grid
    ) -> Tensor | None:
        values = tensors.values
        match kind:
            case "arrived":
                return tensors.like.new_zeros(grid.tiles, dtype=torch.int32)
            case "value":
                value = values[target]
                return self._contiguous(value.state if isinstance(value, ShiftedState) else value)
            case "shifted_initial":
                value = values[target]
                initial = value.initial if isinstance(value, ShiftedState) else None
                return None if initial is None else self._contiguous(initial)
            case "hoisted":
                row, matrix = target
                return self._product(row, matrix, values, layout.rows)
            case "saved":
                saved: Tensor = values[target]
                return saved
            case "workspace":
                _, copies, columns = target
                return tensors.like.new_empty(copies * layout.batch, columns, dtype=self.dtype)
            case _:
                states: Sequence[Tensor | None] = getattr(tensors, kind)
                state: Tensor | None = states[target]
                return state

    def _contiguous(self, value: Tensor) -> Tensor:
        if value.dtype not in (self.dtype, self.storage):
            value = value.to(self.dtype)
        return value.contiguous()

    def _product(self, row: fx.Node, matrix: fx.Node, values: dict[fx.Node, Any], rows: int) -> Tensor:
        """Compute a product for all rows of all time steps."""
        left = self._contiguous(materialize(values[row])).view(rows, width(row))
        view: TensorView = self._views[matrix]
        right = view.apply_to(self._contiguous(materialize(values[view.base])), rows)
        return torch.mm(left.to(self.storage), right.to(self.storage))

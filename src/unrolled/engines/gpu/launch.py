"""A loop as a GPU kernel, and how it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
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
from unrolled.engines.gpu.codegen import parameter_views
from unrolled.engines.gpu.kernel_source import KernelSpec

ROWS = 16  # of a tile: the least that tl.dot takes
WARPS = 4


class Runtime(Protocol):
    """What compiles and launches kernels."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why kernels can't run on a device, or None if they can."""

    def load(self, source: str) -> Any:
        """Return the kernel with a source: ``kernel[grid](*arguments)`` launches it."""

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which kernels run on a device, in its current stream."""


@dataclass
class GpuCall:
    """A kernel with its arguments.

    Attributes:
        loop: The loop.
        pointers: A tensor for each argument of the kernel, or None.
        starts: The first row of each step, int64. None if all steps have the same rows.
        lengths: The number of steps of each row, int64, likewise.
        layout: Memory layout of the rows.
        reverse: Whether it runs from the last time step to the first.
        shift: Distance of shifted states, in time steps: -1, 0 or 1.
        device: Where it runs.
    """

    loop: GpuLoop
    pointers: list[Tensor | None]
    starts: Tensor | None
    lengths: Tensor | None
    layout: Layout
    reverse: bool
    shift: int
    device: torch.device

    def launch(self) -> None:
        """Launch the kernel in the current stream of its device."""
        loop, layout = self.loop, self.layout
        programs = -(-layout.batch // ROWS)
        with loop.runtime.guard(self.device):
            loop.function[(programs,)](
                *self.pointers,
                self.starts,
                self.lengths,
                layout.steps,
                layout.batch,
                REVERSE=self.reverse,
                SHIFT=self.shift,
                PRECISION=precision(loop.dtype),
                ROWS=ROWS,
                num_warps=WARPS,
                enable_fp_fusion=True,  # the default of older versions of Triton; newer ones ask for a choice
            )


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products in a loop: that of torch's recurrent layers on cuDNN."""
    if dtype is torch.float64:
        return "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


class GpuLoop:
    """A loop, see :class:`~unrolled.engines.compiler.loops.Loop`.

    Args:
        partition: The partition that contains the loop.
        kernel: Its kernel IR.
        spec: Its source.
        runtime: What compiles and launches it.

    Attributes:
        needs: Values that the loop reads.
    """

    def __init__(
        self, partition: LoopPartition, kernel: KernelIR, spec: KernelSpec, runtime: Runtime
    ) -> None:
        log.emit.info("a loop in %s\n%s", kernel.dtype, spec.source)
        self.spec, self.runtime, self.dtype = spec, runtime, kernel.dtype
        self.function = runtime.load(spec.source)
        self._saved = [(node, width(node)) for node in partition.saved]
        groups = [group for phase in kernel.phases() for group in (*phase.groups, *phase.hoisted)]
        matrices = [product.matrix for group in groups for product in group.products]
        hoisted = [group.products[0].row for phase in kernel.phases() for group in phase.hoisted]
        inputs = [one.node for one in kernel.inputs]
        self.needs: list[fx.Node] = list(dict.fromkeys([*inputs, *matrices, *hoisted]))
        self._views = parameter_views(kernel)

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
        states = {"initial": initial, "all_steps": all_steps, "final": final}
        pointers: list[Tensor | None] = []
        shift = 0
        for argument in self.spec.arguments:
            target = argument.target
            match argument.kind:
                case "value":
                    value = values[target]
                    if isinstance(value, ShiftedState):
                        shift, value = (1 if value.reverse else -1), value.state
                    pointers.append(self._contiguous(value))
                case "shifted_initial":
                    value = values[target]
                    shifted = isinstance(value, ShiftedState) and value.initial is not None
                    pointers.append(self._contiguous(value.initial) if shifted else None)
                case "hoisted":
                    row, matrix = target
                    pointers.append(self._product(row, matrix, values, layout.rows))
                case "saved":
                    pointers.append(values[target])
                case kind:
                    pointers.append(states[kind][target])
        starts, lengths = layout.on_device(like.device)
        return GpuCall(self, pointers, starts, lengths, layout, reverse, shift, like.device)

    def _contiguous(self, value: Tensor) -> Tensor:
        if value.dtype is self.dtype and value.is_contiguous():
            return value
        return value.to(self.dtype).contiguous()

    def _product(self, row: fx.Node, matrix: fx.Node, values: dict[fx.Node, Any], rows: int) -> Tensor:
        """Compute a product for all rows of all time steps."""
        left = self._contiguous(materialize(values[row])).view(rows, width(row))
        view: TensorView = self._views[matrix]
        return torch.mm(left, view.apply_to(self._contiguous(materialize(values[view.base])), rows))


def launch(calls: Iterable[GpuCall]) -> None:
    """Launch independent calls, one after another."""
    for call in calls:
        call.launch()

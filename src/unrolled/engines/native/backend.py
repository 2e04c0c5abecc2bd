"""The backend for CPUs: loops in C++."""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.cells.base import Cell
from unrolled.cells.quantized_products import FORMATS
from unrolled.cells.wrappers import QuantizedWrapper
from unrolled.engines import memory
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.kept_captures import Store
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.fork_safety import lazy_property
from unrolled.engines.native import matmul
from unrolled.engines.native.codegen import emit
from unrolled.engines.native.kernel import Kernel, KernelCall, launch
from unrolled.engines.native.kernel_spec import WEIGHT_FORMATS, KernelSpec
from unrolled.engines.native.toolchain import build, kept_files

_CPU = torch.device("cpu")


class NativeCell(CompiledCell):
    """A cell, compiled for CPUs.

    Attributes:
        inference: The forward loop without saved values.
    """

    inference: Kernel

    @lazy_property
    def direct_inputs(self) -> list[int | None] | None:
        """The tensors that the inference loop reads: for each the index of a parameter, or None for x.

        None if it reads anything else, so that operations must run before the loop.
        """
        params = self.captured.params
        bases = self.inference.bases
        if all(base is self.captured.x or base in params for base in bases):
            return [None if base is self.captured.x else params.index(base) for base in bases]
        return None

    def inference_call(
        self,
        params: list[Tensor],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        layout: Layout,
        reverse: bool,
        threads: int,
    ) -> tuple[KernelCall, Tensor, tuple[Tensor, ...]]:
        """Prepare a call of the inference loop, as quickly as possible if it reads only x and parameters."""
        if self.direct_inputs is None or not x.is_contiguous():
            return super().inference_call(params, x, states, layout, reverse, threads)
        output = x.new_empty(*x.shape[:-1], self.widths[0])
        final = [x.new_empty(layout.batch, size) for size in self.widths]
        addresses = [x.data_ptr() if k is None else params[k].data_ptr() for k in self.direct_inputs]
        addresses += [0] * len(final) if states is None else [state.data_ptr() for state in states]
        addresses += [output.data_ptr(), *[0] * (len(final) - 1)]
        addresses += [state.data_ptr() for state in final]
        alive = [x, params, states, output]
        call = self.inference.call_addresses(addresses, layout, reverse, threads, 0, alive)
        return call, output, tuple(final)


@dataclass
class _GeneratedKernel:
    """A kernel in C++, see :class:`~unrolled.engines.compiler.loops.GeneratedLoop`."""

    partition: LoopPartition
    spec: KernelSpec
    dtype: torch.dtype

    def start(self) -> None:
        build.start(self.spec.source)

    def load(self) -> Kernel:
        return Kernel(self.partition, self.spec, self.dtype)


COMPILED = "its step is compiled"


class NativeBackend:
    """The backend for CPUs, see :class:`~unrolled.engines.compiler.backend.Backend`."""

    name = "native"
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16)

    @property
    def captures(self) -> Store | None:
        """Where captured steps are stored, unless that is turned off."""
        return kept_files.enabled_store()

    def tensor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a call is computed in."""
        return torch.float32 if dtype is torch.bfloat16 else dtype

    def supports(self, tensors: Sequence[Tensor], dtype: torch.dtype, in_graph: bool = False) -> str | None:
        """Return why it can't run a call, or None if it can."""
        if dtype not in self.dtypes:
            return f"the native engine supports float32, float64 and bfloat16, not {dtype}"
        for tensor in tensors:
            if not in_graph and type(tensor) is not Parameter and type(tensor) is not Tensor:
                return "an input or a parameter is a subclass of torch.Tensor"
            if not tensor.is_cpu:  # much faster than tensor.device.type
                return "an input or a parameter is not on the CPU"
            if not in_graph and tensor.is_neg():
                return "an input or a parameter has its negative bit set (torch.Tensor.is_neg)"
            if tensor.dtype is not dtype:
                return f"inputs and parameters have different dtypes, {dtype} and {tensor.dtype}"
        if in_graph or memory.all_readable(tensors):
            return None
        return "an input or a parameter has no values in memory"

    def unavailable(self, device: torch.device) -> str | None:
        """Return None: a missing compiler is only reported when it is needed."""

    def explain(self, compiled: CompiledCell, training: bool) -> str:
        """Return why the loops of a cell run here."""
        return COMPILED

    def prepare(self, dtype: torch.dtype) -> None:
        """Start to compile the matrix products and the thread pool."""
        matmul.start(dtype)

    def compile(self, cell: Cell, dtype: torch.dtype, device: torch.device = _CPU) -> NativeCell:
        """Compile a cell."""
        self.prepare(dtype)
        for name, arguments in cell._wrapper_spec:
            if name == QuantizedWrapper.stored_name:
                matmul.start_format(WEIGHT_FORMATS[FORMATS[arguments[0]]])
        return NativeCell(cell, dtype, self, device)

    def generate(self, partition: LoopPartition, kernel: KernelIR) -> _GeneratedKernel:
        """Generate the C++ of a loop."""
        return _GeneratedKernel(partition, emit(partition, kernel), kernel.dtype)

    def bulk_runner(self, dtype: torch.dtype) -> Callable[[array.array[int]], None]:
        """Return what computes matrix products and sums of columns around loops."""
        return lambda operations: matmul.products(dtype).run_bulk(operations)

    def launch(self, calls: Sequence[KernelCall]) -> None:
        """Run calls."""
        launch(calls)


BACKEND = NativeBackend()

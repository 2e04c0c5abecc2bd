"""The backend for GPUs: loops in Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.cells.base import Cell
from unrolled.engines import memory
from unrolled.engines.compiler.bulk_ops import HALF_DTYPES, Values
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.kept_captures import Store
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.fork_safety import lazy_property
from unrolled.engines.gpu.choice import STRATEGIES
from unrolled.engines.gpu.codegen import emit
from unrolled.engines.gpu.kernel_source import KernelSpec
from unrolled.engines.gpu.launch import GpuCall, GpuLoop, Runtime
from unrolled.engines.gpu.runtime import TritonRuntime


class GpuCell(CompiledCell):
    """A cell, compiled for a GPU. Loops on half-precision tensors compute in float32."""

    _on_device: tuple[Values, Values] = {}, {}  # constants of a captured step, and their copies on the device

    def __init__(self, cell: Cell, dtype: torch.dtype, backend: GpuBackend, device: torch.device) -> None:
        if dtype in HALF_DTYPES:
            dtype, self.storage = torch.float32, dtype
        super().__init__(cell, dtype, backend, device)

    def _input_values(self, params: Iterable[Tensor], x: Tensor) -> Values:
        values = super()._input_values(params, x)
        constants = self.captured.constants
        if constants:  # those of a copy of this cell may be others
            if self._on_device[0] is not constants:
                copies = {node: value.to(self.device) for node, value in constants.items()}
                self._on_device = constants, copies
            values |= self._on_device[1]
        return values


@dataclass
class GeneratedKernel:
    """A kernel in Triton, see :class:`~unrolled.engines.compiler.loops.GeneratedLoop`."""

    partition: LoopPartition
    kernel: KernelIR
    specs: list[KernelSpec]
    runtime: Runtime

    def start(self) -> None:
        """Do nothing: Triton compiles a kernel in its first call."""

    def load(self) -> GpuLoop:
        """Return the loop."""
        return self._loop

    @lazy_property
    def _loop(self) -> GpuLoop:
        return GpuLoop(self.partition, self.kernel, self.specs, self.runtime)


class GpuBackend:
    """The backend for GPUs, see :class:`~unrolled.engines.compiler.backend.Backend`.

    Args:
        runtime: What compiles and launches kernels. Triton by default.
        strategy: Use only this strategy, one of ``choice.STRATEGIES``. None: all of them.

    Raises:
        ValueError: If there is no such strategy.
    """

    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __init__(self, runtime: Runtime | None = None, strategy: str | None = None) -> None:
        if strategy not in (None, *STRATEGIES):
            raise ValueError(f"strategy should be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self.name = f"gpu, {strategy}" if strategy else "gpu"
        self.runtime: Runtime = TritonRuntime() if runtime is None else runtime
        self._strategy = strategy

    @property
    def captures(self) -> Store | None:
        """Where captured steps are stored for other processes: nowhere."""
        return None

    def tensor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype itself: kernels read and write all dtypes that they support."""
        return dtype

    def supports(self, tensors: Sequence[Tensor], dtype: torch.dtype, in_graph: bool = False) -> str | None:
        """Return why it can't run a call, or None if it can."""
        if dtype not in self.dtypes:
            return f"GPU kernels support float32, float64, bfloat16 and float16, not {dtype}"
        device = tensors[0].device
        reason = self.runtime.unavailable(device)
        if reason is not None:
            return reason
        for tensor in tensors:
            if not in_graph and type(tensor) is not Parameter and type(tensor) is not Tensor:
                return "an input or a parameter is a subclass of torch.Tensor"
            if tensor.device != device:
                return f"inputs and parameters are on different devices, {device} and {tensor.device}"
            if not in_graph and tensor.is_neg():
                return "an input or a parameter has its negative bit set (torch.Tensor.is_neg)"
            if tensor.dtype is not dtype:
                return f"inputs and parameters have different dtypes, {dtype} and {tensor.dtype}"
        if in_graph or memory.all_readable(tensors):
            return None
        return "an input or a parameter has no values in memory"

    def unavailable(self, device: torch.device) -> str | None:
        """Return why kernels can't run on a device, or None if they can."""
        return self.runtime.unavailable(device)

    def explain(self, compiled: CompiledCell, training: bool) -> str:
        """Return the strategy of each loop, and why. A device with too little memory may use another one."""
        loops: dict[str, Any] = {"inference": compiled.inference}
        if training:
            loops = {"forward": compiled.training, "backward": compiled.backward}
        choices = {name: loop.specs[0].choice for name, loop in loops.items()}
        texts = {name: f"{choice.strategy}, because {choice.reason}" for name, choice in choices.items()}
        if len(set(texts.values())) == 1:
            return next(iter(texts.values()))
        return "; ".join(f"{name}: {text}" for name, text in texts.items())

    def prepare(self, dtype: torch.dtype) -> None:
        """Do nothing: cells share no compiled code."""

    def compile(self, cell: Cell, dtype: torch.dtype, device: torch.device) -> GpuCell:
        """Compile a cell."""
        return GpuCell(cell, dtype, self, device)

    def generate(self, partition: LoopPartition, kernel: KernelIR) -> GeneratedKernel:
        """Generate the Triton of a loop."""
        specs = emit(partition, kernel)
        if self._strategy is not None:
            specs = [spec for spec in specs if spec.choice.strategy == self._strategy]
            if not specs:
                raise UnsupportedError(f"none of its kernels has the strategy {self._strategy}")
        return GeneratedKernel(partition, kernel, specs, self.runtime)

    def bulk_runner(self, dtype: torch.dtype) -> None:
        """Return None: torch computes matrix products around loops."""

    def launch(self, calls: Sequence[GpuCall]) -> None:
        """Run calls."""
        for call in calls:
            call.launch()


BACKEND = GpuBackend()

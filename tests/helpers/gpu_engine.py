"""The GPU engine without a GPU: layers run on the CPU, and kernels on the stand-in for Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from helpers.triton_standin import StandIn
from unrolled.engines import backends
from unrolled.engines.compiler.kernel_ir import KernelIR
from unrolled.engines.compiler.partition import LoopPartition
from unrolled.engines.gpu.backend import GeneratedKernel, GpuBackend


class StreamedBackend(GpuBackend):
    """The same backend, for kernels that stream their matrices."""

    name = "streamed"

    def generate(self, partition: LoopPartition, kernel: KernelIR) -> GeneratedKernel:
        generated = super().generate(partition, kernel)
        generated.specs = generated.specs[-1:]
        return generated


RUNTIME = StandIn()
# Only one of each, because compiled cells are kept with their backend.
BACKENDS = {False: GpuBackend(RUNTIME), True: StreamedBackend(RUNTIME)}


@contextlib.contextmanager
def gpu_engine(streamed: bool = False) -> Iterator[StandIn]:
    """Run compiled loops with the GPU engine.

    Args:
        streamed: Whether kernels stream their matrices, even if those fit on a chip.
    """
    RUNTIME.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BY_DEVICE_TYPE, "cpu", BACKENDS[streamed])
        yield RUNTIME

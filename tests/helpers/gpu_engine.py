"""The GPU engine without a GPU: layers run on the CPU, and kernels on the stand-in for Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from helpers.triton_standin import StandIn
from unrolled.engines import backends
from unrolled.engines.gpu.backend import GpuBackend

RUNTIME = StandIn()
# Only one of each, because compiled cells are kept with their backend.
BACKENDS = {False: GpuBackend(RUNTIME), True: GpuBackend(RUNTIME, "streamed")}


@contextlib.contextmanager
def gpu_engine(streamed: bool = False) -> Iterator[StandIn]:
    """Run compiled loops with the GPU engine.

    Args:
        streamed: Whether kernels stream their matrices, even if those fit on a chip.
    """
    RUNTIME.reset()
    with backends.replaced("cpu", BACKENDS[streamed]):
        yield RUNTIME

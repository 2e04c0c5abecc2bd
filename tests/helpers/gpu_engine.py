"""The GPU engine without a GPU: layers run on the CPU, and kernels on the stand-in for Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from helpers.triton_standin import StandIn
from unrolled.engines import backends
from unrolled.engines.gpu.backend import GpuBackend
from unrolled.engines.gpu.choice import STRATEGIES

RUNTIME = StandIn()
# Only one of each, because compiled cells are kept with their backend.
BACKENDS = {strategy: GpuBackend(RUNTIME, strategy) for strategy in (None, *STRATEGIES)}


@contextlib.contextmanager
def gpu_engine(strategy: str | bool | None = None) -> Iterator[StandIn]:
    """Run compiled loops with the GPU engine.

    Args:
        strategy: The strategy of all kernels. True: they stream their matrices. None: the chosen one.
    """
    strategy = "streamed" if strategy is True else strategy or None
    RUNTIME.reset()
    with backends.replaced("cpu", BACKENDS[strategy]):
        yield RUNTIME

"""The GPU engine without a GPU: layers run on the CPU, and kernels on the stand-in for Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from helpers.triton_standin import StandIn
from unrolled.engines import backends
from unrolled.engines.gpu.backend import GpuBackend

RUNTIME = StandIn()
BACKEND = GpuBackend(RUNTIME)  # only one, because compiled cells are kept with their backend


@contextlib.contextmanager
def gpu_engine() -> Iterator[StandIn]:
    """Run compiled loops with the GPU engine."""
    RUNTIME.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BY_DEVICE_TYPE, "cpu", BACKEND)
        yield RUNTIME

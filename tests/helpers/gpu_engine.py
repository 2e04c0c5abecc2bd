"""The GPU engine on a machine without a GPU: layers run on the CPU, with kernels on the stand-in for Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from helpers.triton_standin import StandIn
from unrolled.engines import dispatch, registry
from unrolled.engines.gpu.backend import GpuBackend
from unrolled.engines.torch_ops import transforms

RUNTIME = StandIn()
BACKEND = GpuBackend(RUNTIME)  # only one, because compiled cells are kept with their backend


@contextlib.contextmanager
def gpu_engine() -> Iterator[StandIn]:
    """Run compiled loops with the GPU engine."""
    RUNTIME.sources.clear()
    RUNTIME.devices.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (registry, dispatch, transforms):
            patch.setattr(module, "BACKEND", BACKEND)
        yield RUNTIME

"""The backends, by the type of device that they run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unrolled.engines.compiler.backend import Backend
from unrolled.engines.gpu.backend import BACKEND as GPU_BACKEND
from unrolled.engines.native.backend import BACKEND

_BY_DEVICE_TYPE: dict[str, Backend] = {"cpu": BACKEND, "cuda": GPU_BACKEND}


def backend_for(device: torch.device) -> Backend:
    """Return the backend for a device. Where there is none, that of CPUs, whose ``supports`` refuses it."""
    return _BY_DEVICE_TYPE.get(device.type) or _BY_DEVICE_TYPE["cpu"]


@contextlib.contextmanager
def replaced(device_type: str, backend: Backend) -> Iterator[None]:
    """Use another backend for a device type, in all threads. It must have a different name."""
    previous = _BY_DEVICE_TYPE[device_type]
    _BY_DEVICE_TYPE[device_type] = backend
    try:
        yield
    finally:
        _BY_DEVICE_TYPE[device_type] = previous


def unsupported(tensors: Sequence[Tensor], in_graph: bool = False) -> str | None:
    """Return why compiled loops can't run a call, or None if they can.

    Args:
        tensors: The input, the initial states and the parameters. The input's device chooses the backend.
        in_graph: Whether the call is recorded as an operator of a graph, so that the tensors may be fake.
    """
    x = tensors[0]
    return backend_for(x.device).supports(tensors, x.dtype, in_graph)

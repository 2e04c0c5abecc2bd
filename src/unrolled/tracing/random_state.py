"""Capture the random state of a run and replay it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def capture_random_state(devices: list[torch.device]) -> list[Tensor]:
    """Return the random state of the CPU, followed by those of the given CUDA devices."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


@contextlib.contextmanager
def replay_random_state(state: list[Tensor], devices: list[torch.device]) -> Iterator[None]:
    """Start from a captured random state, with autocast disabled. On exit, restore the current random state.

    Args:
        state: The captured state of the CPU and of each device.
        devices: The CUDA devices, as in ``capture_random_state``.
    """
    device_types = {"cpu", *(device.type for device in devices)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        torch.set_rng_state(state[0])
        for device, device_state in zip(devices, state[1:], strict=True):
            torch.cuda.set_rng_state(device_state, device)
        yield


def cuda_devices(x: Any) -> list[torch.device]:
    """Return the CUDA device of an input, whose random state a run may change. Empty for a CPU input."""
    data = x.data if isinstance(x, PackedSequence) else x
    return [data.device] if isinstance(data, Tensor) and data.is_cuda else []

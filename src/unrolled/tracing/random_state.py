"""Capture the random state of a run and replay it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unrolled.layers.draws import DrawPosition, continue_draws, next_position


@dataclass(frozen=True)
class RandomState:
    """What determines the random numbers of a call.

    Attributes:
        cpu: State of the CPU's generator.
        cuda: State of the generator of each CUDA device.
        draws: Where the numbers of the call's steps begin, if it continues earlier calls of a stream.
    """

    cpu: Tensor
    cuda: list[Tensor]
    draws: DrawPosition | None


def capture_random_state(devices: list[torch.device]) -> RandomState:
    """Return the random state of the CPU and of the given CUDA devices."""
    return RandomState(torch.get_rng_state(), [*map(torch.cuda.get_rng_state, devices)], next_position())


@contextlib.contextmanager
def replay_random_state(state: RandomState, devices: list[torch.device]) -> Iterator[None]:
    """Start from a captured random state, with autocast disabled. On exit, restore the current random state.

    Args:
        state: The captured state.
        devices: The CUDA devices, as in ``capture_random_state``.
    """
    device_types = {"cpu", *(device.type for device in devices)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        torch.set_rng_state(state.cpu)
        for device, device_state in zip(devices, state.cuda, strict=True):
            torch.cuda.set_rng_state(device_state, device)
        stack.enter_context(continue_draws(None if state.draws is None else replace(state.draws)))
        yield


def cuda_devices(x: Any) -> list[torch.device]:
    """Return the CUDA device of an input, whose random state a run may change. Empty for a CPU input."""
    data = x.data if isinstance(x, PackedSequence) else x
    return [data.device] if isinstance(data, Tensor) and data.is_cuda else []

"""The random state of a run, and running again from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def random_state(devices: list[torch.device]) -> list[Tensor]:
    """The random state of the CPU and of these devices."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


@contextlib.contextmanager
def drawing_from(state: list[Tensor], devices: list[torch.device]) -> Iterator[None]:
    """Run what ran before: from this random state, which stays as it is, and without autocast."""
    kinds = {"cpu", *(device.type for device in devices)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_rng_state(state[0])
        for device, own in zip(devices, state[1:], strict=True):
            torch.cuda.set_rng_state(own, device)
        yield


def cuda_devices(x: Any) -> list[torch.device]:
    """The devices beside the CPU whose random state a run on this input may change."""
    data = x.data if isinstance(x, PackedSequence) else x
    return [data.device] if isinstance(data, Tensor) and data.is_cuda else []

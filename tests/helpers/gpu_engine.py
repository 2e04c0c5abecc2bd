"""The GPU engine without a GPU: layers run on the CPU, and kernels on the stand-in for Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

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


def results(layer: Any, x: Tensor, lengths: Any) -> list[Tensor]:
    """Return the results of a layer, and the gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    output, state = layer(x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths)))
    values = [output if lengths is None else output.data]
    values += state if isinstance(state, tuple) else [state]
    weights = [torch.linspace(-1, 1.5, v.numel(), dtype=v.dtype).view_as(v) for v in values]
    grads = torch.autograd.grad(values, [x, *layer.parameters()], weights, allow_unused=True)
    return [value.detach() for value in [*values, *grads] if value is not None]

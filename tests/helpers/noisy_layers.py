"""Layers and a model whose steps draw random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur


class NoisyCell(ur.Cell):
    """A rate network with noise, dropout and a random gate."""

    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
    log_sigma = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        kept = F.dropout(h, 0.3, self.training)
        noise = torch.randn_like(h)
        gate = torch.rand(len(x), 1, dtype=x.dtype) < 0.8
        new = torch.tanh(linear(x, self.w) + linear(kept, self.u) + torch.exp(self.log_sigma) * noise)
        h = torch.where(gate, new, h)
        return h


class TwoStates(ur.Cell):
    """Two states, and draws of several shapes."""

    state = ("h", "c")
    w = ur.Param("2*hidden", "input")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, b = linear(x + 0.1 * torch.randn_like(x), self.w).chunk(2, -1)
        heads = (h.view(len(h), 2, -1) * torch.rand(h.shape[0], 2, 1, dtype=h.dtype)).flatten(1)
        c = torch.sigmoid(a) * c + F.gumbel_softmax(b + heads, tau=0.5)
        return torch.tanh(c + b), c


def layer_of(
    cell: type[ur.Cell] = NoisyCell, dtype: torch.dtype = torch.float32, **options: Any
) -> ur.Recurrent:
    torch.manual_seed(0)
    return ur.Recurrent(cell, 3, 6, dtype=dtype, **options)


class NoisyModel(nn.Module):
    """Two layers of cells that draw random numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.below = layer_of(num_layers=2, dtype=dtype)
        self.above = ur.Recurrent(TwoStates, 6, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x)[0])[0]


def run(engine: str, layer: nn.Module, x: Any, *args: Any, seed: int = 1, **options: Any) -> list[Tensor]:
    """Return the output, the final states, and the gradients of x and of the parameters."""
    layer.zero_grad()
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_() if isinstance(x, Tensor) else x
    with ur.engine(engine):
        output, state = layer(leaf, *args, **options)[:2]
    data = output if isinstance(output, Tensor) else output.data
    states = state if isinstance(state, tuple) else (state,)
    (data.sin().sum() + sum(part.square().sum() for part in states)).backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    return [
        data.detach(),
        *(part.detach() for part in states),
        *([leaf.grad] if leaf is not x else []),
        *grads,
    ]


def seeded(function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(1)
    return function(*args)

"""A model to stream, and comparisons of results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import tensors


class Tagger(nn.Module):
    """A model with two recurrent layers and other modules between them."""

    def __init__(self, recurrent: Any = ur) -> None:
        super().__init__()
        self.read = nn.Linear(5, 9)
        self.below = recurrent.LSTM(9, 7, num_layers=2, batch_first=True, dropout=0.5)
        self.above = recurrent.GRU(7, 4, batch_first=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.above(torch.tanh(self.below(self.read(x * scale))[0]))[0]


def assert_same(a: Any, b: Any) -> None:
    """Assert that two results have bit-identical tensors."""
    parts_a, parts_b = list(tensors(a)), list(tensors(b))
    assert len(parts_a) == len(parts_b)
    assert all(torch.equal(p, q) for p, q in zip(parts_a, parts_b, strict=True))


def infer(module: nn.Module, *args: Any) -> Any:
    """Call a module without recording gradients."""
    with torch.no_grad():
        return module(*args)

"""A custom cell, as a user would write it outside of the package."""

import torch
from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

import unrolled as ur


class MGU(ur.Cell):
    """Minimal gated unit (Zhou et al., 2016, Minimal gated unit for recurrent neural networks, eq. 6)."""

    state = ("h",)
    weight_f = ur.Param("hidden", "input + hidden")
    weight_h = ur.Param("hidden", "input + hidden")
    bias_f = ur.Param("hidden")
    bias_h = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        f = sigmoid(linear(torch.cat([h, x], -1), self.weight_f, self.bias_f))
        candidate = tanh(linear(torch.cat([f * h, x], -1), self.weight_h, self.bias_h))
        h = (1 - f) * h + f * candidate
        return h

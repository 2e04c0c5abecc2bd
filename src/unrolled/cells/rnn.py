from __future__ import annotations

from typing import Literal

from torch import Tensor, relu, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class RNN(Cell):
    """Simple recurrent network (Elman, 1990, doi:10.1207/s15516709cog1402_1), as in torch.nn.RNN.

    Options:
        nonlinearity: activation: "tanh" or "relu"

    Quantities:
        input_sum: input pre-activation
        hidden_sum: recurrent pre-activation
        h: hidden state
    """

    nonlinearity: Literal["tanh", "relu"] = "tanh"

    state = ("h",)
    weight_ih = Param("hidden", "input")
    weight_hh = Param("hidden", "hidden")
    bias_ih = Param("hidden")
    bias_hh = Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_sum = linear(x, self.weight_ih, self.bias_ih)
        hidden_sum = linear(h, self.weight_hh, self.bias_hh)
        activation = tanh if self.nonlinearity == "tanh" else relu
        h = activation(input_sum + hidden_sum)
        return h

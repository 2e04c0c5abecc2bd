from __future__ import annotations

from typing import Literal

from torch import Tensor, nn, relu, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class IndRNN(Cell):
    """Independently recurrent network (Li et al., 2018, arXiv:1803.04831, eq. 2): diagonal recurrent weights.

    Options:
        nonlinearity: activation: "relu" or "tanh"

    Quantities:
        input_sum: input pre-activation
        h: hidden state
    """

    nonlinearity: Literal["relu", "tanh"] = "relu"

    state = ("h",)
    weight_ih = Param("hidden", "input", init=lambda weight: nn.init.kaiming_uniform_(weight, a=8))
    weight_u = Param("hidden", init=lambda weight: nn.init.uniform_(weight, 0, 1))
    bias_ih = Param("hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_sum = linear(x, self.weight_ih, self.bias_ih)
        activation = relu if self.nonlinearity == "relu" else tanh
        h = activation(input_sum + self.weight_u * h)
        return h

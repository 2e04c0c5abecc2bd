from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class CFN(Cell):
    """Chaos-free network (Laurent & von Brecht, 2016, arXiv:1612.06212).

    Quantities:
        theta: horizontal gate: how much of the old h is kept
        eta: vertical gate: how much of the input is written
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("3*hidden", "input")
    weight_hh = Param("2*hidden", "hidden")
    bias_ih = Param("2*hidden", init=lambda bias: nn.init.ones_(bias).chunk(2)[1].fill_(-1))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_theta, input_eta, input_h = linear(x, self.weight_ih).chunk(3, -1)
        hidden_theta, hidden_eta = linear(h, self.weight_hh, self.bias_ih).chunk(2, -1)
        theta = sigmoid(input_theta + hidden_theta)
        eta = sigmoid(input_eta + hidden_eta)
        h = theta * tanh(h) + eta * tanh(input_h)
        return h

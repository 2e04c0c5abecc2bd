from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class GRU(Cell):
    """Gated recurrent unit (Cho et al., 2014, arXiv:1406.1078): reset after the product, as in torch.nn.GRU.

    Quantities:
        input_sum: input pre-activations: r, z, n
        hidden_sum: recurrent pre-activations: r, z, n
        r: reset gate: how much of the old h enters n
        z: update gate: how much of the old h is kept
        n: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("3*hidden", "input")
    weight_hh = Param("3*hidden", "hidden")
    bias_ih = Param("3*hidden")
    bias_hh = Param("3*hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_sum = linear(x, self.weight_ih, self.bias_ih)
        hidden_sum = linear(h, self.weight_hh, self.bias_hh)
        input_r, input_z, input_n = input_sum.chunk(3, -1)
        hidden_r, hidden_z, hidden_n = hidden_sum.chunk(3, -1)
        r = sigmoid(input_r + hidden_r)
        z = sigmoid(input_z + hidden_z)
        n = tanh(input_n + r * hidden_n)
        h = (1 - z) * n + z * h
        return h

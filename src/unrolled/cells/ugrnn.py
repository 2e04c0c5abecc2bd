from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class UGRNN(Cell):
    """Update gate RNN (Collins et al., 2016, arXiv:1611.09913).

    Quantities:
        candidate: candidate for the new hidden state
        g: update gate: how much of the old h is kept
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("2*hidden", "input")
    weight_hh = Param("2*hidden", "hidden")
    bias_ih = Param("2*hidden", init=lambda bias: nn.init.zeros_(bias).chunk(2)[1].fill_(1))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        candidate, g = sums.chunk(2, -1)
        candidate = tanh(candidate)
        g = sigmoid(g)
        h = g * h + (1 - g) * candidate
        return h

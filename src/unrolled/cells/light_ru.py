from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class LightRU(Cell):
    """Light recurrent unit (Ye et al., 2024, doi:10.3390/electronics13163204): candidate of the input only.

    Quantities:
        f: forget gate: how much of the candidate is written
        candidate: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("2*hidden", "input")
    weight_hh = Param("hidden", "hidden")
    bias_ih = Param("2*hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        candidate, input_f = linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        candidate = tanh(candidate)
        f = sigmoid(input_f + linear(h, self.weight_hh))
        h = (1 - f) * h + f * candidate
        return h

from __future__ import annotations

from torch import Tensor, nn, sigmoid
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class ATR(Cell):
    """Addition-subtraction twin-gated recurrent unit (Zhang et al., 2018, arXiv:1810.12546).

    Quantities:
        p: input pre-activation
        q: recurrent pre-activation
        i: input gate: from p + q
        f: forget gate: from p - q
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("hidden", "input", init=lambda weight: nn.init.uniform_(weight, -0.08, 0.08))
    weight_hh = Param("hidden", "hidden", init=lambda weight: nn.init.uniform_(weight, -0.08, 0.08))
    bias_ih = Param("hidden", init=lambda bias: nn.init.uniform_(bias, -0.08, 0.08))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        p = linear(x, self.weight_ih, self.bias_ih)
        q = linear(h, self.weight_hh)
        i = sigmoid(p + q)
        f = sigmoid(p - q)
        h = i * p + f * h
        return h

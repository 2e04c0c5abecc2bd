from __future__ import annotations

from torch import Tensor, nn, relu, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class IntersectionRNN(Cell):
    """Intersection RNN, +RNN (Collins et al., 2016, arXiv:1611.09913): gates in depth and time.

    If the input and hidden sizes differ, the input is first projected to the hidden size.

    Quantities:
        y_in: candidate for the output
        h_in: candidate for the hidden state
        g_y: depth gate: how much of the input passes through
        g_h: time gate: how much of the old h is kept
        y: output
        h: hidden state
    """

    state = ("y", "h")
    weight_x = Param("hidden", "input", when=lambda cell: cell.input != cell.hidden)
    weight_ih = Param("4*hidden", "hidden")
    weight_hh = Param("4*hidden", "hidden")
    bias_ih = Param("4*hidden", init=lambda bias: nn.init.zeros_(bias).chunk(2)[1].fill_(1))

    def step(self, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.weight_x is None else linear(x, self.weight_x)
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        y_in, h_in, g_y, g_h = sums.chunk(4, -1)
        y_in, h_in, g_y, g_h = relu(y_in), tanh(h_in), sigmoid(g_y), sigmoid(g_h)
        y = g_y * x + (1 - g_y) * y_in
        h = g_h * h + (1 - g_h) * h_in
        return y, h

from __future__ import annotations

from torch import Tensor, nn, relu, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class NAS(Cell):
    """Cell found by neural architecture search (Zoph & Le, 2016, arXiv:1611.01578).

    As in TensorFlow's NASCell, one of the eight pairs of pre-activations is multiplied instead of added.

    Quantities:
        c: cell state
        h: hidden state
    """

    state = ("h", "c")
    weight_ih = Param("8*hidden", "input", init=init_per_gate(nn.init.xavier_uniform_, 8))
    weight_hh = Param("8*hidden", "hidden", init=init_per_gate(nn.init.xavier_uniform_, 8))
    bias_hh = Param("8*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x0, x1, x2, x3, x4, x5, x6, x7 = linear(x, self.weight_ih).chunk(8, -1)
        h0, h1, h2, h3, h4, h5, h6, h7 = linear(h, self.weight_hh, self.bias_hh).chunk(8, -1)
        first = tanh(sigmoid(x0 + h0) * relu(x1 + h1))
        second = tanh(sigmoid(x2 + h2) + relu(x3 * h3))
        third = tanh(tanh(x4 + h4) * sigmoid(x5 + h5))
        fourth = sigmoid(tanh(x6 + h6) + sigmoid(x7 + h7))
        c = tanh(first + c) * second
        h = tanh(c * tanh(third + fourth))
        return h, c

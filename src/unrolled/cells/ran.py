from __future__ import annotations

from typing import Literal

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class RAN(Cell):
    """Recurrent additive network (Lee et al., 2017, arXiv:1705.07393).

    The cell state is a weighted sum of inputs, because only the gates see the hidden state.

    Options:
        output: "tanh", or "identity" to output the cell state without tanh

    Quantities:
        content: candidate, a projection of the input
        i: input gate: how much of the content is written
        f: forget gate: how much of the old c is kept
        c: cell state
        h: hidden state
    """

    output: Literal["tanh", "identity"] = "tanh"

    state = ("h", "c")
    weight_ih = Param("3*hidden", "input")
    weight_hh = Param("2*hidden", "hidden")
    bias_hh = Param("2*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        content, input_i, input_f = linear(x, self.weight_ih).chunk(3, -1)
        hidden_i, hidden_f = linear(h, self.weight_hh, self.bias_hh).chunk(2, -1)
        i = sigmoid(input_i + hidden_i)
        f = sigmoid(input_f + hidden_f)
        c = i * content + f * c
        h = tanh(c) if self.output == "tanh" else c
        return h, c

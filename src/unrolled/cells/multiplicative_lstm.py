from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class MultiplicativeLSTM(Cell):
    """Multiplicative LSTM (Krause et al., 2016, arXiv:1609.07959v3).

    The input scales the hidden state before it enters the gates, so each input has its own transition matrix.
    The output o·tanh(c) is that of the authors' code.

    Quantities:
        m: intermediate state: the hidden state, scaled by the input
        i: input gate: how much of g is written
        f: forget gate: how much of the old c is kept
        g: candidate for the cell state
        o: output gate: how much of c is output
        c: cell state
        h: hidden state
    """

    state = ("h", "c")
    weight_mx = Param("hidden", "input", init=nn.init.orthogonal_)
    weight_mh = Param("hidden", "hidden", init=nn.init.orthogonal_)
    weight_ih = Param("4*hidden", "input", init=init_per_gate(nn.init.orthogonal_, 4))
    weight_im = Param("4*hidden", "hidden", init=init_per_gate(nn.init.orthogonal_, 4))
    bias_ih = Param("4*hidden", init=lambda bias: nn.init.zeros_(bias).chunk(4)[1].fill_(1))

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        m = linear(x, self.weight_mx) * linear(h, self.weight_mh)
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(m, self.weight_im)
        i, f, g, o = sums.chunk(4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * c + i * g
        h = o * tanh(c)
        return h, c

from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import each


class MultiplicativeLSTM(Cell):
    """Multiplicative LSTM (Krause et al., 2016, arXiv:1609.07959v3).

    Each input has a transition matrix of its own: the hidden state is scaled before the gates see it. The
    output is the one of its authors' code, o·tanh(c).

    Quantities:
        m: intermediate state: the hidden state as this input turns it
        i: input gate: how much g enters
        f: forget gate: how much old c stays
        g: candidate: what could be written
        o: output gate: how much of c is shown
        c: cell state
        h: hidden state
    """

    state = ("h", "c")
    weight_mx = Param("hidden", "input", init=nn.init.orthogonal_)
    weight_mh = Param("hidden", "hidden", init=nn.init.orthogonal_)
    weight_ih = Param("4*hidden", "input", init=each(nn.init.orthogonal_, 4))
    weight_im = Param("4*hidden", "hidden", init=each(nn.init.orthogonal_, 4))
    bias_ih = Param("4*hidden", init=lambda bias: nn.init.zeros_(bias).chunk(4)[1].fill_(1))

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        m = linear(x, self.weight_mx) * linear(h, self.weight_mh)
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(m, self.weight_im)
        i, f, g, o = sums.chunk(4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * c + i * g
        h = o * tanh(c)
        return h, c

from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class CIFG(Cell):
    """LSTM with coupled input and forget gates (Greff et al., 2015, arXiv:1503.04069, variant CIFG).

    The forget gate is one minus the input gate.

    Options:
        peepholes: whether the gates also see the cell state, as in the paper

    Quantities:
        i: input gate: how much of g is written
        f: forget gate: 1 - i
        g: candidate for the cell state
        c: cell state
        o: output gate: how much of c is output
        h: hidden state
    """

    peepholes: bool = False

    state = ("h", "c")
    weight_ih = Param("3*hidden", "input")
    weight_hh = Param("3*hidden", "hidden")
    bias_ih = Param("3*hidden")
    peep_i = Param("hidden", when=lambda cell: cell.peepholes)
    peep_o = Param("hidden", when=lambda cell: cell.peepholes)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        i, g, o = sums.chunk(3, -1)
        i = sigmoid(i + self.peep_i * c if self.peepholes else i)
        f = 1 - i
        g = tanh(g)
        c = f * c + i * g
        o = sigmoid(o + self.peep_o * c if self.peepholes else o)
        h = o * tanh(c)
        return h, c

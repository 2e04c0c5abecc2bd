from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class PeepholeLSTM(Cell):
    """LSTM whose gates see the cell state (Gers & Schmidhuber, 2000, doi:10.1109/IJCNN.2000.861302).

    Quantities:
        i: input gate: also depends on the old c
        f: forget gate: also depends on the old c
        g: candidate for the cell state
        c: cell state
        o: output gate: also depends on the new c
        h: hidden state
    """

    state = ("h", "c")
    weight_ih = Param("4*hidden", "input")
    weight_hh = Param("4*hidden", "hidden")
    bias_ih = Param("4*hidden")
    peep_i = Param("hidden")
    peep_f = Param("hidden")
    peep_o = Param("hidden")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        i, f, g, o = sums.chunk(4, -1)
        i = sigmoid(i + self.peep_i * c)
        f = sigmoid(f + self.peep_f * c)
        g = tanh(g)
        c = f * c + i * g
        o = sigmoid(o + self.peep_o * c)
        h = o * tanh(c)
        return h, c

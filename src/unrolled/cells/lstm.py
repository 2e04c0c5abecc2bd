from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class LSTM(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997, doi:10.1162/neco.1997.9.8.1735).

    Its gates are those of torch.nn.LSTM.

    Options:
        proj_size: number of features that the hidden state is projected to (Sak et al., 2014, Long short-term
            memory based recurrent neural network architectures, section 2); 0: no projection

    Quantities:
        input_sum: input pre-activations: i, f, g, o
        hidden_sum: recurrent pre-activations: i, f, g, o
        i: input gate: how much of g is written
        f: forget gate: how much of the old c is kept
        g: candidate for the cell state
        o: output gate: how much of c is output
        c: cell state
        h: hidden state
    """

    proj_size: int = 0

    state = {"h": "proj_size or hidden", "c": "hidden"}  # the first state is the output
    weight_ih = Param("4*hidden", "input")
    weight_hh = Param("4*hidden", "proj_size or hidden")
    bias_ih = Param("4*hidden")
    bias_hh = Param("4*hidden")
    weight_hr = Param("proj_size", "hidden")

    def check(self) -> None:
        if not 0 <= self.proj_size < self.hidden:
            raise ValueError(
                "proj_size should be a positive integer or zero to disable projections, and has to be "
                f"smaller than hidden_size={self.hidden}, got {self.proj_size}"
            )

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        input_sum = linear(x, self.weight_ih, self.bias_ih)
        hidden_sum = linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = (input_sum + hidden_sum).chunk(4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * c + i * g
        h = o * tanh(c)
        if self.proj_size:
            h = linear(h, self.weight_hr)
        return h, c

from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import layer_norm, linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class LayerNormLSTM(Cell):
    """LSTM with layer normalization (Ba et al., 2016, arXiv:1607.06450, supplement).

    The paper has three biases per pre-activation. Only their sum matters, so this cell has one.

    Quantities:
        input_sum: normalized input pre-activations: i, f, g, o
        hidden_sum: normalized recurrent pre-activations: i, f, g, o
        i: input gate: how much of g is written
        f: forget gate: how much of the old c is kept
        g: candidate for the cell state
        o: output gate: how much of c is output
        c: cell state
        h: hidden state
    """

    state = ("h", "c")
    weight_ih = Param("4*hidden", "input")
    weight_hh = Param("4*hidden", "hidden", init=init_per_gate(nn.init.orthogonal_, 4))
    gain_ih = Param("4*hidden", init=nn.init.ones_)
    gain_hh = Param("4*hidden", init=nn.init.ones_)
    gain_c = Param("hidden", init=nn.init.ones_)
    bias_ih = Param("4*hidden", init=nn.init.zeros_)
    bias_c = Param("hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        input_sum = linear(x, self.weight_ih)
        input_sum = layer_norm(input_sum, self.gain_ih.shape, self.gain_ih, self.bias_ih)
        hidden_sum = layer_norm(linear(h, self.weight_hh), self.gain_hh.shape, self.gain_hh)
        i, f, g, o = (input_sum + hidden_sum).chunk(4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = f * c + i * g
        h = o * tanh(layer_norm(c, self.gain_c.shape, self.gain_c, self.bias_c))
        return h, c

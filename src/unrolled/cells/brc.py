from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class BRC(Cell):
    """Bistable recurrent cell (Vecoven et al., 2020, arXiv:2006.05252): diagonal recurrent weights.

    Quantities:
        a: feedback strength: above 1 the unit is bistable
        c: update gate: how much of the old h is kept
        h: hidden state
    """

    state = ("h",)
    weight_gates = Param("2*hidden", "input", init=init_per_gate(nn.init.xavier_uniform_, 2))
    weight_ih = Param("hidden", "input", init=nn.init.xavier_uniform_)
    weight_a = Param("hidden", init=nn.init.ones_)
    weight_c = Param("hidden", init=nn.init.ones_)
    bias_gates = Param("2*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_a, input_c = linear(x, self.weight_gates, self.bias_gates).chunk(2, -1)
        a = 1 + tanh(input_a + self.weight_a * h)
        c = sigmoid(input_c + self.weight_c * h)
        h = c * h + (1 - c) * tanh(linear(x, self.weight_ih) + a * h)
        return h


class NBRC(Cell):
    """Neuromodulated bistable recurrent cell (Vecoven et al., 2020, arXiv:2006.05252).

    Quantities:
        a: feedback strength: above 1 the unit is bistable
        c: update gate: how much of the old h is kept
        h: hidden state
    """

    state = ("h",)
    weight_gates = Param("2*hidden", "input", init=init_per_gate(nn.init.xavier_uniform_, 2))
    weight_ih = Param("hidden", "input", init=nn.init.xavier_uniform_)
    weight_hh = Param("2*hidden", "hidden", init=init_per_gate(nn.init.xavier_uniform_, 2))
    bias_gates = Param("2*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_a, input_c = linear(x, self.weight_gates, self.bias_gates).chunk(2, -1)
        hidden_a, hidden_c = linear(h, self.weight_hh).chunk(2, -1)
        a = 1 + tanh(input_a + hidden_a)
        c = sigmoid(input_c + hidden_c)
        h = c * h + (1 - c) * tanh(linear(x, self.weight_ih) + a * h)
        return h

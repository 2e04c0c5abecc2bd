from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import lecun_normal


class AntisymmetricRNN(Cell):
    """Antisymmetric RNN (Chang et al., 2019, arXiv:1902.09689).

    A discretized, stable differential equation.

    Options:
        gamma: diffusion, which keeps the equation stable
        epsilon: time step size

    Quantities:
        turn: antisymmetric recurrent matrix
        sums: pre-activation
        h: hidden state
    """

    gamma: float = 0.01
    epsilon: float = 0.01

    state = ("h",)
    weight_ih = Param("hidden", "input", init=lecun_normal)
    weight_hh = Param("hidden", "hidden", init=lecun_normal)
    bias_ih = Param("hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        turn = self.weight_hh - self.weight_hh.T
        sums = linear(h, turn) - self.gamma * h + linear(x, self.weight_ih, self.bias_ih)
        h = h + self.epsilon * tanh(sums)
        return h


class GatedAntisymmetricRNN(Cell):
    """Antisymmetric RNN with gating (Chang et al., 2019, arXiv:1902.09689).

    The gate and the candidate share one recurrent matrix.

    Options:
        gamma: diffusion, which keeps the equation stable
        epsilon: time step size

    Quantities:
        turn: antisymmetric recurrent matrix
        hidden_sum: recurrent pre-activation, shared by gate and candidate
        z: input gate: scales the update of h
        h: hidden state
    """

    gamma: float = 0.01
    epsilon: float = 0.01

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=lecun_normal)
    weight_hh = Param("hidden", "hidden", init=lecun_normal)
    bias_ih = Param("2*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        turn = self.weight_hh - self.weight_hh.T
        hidden_sum = linear(h, turn) - self.gamma * h
        input_z, input_h = linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        z = sigmoid(hidden_sum + input_z)
        h = h + self.epsilon * z * tanh(hidden_sum + input_h)
        return h

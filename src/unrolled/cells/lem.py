from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class LEM(Cell):
    """Long expressive memory (Rusch et al., 2021, arXiv:2110.04744, eq. 3): two time-adaptive states.

    Options:
        dt: largest time step size of both states

    Quantities:
        slow: time step size of z
        fast: time step size of y
        z: slow state, which drives y
        y: hidden state
    """

    dt: float = 1.0

    state = ("y", "z")
    weight_ih = Param("4*hidden", "input")
    weight_hh = Param("3*hidden", "hidden")
    weight_zy = Param("hidden", "hidden")
    bias_ih = Param("4*hidden")

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        input_slow, input_fast, input_z, input_y = linear(x, self.weight_ih, self.bias_ih).chunk(4, -1)
        hidden_slow, hidden_fast, hidden_z = linear(y, self.weight_hh).chunk(3, -1)
        slow = self.dt * sigmoid(input_slow + hidden_slow)
        fast = self.dt * sigmoid(input_fast + hidden_fast)
        z = (1 - slow) * z + slow * tanh(input_z + hidden_z)
        y = (1 - fast) * y + fast * tanh(input_y + linear(z, self.weight_zy))
        return y, z

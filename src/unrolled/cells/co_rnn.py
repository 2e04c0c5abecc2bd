from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class CoRNN(Cell):
    """Coupled oscillatory RNN (Rusch & Mishra, 2020, arXiv:2010.00951, eq. 3), with explicit damping.

    Options:
        dt: time step size
        gamma: strength of the restoring force
        epsilon: damping

    Quantities:
        force: driving force of the oscillators
        z: velocity
        y: hidden state
    """

    dt: float = 0.042
    gamma: float = 2.7
    epsilon: float = 4.7

    state = ("y", "z")
    weight_ih = Param("hidden", "input", init=lambda weight, cell: init_by_total_inputs(weight, cell))
    weight_hh = Param("hidden", "hidden", init=lambda weight, cell: init_by_total_inputs(weight, cell))
    weight_zh = Param("hidden", "hidden", init=lambda weight, cell: init_by_total_inputs(weight, cell))
    bias_ih = Param("hidden", init=lambda bias, cell: init_by_total_inputs(bias, cell))

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(y, self.weight_hh) + linear(z, self.weight_zh)
        force = tanh(sums)
        z = z + self.dt * (force - self.gamma * y - self.epsilon * z)
        y = y + self.dt * z
        return y, z


def init_by_total_inputs(tensor: Tensor, cell: CoRNN) -> None:
    """Fill as torch.nn.Linear does, with the inputs and both states counted as its inputs."""
    bound = (cell.input + 2 * cell.hidden) ** -0.5
    nn.init.uniform_(tensor, -bound, bound)


class UnICORNN(Cell):
    """Undamped independent controlled oscillatory RNN (Rusch & Mishra, 2021, arXiv:2103.05487v2).

    Options:
        dt: largest time step size
        alpha: strength of the restoring force

    Quantities:
        pace: time step size of each unit
        force: driving force of the oscillators
        z: velocity
        y: hidden state
    """

    dt: float = 0.19
    alpha: float = 30.65

    state = ("y", "z")
    weight_ih = Param("hidden", "input", init=lambda weight: nn.init.kaiming_uniform_(weight, a=8))
    weight_hh = Param("hidden", init=lambda weight: nn.init.uniform_(weight, 0, 1))
    bias_ih = Param("hidden", init=nn.init.zeros_)
    control = Param("hidden", init=lambda value: nn.init.uniform_(value, -0.1, 0.1))

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        pace = self.dt * sigmoid(self.control)
        force = tanh(linear(x, self.weight_ih, self.bias_ih) + self.weight_hh * y)
        z = z - pace * (force + self.alpha * y)
        y = y + pace * z
        return y, z

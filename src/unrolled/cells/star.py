from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class STAR(Cell):
    """Stackable recurrent cell (Turkoglu et al., 2019, arXiv:1911.11033).

    Options:
        t_max: longest time span of the gate, in steps, from which its bias is drawn (chrono initialization:
            Tallec & Ollivier, 2018, arXiv:1804.11188); 0: no such initialization

    Quantities:
        z: candidate, computed from the input
        k: gate: how much of the candidate is written
        h: hidden state
    """

    t_max: int = 0

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=init_per_gate(nn.init.orthogonal_, 2))
    weight_hh = Param("hidden", "hidden", init=nn.init.orthogonal_)
    bias_ih = Param("2*hidden", init=lambda bias, cell: init_chrono(bias, cell))

    def check(self) -> None:
        if self.t_max < 0:
            raise ValueError(f"t_max should be a number of time steps, or 0 to disable it, got {self.t_max}")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        z, input_k = linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        z = tanh(z)
        k = sigmoid(input_k + linear(h, self.weight_hh))
        h = tanh((1 - k) * h + k * z)
        return h


def init_chrono(bias: Tensor, cell: STAR) -> None:
    """Set all biases to 0, or the gate's to minus the logarithm of time spans from 1 to ``t_max``."""
    gate = nn.init.zeros_(bias).chunk(2)[1]
    if cell.t_max:
        gate.copy_(-nn.init.uniform_(gate, 1, cell.t_max).log())

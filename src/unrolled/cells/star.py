from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import each


class STAR(Cell):
    """Stackable recurrent cell (Turkoglu et al., 2019, arXiv:1911.11033).

    With ``t_max`` the gate begins with memories of all lengths up to that (chrono initialisation).

    Quantities:
        z: candidate: what the input could write
        k: gate: how much of the candidate enters
        h: hidden state
    """

    t_max: int = 0

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=each(nn.init.orthogonal_, 2))
    weight_hh = Param("hidden", "hidden", init=nn.init.orthogonal_)
    bias_ih = Param("2*hidden", init=lambda bias, cell: remembering(bias, cell))

    def check(self) -> None:
        if self.t_max < 0:
            raise ValueError(f"t_max should be a number of time steps, or 0 for none, got {self.t_max}")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        z, input_k = linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        z = tanh(z)
        k = sigmoid(input_k + linear(h, self.weight_hh))
        h = tanh((1 - k) * h + k * z)
        return h


def remembering(bias: Tensor, cell: STAR) -> None:
    """Begin with a gate that lets in one part in 1 to t_max."""
    gate = nn.init.zeros_(bias).chunk(2)[1]
    if cell.t_max:
        gate.copy_(-nn.init.uniform_(gate, 1, cell.t_max).log())

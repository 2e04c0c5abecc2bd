from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import each


class JANET(Cell):
    """Just another network (van der Westhuizen & Lasenby, 2018, arXiv:1804.04849v3): one gate, that forgets.

    What enters is a little more than what is forgotten, by ``beta``. With ``t_max`` the gate begins with
    memories of all lengths up to that (chrono initialisation: Tallec & Ollivier, 2018, arXiv:1804.11188).

    Quantities:
        sums: weighted sums: forget gate, candidate
        f: forget gate: how much old h stays
        i: how much of the candidate enters
        candidate: what could be written
        h: hidden state
    """

    beta: float = 1.0
    t_max: int = 0

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=each(nn.init.xavier_uniform_, 2))
    weight_hh = Param("2*hidden", "hidden", init=each(nn.init.xavier_uniform_, 2))
    bias_ih = Param("2*hidden", init=lambda bias, cell: remembering(bias, cell))

    def check(self) -> None:
        if self.t_max < 0:
            raise ValueError(f"t_max should be a number of time steps, or 0 for none, got {self.t_max}")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        s, candidate = sums.chunk(2, -1)
        f = sigmoid(s)
        i = 1 - sigmoid(s - self.beta)
        candidate = tanh(candidate)
        h = f * h + i * candidate
        return h


def remembering(bias: Tensor, cell: JANET) -> None:
    """Begin with a forget gate at 1, or at the logarithm of times from 1 to t_max."""
    forget, _ = nn.init.zeros_(bias).chunk(2)
    forget.copy_(nn.init.uniform_(forget, 1, cell.t_max).log() if cell.t_max else forget + 1)

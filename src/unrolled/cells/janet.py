from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class JANET(Cell):
    """Just another network (van der Westhuizen & Lasenby, 2018, arXiv:1804.04849v3): only a forget gate.

    Options:
        beta: subtracted from the pre-activation of the input gate; above 0, a little more is written than is
            forgotten
        t_max: longest time span of the gate, in steps, from which its bias is drawn (chrono initialization:
            Tallec & Ollivier, 2018, arXiv:1804.11188); 0: no such initialization

    Quantities:
        sums: pre-activations: forget gate, candidate
        f: forget gate: how much of the old h is kept
        i: input gate: how much of the candidate is written
        candidate: candidate for the new hidden state
        h: hidden state
    """

    beta: float = 1.0
    t_max: int = 0

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=init_per_gate(nn.init.xavier_uniform_, 2))
    weight_hh = Param("2*hidden", "hidden", init=init_per_gate(nn.init.xavier_uniform_, 2))
    bias_ih = Param("2*hidden", init=lambda bias, cell: init_chrono(bias, cell))

    def check(self) -> None:
        if self.t_max < 0:
            raise ValueError(f"t_max should be a number of time steps, or 0 to disable it, got {self.t_max}")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        s, candidate = sums.chunk(2, -1)
        f = sigmoid(s)
        i = 1 - sigmoid(s - self.beta)
        candidate = tanh(candidate)
        h = f * h + i * candidate
        return h


def init_chrono(bias: Tensor, cell: JANET) -> None:
    """Set the forget gate's bias to 1, or draw it as the logarithm of time spans from 1 to t_max."""
    forget, _ = nn.init.zeros_(bias).chunk(2)
    forget.copy_(nn.init.uniform_(forget, 1, cell.t_max).log() if cell.t_max else forget + 1)

from __future__ import annotations

from functools import partial

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param

tenth = partial(nn.init.normal_, std=0.1)


class LowRank(Cell):
    """What both have: matrices of the input and of the hidden state, perhaps of a low rank."""

    input_rank: int = 0
    hidden_rank: int = 0

    state = ("h",)
    weight_ih = Param("hidden", "input_rank or input", init=tenth)
    weight_hh = Param("hidden", "hidden_rank or hidden", init=tenth)
    low_ih = Param("input_rank", "input", init=tenth)
    low_hh = Param("hidden_rank", "hidden", init=tenth)

    def check(self) -> None:
        for name, most in (("input_rank", min(self.input, self.hidden)), ("hidden_rank", self.hidden)):
            rank = getattr(self, name)
            if not 0 <= rank <= most:
                raise ValueError(
                    f"{name} should be 0 for a full matrix or a rank from 1 to {most}, which the sizes "
                    f"{self.input} and {self.hidden} allow, got {rank}"
                )


class FastRNN(LowRank):
    """FastRNN (Kusupati et al., 2018, arXiv:1901.02358, eq. 2): a weighted residual connection in time.

    ``alpha`` and ``beta`` are sigmoids of a learned number. A rank above 0 makes a matrix of that rank.

    Quantities:
        candidate: what could be written
        h: hidden state
    """

    bias_ih = Param("hidden", init=nn.init.ones_)
    alpha = Param(1, init=lambda value: nn.init.constant_(value, -3))
    beta = Param(1, init=lambda value: nn.init.constant_(value, 3))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        low_x = x if self.low_ih is None else linear(x, self.low_ih)
        low_h = h if self.low_hh is None else linear(h, self.low_hh)
        candidate = tanh(linear(low_x, self.weight_ih, self.bias_ih) + linear(low_h, self.weight_hh))
        h = sigmoid(self.alpha) * candidate + sigmoid(self.beta) * h
        return h


class FastGRNN(LowRank):
    """FastGRNN (Kusupati et al., 2018, arXiv:1901.02358, eq. 6): gate and candidate share both matrices.

    ``zeta`` and ``nu`` are sigmoids of a learned number. A rank above 0 makes a matrix of that rank.

    Quantities:
        sums: weighted sums of input and hidden state
        z: gate: how much old h stays
        candidate: what could be written
        h: hidden state
    """

    bias_z = Param("hidden", init=nn.init.ones_)
    bias_h = Param("hidden", init=nn.init.ones_)
    zeta = Param(1, init=lambda value: nn.init.constant_(value, 1))
    nu = Param(1, init=lambda value: nn.init.constant_(value, -4))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        low_x = x if self.low_ih is None else linear(x, self.low_ih)
        low_h = h if self.low_hh is None else linear(h, self.low_hh)
        sums = linear(low_x, self.weight_ih) + linear(low_h, self.weight_hh)
        z = sigmoid(sums if self.bias_z is None else sums + self.bias_z)
        candidate = tanh(sums if self.bias_h is None else sums + self.bias_h)
        h = (sigmoid(self.zeta) * (1 - z) + sigmoid(self.nu)) * candidate + z * h
        return h

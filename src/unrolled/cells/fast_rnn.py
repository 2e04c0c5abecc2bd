from __future__ import annotations

from functools import partial

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param

init_normal = partial(nn.init.normal_, std=0.1)


class LowRank(Cell):
    """Base of FastRNN and FastGRNN: input and recurrent matrices, optionally factorized to a low rank."""

    input_rank: int = 0
    hidden_rank: int = 0

    state = ("h",)
    weight_ih = Param("hidden", "input_rank or input", init=init_normal)
    weight_hh = Param("hidden", "hidden_rank or hidden", init=init_normal)
    low_ih = Param("input_rank", "input", init=init_normal)
    low_hh = Param("hidden_rank", "hidden", init=init_normal)

    def check(self) -> None:
        for name, maximum in (("input_rank", min(self.input, self.hidden)), ("hidden_rank", self.hidden)):
            rank = getattr(self, name)
            if not 0 <= rank <= maximum:
                raise ValueError(
                    f"{name} should be 0 (full matrix) or a rank from 1 to {maximum}, the maximum for "
                    f"input_size={self.input} and hidden_size={self.hidden}, got {rank}"
                )


class FastRNN(LowRank):
    """FastRNN (Kusupati et al., 2018, arXiv:1901.02358, eq. 2): a weighted residual connection in time.

    The two weights of the connection are the sigmoids of ``alpha`` and ``beta``.

    Options:
        input_rank: rank to which the input matrix is factorized; 0: a full matrix
        hidden_rank: rank to which the recurrent matrix is factorized; 0: a full matrix

    Quantities:
        candidate: candidate for the new hidden state
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

    ``zeta`` and ``nu`` are used through their sigmoids.

    Options:
        input_rank: rank to which the input matrix is factorized; 0: a full matrix
        hidden_rank: rank to which the recurrent matrix is factorized; 0: a full matrix

    Quantities:
        sums: pre-activation shared by gate and candidate
        z: gate: how much of the old h is kept
        candidate: candidate for the new hidden state
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

from __future__ import annotations

from torch import Tensor, sigmoid, where
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_like_linear


class MinGRU(Cell):
    """minGRU (Feng et al., 2024, arXiv:2410.01201v3): gates and candidate depend on the input only.

    Options:
        positive: whether the candidate is kept positive, as in the paper's log-space form (appendix B)

    Quantities:
        z: update gate: how much of the candidate is written
        candidate: candidate for the new hidden state
        h: hidden state
    """

    positive: bool = False

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=init_like_linear)
    bias_ih = Param("2*hidden", init=init_like_linear)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        z, candidate = linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        z = sigmoid(z)
        if self.positive:
            candidate = where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
        h = (1 - z) * h + z * candidate
        return h


class MinLSTM(Cell):
    """minLSTM (Feng et al., 2024, arXiv:2410.01201v3): gates normalized to sum to 1.

    Options:
        positive: whether the candidate is kept positive, as in the paper's log-space form (appendix B)

    Quantities:
        f: normalized forget gate: how much of the old h is kept
        i: normalized input gate: how much of the candidate is written
        candidate: candidate for the new hidden state
        h: hidden state
    """

    positive: bool = False

    state = ("h",)
    weight_ih = Param("3*hidden", "input", init=init_like_linear)
    bias_ih = Param("3*hidden", init=init_like_linear)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        f, i, candidate = linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
        f, i = sigmoid(f), sigmoid(i)
        f, i = f / (f + i), i / (f + i)
        if self.positive:
            candidate = where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
        h = f * h + i * candidate
        return h

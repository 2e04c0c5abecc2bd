from __future__ import annotations

from torch import Tensor, nn, relu, sigmoid
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import each


class LiGRU(Cell):
    """Light gated recurrent unit (Ravanelli et al., 2018, arXiv:1803.10225).

    No reset gate, and a rectified candidate. The paper's batch normalisation of the sums with the input is
    left to the layer below: a step sees one row, not the batch.

    Quantities:
        z: update gate: how much old h stays
        candidate: what could be written
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=each(nn.init.xavier_normal_, 2))
    weight_hh = Param("2*hidden", "hidden", init=each(nn.init.orthogonal_, 2))
    bias_ih = Param("2*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        z, candidate = sums.chunk(2, -1)
        z = sigmoid(z)
        candidate = relu(candidate)
        h = z * h + (1 - z) * candidate
        return h

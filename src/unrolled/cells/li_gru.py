from __future__ import annotations

from torch import Tensor, nn, relu, sigmoid
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class LiGRU(Cell):
    """Light gated recurrent unit (Ravanelli et al., 2018, arXiv:1803.10225).

    It has no reset gate, and its candidate uses ReLU. The paper's batch normalization of the input
    pre-activations is omitted, because a step may not mix rows of the batch: normalize the input instead.

    Quantities:
        z: update gate: how much of the old h is kept
        candidate: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("2*hidden", "input", init=init_per_gate(nn.init.xavier_normal_, 2))
    weight_hh = Param("2*hidden", "hidden", init=init_per_gate(nn.init.orthogonal_, 2))
    bias_ih = Param("2*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        z, candidate = sums.chunk(2, -1)
        z = sigmoid(z)
        candidate = relu(candidate)
        h = z * h + (1 - z) * candidate
        return h

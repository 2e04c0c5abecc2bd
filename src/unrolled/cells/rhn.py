from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class RHN(Cell):
    """Recurrent highway network with coupled gates (Zilly et al., 2016, arXiv:1607.03474).

    Each time step consists of several highway layers. The input enters the first one.

    Options:
        depth: number of highway layers in each time step

    Quantities:
        input_sum: input pre-activations: h, t
        h: candidate of a highway layer
        t: transform gate of a highway layer: how much of h is written
        s: hidden state
    """

    depth: int = 3

    state = ("s",)
    weight_ih = Param("2*hidden", "input", init=lambda weight: nn.init.uniform_(weight, -0.04, 0.04))
    weight_hh = Param("2*depth*hidden", "hidden", init=lambda weight: nn.init.uniform_(weight, -0.04, 0.04))
    bias_hh = Param("2*depth*hidden", init=lambda bias, cell: init_carry_bias(bias, cell))

    def check(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth should be a positive number of highway layers, got {self.depth}")

    def step(self, x: Tensor, s: Tensor) -> Tensor:
        input_sum = linear(x, self.weight_ih)
        bias = self.bias_hh
        biases = (None,) * self.depth if bias is None else bias.chunk(self.depth)
        for layer, weight in enumerate(self.weight_hh.chunk(self.depth)):
            sums = linear(s, weight, biases[layer])
            h, t = (sums + input_sum if layer == 0 else sums).chunk(2, -1)
            h, t = tanh(h), sigmoid(t)
            s = h * t + s * (1 - t)
        return s


def init_carry_bias(bias: Tensor, cell: RHN) -> None:
    """Set the biases of the transform gates to -2, so that they start nearly closed."""
    nn.init.zeros_(bias).view(cell.depth, 2, -1)[:, 1].fill_(-2)

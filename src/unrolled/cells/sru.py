from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn, sigmoid
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param

init_uniform = partial(nn.init.kaiming_uniform_, nonlinearity="linear")  # with variance 1 / inputs


class SRU(Cell):
    """Simple recurrent unit (Lei et al., 2017, arXiv:1709.02755v5): no matrix product with the state.

    If the input and hidden sizes differ, the highway connection projects the input to the hidden size.

    Options:
        highway_bias: initial bias of the reset gate
        rescale: whether to multiply the highway connection by sqrt(1 + 2·exp(highway_bias)), so that it
            initially has the scale of c

    Quantities:
        f: forget gate: how much of the old c is kept
        r: reset gate: how much of c is output
        c: cell state
        h: hidden state: mixture of c and the input
    """

    highway_bias: float = 0.0
    rescale: bool = True

    state = ("h", "c")
    weight_ih = Param("hidden", "input", init=init_uniform)
    weight_gates = Param("2*hidden", "input", init=lambda weight: init_uniform(weight).mul_(0.5**0.5))
    weight_x = Param("hidden", "input", init=init_uniform, when=lambda cell: cell.input != cell.hidden)
    weight_c = Param("2*hidden", init=lambda weight: nn.init.uniform_(weight, -(1.5**0.5), 1.5**0.5))
    bias_gates = Param("2*hidden", init=lambda bias, cell: init_highway_bias(bias, cell))

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        content = linear(x, self.weight_ih)
        input_f, input_r = linear(x, self.weight_gates, self.bias_gates).chunk(2, -1)
        weight_f, weight_r = self.weight_c.chunk(2)
        past = x if self.weight_x is None else linear(x, self.weight_x)
        past = past * math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.rescale else past
        f = sigmoid(input_f + weight_f * c)
        r = sigmoid(input_r + weight_r * c)
        c = f * c + (1 - f) * content
        h = r * c + (1 - r) * past
        return h, c


def init_highway_bias(bias: Tensor, cell: SRU) -> None:
    """Set the reset gate's bias to ``highway_bias``, the others to 0."""
    nn.init.zeros_(bias).chunk(2)[1].fill_(cell.highway_bias)

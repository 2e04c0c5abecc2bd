from __future__ import annotations

from typing import Literal

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_like_linear


class QRNN(Cell):
    """Quasi-recurrent network (Bradbury et al., 2016, arXiv:1611.01576): pooling, convolution width 1.

    For a wider convolution, apply ``torch.nn.Conv1d`` to the input.

    Options:
        pooling: the gates of the pooling: forget ("f"), forget and output ("fo"), or input, forget and output
            ("ifo")

    Quantities:
        z: candidate for the cell state
        f: forget gate: how much of the old c is kept
        o: output gate: how much of c is output
        i: input gate: how much of z is written
        c: cell state
        h: hidden state
    """

    pooling: Literal["f", "fo", "ifo"] = "fo"

    state = ("h", "c")
    weight_zf = Param("2*hidden", "input", init=init_like_linear)
    weight_o = Param("hidden", "input", init=init_like_linear, when=lambda cell: "o" in cell.pooling)
    weight_i = Param("hidden", "input", init=init_like_linear, when=lambda cell: "i" in cell.pooling)
    bias_zf = Param("2*hidden", init=init_like_linear)
    bias_o = Param("hidden", init=init_like_linear, when=lambda cell: "o" in cell.pooling)
    bias_i = Param("hidden", init=init_like_linear, when=lambda cell: "i" in cell.pooling)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z, f = linear(x, self.weight_zf, self.bias_zf).chunk(2, -1)
        z = tanh(z)
        f = sigmoid(f)
        i = sigmoid(linear(x, self.weight_i, self.bias_i)) if "i" in self.pooling else 1 - f
        c = f * c + i * z
        h = sigmoid(linear(x, self.weight_o, self.bias_o)) * c if "o" in self.pooling else c
        return h, c

from __future__ import annotations

import torch
from torch import Tensor, exp, maximum, nn, sigmoid, tanh, where
from torch.nn.functional import linear, logsigmoid

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import block_linear, check_heads


class SLSTM(Cell):
    """sLSTM of xLSTM (Beck et al., 2024, arXiv:2405.04517v2, eq. 8 to 17): stabilized exponential gates.

    The stabilizer m prevents overflow in the exponentials and doesn't change the output.

    Options:
        heads: number of blocks of the block-diagonal recurrent matrices

    Quantities:
        log_i: logarithm of the input gate
        log_f: logarithm of the forget gate, plus the old stabilizer
        m: stabilizer: maximum of log_f and log_i, or log_i while n is 0
        i: input gate: how much of z is written
        f: forget gate: how much of the old c is kept
        z: candidate for the cell state
        o: output gate: how much of c is output
        c: cell state
        n: normalizer: accumulated input gates
        h: hidden state
    """

    heads: int = 1

    state = ("h", "c", "n", "m")
    weight_ih = Param("4*hidden", "input", init=lambda weight: init_small(weight))
    weight_hh = Param("4*hidden", "hidden//heads", init=nn.init.zeros_)
    bias_ih = Param("4*hidden", init=lambda bias, cell: init_bias(bias, cell))

    def check(self) -> None:
        check_heads(self)

    def step(
        self, x: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        input_i, input_f, input_z, input_o = linear(x, self.weight_ih, self.bias_ih).chunk(4, -1)
        weight_i, weight_f, weight_z, weight_o = self.weight_hh.chunk(4)
        log_i = input_i + block_linear(h, weight_i, None, self.heads)
        log_f = logsigmoid(input_f + block_linear(h, weight_f, None, self.heads)) + m
        m = where(n == 0, log_i, maximum(log_f, log_i))
        i = exp(log_i - m)
        f = exp(log_f - m)
        z = tanh(input_z + block_linear(h, weight_z, None, self.heads))
        o = sigmoid(input_o + block_linear(h, weight_o, None, self.heads))
        c = f * c + i * z
        n = f * n + i
        h = o * (c / n)
        return h, c, n, m


def init_small(weight: Tensor) -> None:
    """Fill from a normal distribution with variance 2 / (5 * inputs)."""
    nn.init.normal_(weight, 0, (0.4 / weight.shape[1]) ** 0.5)


def init_bias(bias: Tensor, cell: SLSTM) -> None:
    """Set forget gate biases from 5 to -7 within each head and the others to 0, as in the authors' code."""
    units = cell.hidden // cell.heads
    position = torch.arange(units, dtype=bias.dtype, device=bias.device) / max(units - 1, 1)
    nn.init.zeros_(bias).chunk(4)[1].copy_((5 - 12 * position**0.3).repeat(cell.heads))

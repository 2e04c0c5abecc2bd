from __future__ import annotations

import torch
from torch import Tensor, exp, maximum, nn, sigmoid, tanh, where
from torch.nn.functional import linear, logsigmoid

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import block_linear, check_heads


class SLSTM(Cell):
    """sLSTM of xLSTM (Beck et al., 2024, arXiv:2405.04517v2, eq. 8 to 17): exponential gates, stabilised.

    The hidden state reaches the gates in ``heads`` blocks. The stabiliser m keeps the exponentials small: it
    leaves the output as it is.

    Quantities:
        log_i: logarithm of the input gate
        log_f: logarithm of the forget gate, and the stabiliser before
        m: stabiliser: the larger one; where nothing has entered yet, that of the input gate
        i: input gate: how much z enters
        f: forget gate: how much old c stays
        z: candidate: what could be written
        o: output gate: how much of c is shown
        c: cell state
        n: normaliser: how much has entered
        h: hidden state
    """

    heads: int = 1

    state = ("h", "c", "n", "m")
    weight_ih = Param("4*hidden", "input", init=lambda weight: small(weight))
    weight_hh = Param("4*hidden", "hidden//heads", init=nn.init.zeros_)
    bias_ih = Param("4*hidden", init=lambda bias, cell: spread(bias, cell))

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


def small(weight: Tensor) -> None:
    """Draw with a variance of 2 over five times the inputs."""
    nn.init.normal_(weight, 0, (0.4 / weight.shape[1]) ** 0.5)


def spread(bias: Tensor, cell: SLSTM) -> None:
    """Begin with forget gates from 5 to -7 within each head, the others at 0, as the authors' code does."""
    units = cell.hidden // cell.heads
    place = torch.arange(units, dtype=bias.dtype, device=bias.device) / max(units - 1, 1)
    nn.init.zeros_(bias).chunk(4)[1].copy_((5 - 12 * place**0.3).repeat(cell.heads))

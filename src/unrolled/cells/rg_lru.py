from __future__ import annotations

from torch import Tensor, exp, nn, sigmoid, sqrt
from torch.nn.functional import linear, softplus

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import block_linear, check_heads, lecun_normal


class RGLRU(Cell):
    """Real-gated linear recurrent unit of Griffin (De et al., 2024, arXiv:2402.19427, eq. 1 to 4).

    If the input and hidden sizes differ, the input is first projected to the hidden size.

    Options:
        heads: number of blocks of the gates' block-diagonal matrices

    Quantities:
        r: recurrence gate
        i: input gate
        log_a: logarithm of the decay
        a: decay: how much of the old h is kept
        h: hidden state
    """

    heads: int = 1

    state = ("h",)
    weight_x = Param("hidden", "input", when=lambda cell: cell.input != cell.hidden)
    weight_r = Param("hidden", "hidden//heads", init=lecun_normal)
    weight_i = Param("hidden", "hidden//heads", init=lecun_normal)
    bias_r = Param("hidden", init=nn.init.zeros_)
    bias_i = Param("hidden", init=nn.init.zeros_)
    decay = Param("hidden", init=lambda decay: init_decay(decay))

    def check(self) -> None:
        check_heads(self)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        x = x if self.weight_x is None else linear(x, self.weight_x)
        r = sigmoid(block_linear(x, self.weight_r, self.bias_r, self.heads))
        i = sigmoid(block_linear(x, self.weight_i, self.bias_i, self.heads))
        log_a = -8 * softplus(self.decay) * r
        a = exp(log_a)
        h = a * h + sqrt(1 - exp(2 * log_a)) * (i * x)
        return h


def init_decay(decay: Tensor) -> None:
    """Draw so that a is uniform between 0.9 and 0.999 when the recurrence gate is 1 (section 2.4)."""
    root = nn.init.uniform_(decay, 0.9, 0.999) ** (1 / 8)
    decay.copy_((1 / root - 1).log())

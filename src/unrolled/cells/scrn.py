from __future__ import annotations

from functools import partial

from torch import Tensor, nn, sigmoid
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param

init_normal = partial(nn.init.normal_, std=0.05)


class SCRN(Cell):
    """Structurally constrained recurrent network (Mikolov et al., 2014, arXiv:1412.7753v2).

    It has slow context units in addition to the hidden units. The paper's output layer reads both: use
    ``all_states=True`` to get the context.

    Options:
        alpha: how much of the context is kept at each step
        context_size: number of context units; 0: hidden_size

    Quantities:
        s: context: moving average of the projected input
        h: hidden state
    """

    alpha: float = 0.95
    context_size: int = 0

    state = {"h": "hidden", "s": "context_size or hidden"}
    weight_sx = Param("context_size or hidden", "input", init=init_normal)
    weight_hs = Param("hidden", "context_size or hidden", init=init_normal)
    weight_ih = Param("hidden", "input", init=init_normal)
    weight_hh = Param("hidden", "hidden", init=init_normal)

    def check(self) -> None:
        if self.context_size < 0:
            raise ValueError(
                f"context_size should be a number of units, or 0 to use hidden_size, got {self.context_size}"
            )

    def step(self, x: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = (1 - self.alpha) * linear(x, self.weight_sx) + self.alpha * s
        h = sigmoid(linear(s, self.weight_hs) + linear(x, self.weight_ih) + linear(h, self.weight_hh))
        return h, s

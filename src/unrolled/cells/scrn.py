from __future__ import annotations

from functools import partial

from torch import Tensor, nn, sigmoid
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param

small = partial(nn.init.normal_, std=0.05)


class SCRN(Cell):
    """Structurally constrained recurrent network (Mikolov et al., 2014, arXiv:1412.7753v2).

    Slow context units beside the hidden ones. The paper's output, a softmax of both, is the layer above:
    ``all_states=True`` gives it the context.

    Quantities:
        s: context: a slow average of the input
        h: hidden state
    """

    alpha: float = 0.95
    context_size: int = 0

    state = {"h": "hidden", "s": "context_size or hidden"}
    weight_sx = Param("context_size or hidden", "input", init=small)
    weight_hs = Param("hidden", "context_size or hidden", init=small)
    weight_ih = Param("hidden", "input", init=small)
    weight_hh = Param("hidden", "hidden", init=small)

    def check(self) -> None:
        if self.context_size < 0:
            raise ValueError(
                f"context_size should be a number of units, or 0 for hidden_size, got {self.context_size}"
            )

    def step(self, x: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = (1 - self.alpha) * linear(x, self.weight_sx) + self.alpha * s
        h = sigmoid(linear(s, self.weight_hs) + linear(x, self.weight_ih) + linear(h, self.weight_hh))
        return h, s

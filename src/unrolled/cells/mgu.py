from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.base import Cell, Param


class MGU(Cell):
    """Minimal gated unit (Zhou et al., 2016, arXiv:1603.09420).

    Quantities:
        f: gate: how much of the candidate is written and of the old h enters it
        candidate: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("2*hidden", "input")
    weight_hh = Param("2*hidden", "hidden")
    bias_ih = Param("2*hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_f, input_h = linear(x, self.weight_ih, self.bias_ih).chunk(2, -1)
        weight_f, weight_h = self.weight_hh.chunk(2)
        f = sigmoid(input_f + linear(h, weight_f))
        candidate = tanh(input_h + linear(f * h, weight_h))
        h = (1 - f) * h + f * candidate
        return h


class MGU1(Cell):
    """Minimal gated unit whose gate doesn't see the input (Heck & Salem, 2017, arXiv:1701.03452, MGU1).

    Quantities:
        f: gate: how much of the candidate is written and of the old h enters it
        candidate: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("hidden", "input")
    weight_hh = Param("2*hidden", "hidden")
    bias_ih = Param("hidden")
    bias_f = Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        weight_f, weight_h = self.weight_hh.chunk(2)
        f = sigmoid(linear(h, weight_f, self.bias_f))
        candidate = tanh(linear(x, self.weight_ih, self.bias_ih) + linear(f * h, weight_h))
        h = (1 - f) * h + f * candidate
        return h


class MGU2(Cell):
    """Minimal gated unit whose gate sees only the hidden state (Heck & Salem, 2017, arXiv:1701.03452, MGU2).

    Quantities:
        f: gate: how much of the candidate is written and of the old h enters it
        candidate: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("hidden", "input")
    weight_hh = Param("2*hidden", "hidden")
    bias_ih = Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        weight_f, weight_h = self.weight_hh.chunk(2)
        f = sigmoid(linear(h, weight_f))
        candidate = tanh(linear(x, self.weight_ih, self.bias_ih) + linear(f * h, weight_h))
        h = (1 - f) * h + f * candidate
        return h


class MGU3(Cell):
    """Minimal gated unit whose gate is only a bias (Heck & Salem, 2017, arXiv:1701.03452, MGU3).

    Quantities:
        f: gate, the same at every step
        candidate: candidate for the new hidden state
        h: hidden state
    """

    state = ("h",)
    weight_ih = Param("hidden", "input")
    weight_hh = Param("hidden", "hidden")
    bias_ih = Param("hidden")
    gate = Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        f = sigmoid(self.gate)
        candidate = tanh(linear(x, self.weight_ih, self.bias_ih) + linear(f * h, self.weight_hh))
        h = (1 - f) * h + f * candidate
        return h

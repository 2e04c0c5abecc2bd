"""Cells that torch.nn doesn't have, to time what a user's own equations cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import layer_norm, linear

from unrolled.cell import Cell, Param
from unrolled.cells.peephole_lstm import PeepholeLSTM


class Peephole(PeepholeLSTM):
    """LSTM whose gates see the cell state."""


class LayerNorm(Cell):
    """LSTM with layer normalisation (Ba et al., 2016, Layer normalization, eq. 20-22)."""

    state = ("h", "c")
    weight_ih = Param("4*hidden", "input")
    weight_hh = Param("4*hidden", "hidden")
    bias_ih = Param("4*hidden")
    gain_ih = Param("4*hidden", init=nn.init.ones_)
    gain_hh = Param("4*hidden", init=nn.init.ones_)
    gain_c = Param("hidden", init=nn.init.ones_)
    shift_c = Param("hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both weighted sums and the cell state are normalised over their features."""
        from_x, from_h = linear(x, self.weight_ih), linear(h, self.weight_hh)
        from_x = layer_norm(from_x, from_x.shape[-1:], self.gain_ih, self.bias_ih)
        from_h = layer_norm(from_h, from_h.shape[-1:], self.gain_hh)
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(layer_norm(c, c.shape[-1:], self.gain_c, self.shift_c))
        return h, c


class Minimal(Cell):
    """Minimal gated unit (Zhou et al., 2016, Minimal gated unit for recurrent neural networks, eq. 6)."""

    state = ("h",)
    weight_f = Param("hidden", "input + hidden")
    weight_h = Param("hidden", "input + hidden")
    bias_f = Param("hidden")
    bias_h = Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        """One gate f both forgets and admits."""
        f = sigmoid(linear(torch.cat([h, x], -1), self.weight_f, self.bias_f))
        candidate = tanh(linear(torch.cat([f * h, x], -1), self.weight_h, self.bias_h))
        h = (1 - f) * h + f * candidate
        return h


CUSTOM: tuple[type[Cell], ...] = (Peephole, LayerNorm, Minimal)

from __future__ import annotations

import torch
from torch import Tensor, cat, cos, nn, sigmoid, sin
from torch.nn.functional import layer_norm, linear, silu

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_like_linear


class HGRN(Cell):
    """Hierarchically gated recurrent unit (Qin et al., 2023, arXiv:2311.04823), as in the authors' README.

    A complex recurrence with learned phases, stored as a real and an imaginary state.

    Options:
        lower_bound: minimum of the forget gate; it should be higher in higher layers

    Quantities:
        c_re: real part of the candidate
        c_im: imaginary part of the candidate
        f: forget gate: how much of the rotated state is kept
        re: real part of the state
        im: imaginary part of the state
        g: output gate: how much of both parts is output
        y: output
    """

    lower_bound: float = 0.0

    state = ("y", "re", "im")
    weight_c = Param("2*hidden", "input", init=init_like_linear)
    weight_f = Param("hidden", "input", init=init_like_linear)
    weight_g = Param("2*hidden", "input", init=init_like_linear)
    weight_y = Param("hidden", "2*hidden")
    bias_c = Param("2*hidden", init=init_like_linear)
    bias_f = Param("hidden", init=init_like_linear)
    bias_g = Param("2*hidden", init=init_like_linear)
    bias_y = Param("hidden")
    theta = Param("hidden", init=lambda theta: init_frequencies(theta))
    gain = Param("2*hidden", init=nn.init.ones_)
    bias_norm = Param("2*hidden", init=nn.init.zeros_)

    def check(self) -> None:
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"lower_bound should be at least 0 and below 1, got {self.lower_bound}")

    def step(self, x: Tensor, y: Tensor, re: Tensor, im: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c_re, c_im = silu(linear(x, self.weight_c, self.bias_c)).chunk(2, -1)
        f = self.lower_bound + (1 - self.lower_bound) * sigmoid(linear(x, self.weight_f, self.bias_f))
        across, up = cos(self.theta), sin(self.theta)
        turned_re, turned_im = across * re - up * im, up * re + across * im
        re = f * turned_re + (1 - f) * c_re
        im = f * turned_im + (1 - f) * c_im
        g = sigmoid(linear(x, self.weight_g, self.bias_g))
        shown = layer_norm(g * cat([re, im], -1), self.gain.shape, self.gain, self.bias_norm)
        y = linear(shown, self.weight_y, self.bias_y)
        return y, re, im


def init_frequencies(theta: Tensor) -> None:
    """Fill with the frequencies of positional encodings: 10000 ** (-2 * k / units) for unit k."""
    unit = torch.arange(len(theta), dtype=theta.dtype, device=theta.device)
    theta.copy_(10000 ** (-2 * unit / len(theta)))

from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import layer_norm, linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import each


class LayerNormGRU(Cell):
    """Gated recurrent unit with one layer normalisation of all sums, as in Dreamer (Hafner et al., 2020).

    The recurrent cell of DreamerV2 (arXiv:2010.02193), whose authors' code has the equations. The update
    gate begins nearly closed, by ``update_bias``.

    Quantities:
        sums: weighted sums of input and hidden state, normalised: r, n, z
        r: reset gate: how much of the candidate's sum counts
        n: candidate for the new hidden state
        z: update gate: how much n enters
        h: hidden state
    """

    update_bias: float = -1.0

    state = ("h",)
    weight_ih = Param("3*hidden", "input", init=each(nn.init.xavier_uniform_, 3))
    weight_hh = Param("3*hidden", "hidden", init=each(nn.init.xavier_uniform_, 3))
    bias_ih = Param("3*hidden", init=nn.init.zeros_)
    gain = Param("3*hidden", init=nn.init.ones_)
    bias_norm = Param("3*hidden", init=nn.init.zeros_)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        sums = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        sums = layer_norm(sums, self.gain.shape, self.gain, self.bias_norm, eps=1e-3)
        r, n, z = sums.chunk(3, -1)
        r = sigmoid(r)
        n = tanh(r * n)
        z = sigmoid(z + self.update_bias)
        h = z * n + (1 - z) * h
        return h

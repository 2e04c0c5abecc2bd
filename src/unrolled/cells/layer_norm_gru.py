from __future__ import annotations

from torch import Tensor, nn, sigmoid, tanh
from torch.nn.functional import layer_norm, linear

from unrolled.cells.base import Cell, Param
from unrolled.cells.init import init_per_gate


class LayerNormGRU(Cell):
    """Gated recurrent unit with layer normalization, as in DreamerV2 (Hafner et al., 2020, arXiv:2010.02193).

    The equations are those of the authors' code: one layer normalization of all pre-activations.

    Options:
        update_bias: added to the pre-activation of the update gate, so that the gate starts nearly closed

    Quantities:
        sums: normalized pre-activations: r, n, z
        r: reset gate: scales the pre-activation of n
        n: candidate for the new hidden state
        z: update gate: how much of n is written
        h: hidden state
    """

    update_bias: float = -1.0

    state = ("h",)
    weight_ih = Param("3*hidden", "input", init=init_per_gate(nn.init.xavier_uniform_, 3))
    weight_hh = Param("3*hidden", "hidden", init=init_per_gate(nn.init.xavier_uniform_, 3))
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

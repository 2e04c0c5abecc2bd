from __future__ import annotations

from torch import Tensor, sigmoid, tanh
from torch.nn.functional import linear

from unrolled.cells.gru import GRU


class ResetBeforeGRU(GRU):
    """Gated recurrent unit (Cho et al., 2014, arXiv:1406.1078, eq. 5 to 8): reset before the product.

    This is the form of the paper, the default of ONNX and ``reset_after=False`` in Keras. It has the state
    and the parameters of :class:`GRU`, which applies the reset after the product.

    Quantities:
        input_sum: input pre-activations: r, z, n
        r: reset gate: how much of the old h enters n
        z: update gate: how much of the old h is kept
        kept: the old hidden state after the reset
        n: candidate for the new hidden state
        h: hidden state
    """

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        input_sum = linear(x, self.weight_ih, self.bias_ih)
        bias = self.bias_hh
        input_r, input_z, input_n = input_sum.chunk(3, -1)
        weight_r, weight_z, weight_n = self.weight_hh.chunk(3)
        bias_r, bias_z, bias_n = (None, None, None) if bias is None else bias.chunk(3)
        r = sigmoid(input_r + linear(h, weight_r, bias_r))
        z = sigmoid(input_z + linear(h, weight_z, bias_z))
        kept = r * h
        n = tanh(input_n + linear(kept, weight_n, bias_n))
        h = (1 - z) * n + z * h
        return h

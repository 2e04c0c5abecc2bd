"""GPU kernels of steps in which no column depends on others: a program for each block of columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.gpu_engine import gpu_engine, results
from helpers.sampling import sample
from helpers.user_cell import MGU
from unrolled.engines.gpu.backend import BACKEND
from unrolled.engines.gpu.choice import SCAN


class Leaky(ur.Cell):
    """A state and a slower one, which reads it."""

    state = ("h", "slow")
    weight = ur.Param("hidden", "input")
    rate = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor, slow: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(linear(x, self.weight) + self.rate * h)
        return h, slow + torch.sigmoid(self.rate) * (h - slow)


class TwoHalves(ur.Cell):
    """A state that consists of two runs of columns, which are rotated like a complex number."""

    state = {"h": "2*hidden"}
    weight = ur.Param("2*hidden", "input")
    angle = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = h.chunk(2, -1)
        u, v = linear(x, self.weight).chunk(2, -1)
        cos, sin = 0.9 * torch.cos(self.angle), 0.9 * torch.sin(self.angle)
        return torch.cat((cos * a - sin * b + u, sin * a + cos * b + v), -1)


class Shifted(ur.Cell):
    """Each column reads its neighbor."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h.roll(1, -1) + linear(x, self.weight)


class Mean(ur.Cell):
    """Each column reads the mean of all."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return h - h.mean(-1, keepdim=True) + linear(x, self.weight)


CELLS = [
    Leaky,
    TwoHalves,
    *(getattr(ur.cells, name) for name in ("MinGRU", "MinLSTM", "IndRNN", "QRNN", "SRU")),
]


@pytest.mark.parametrize("lengths", sample([None, [5, 4, 1]], [[5, 4, 1]]), ids=str)
@pytest.mark.parametrize("cell", sample(CELLS), ids=lambda cell: cell.__name__)
def test_results(cell: Any, lengths: Any) -> None:
    """In both directions. The second block of columns is not full.

    The backward pass of two halves adds gradients of both at once, so its values have several widths.
    """
    layer = ur.Recurrent(cell, 3, 150, bidirectional=True).double()
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    with ur.engine("reference"):
        expected = results(layer, x, lengths)
    with gpu_engine() as runtime, ur.engine("native"):
        actual = results(layer, x, lengths)
    assert len(runtime.sources) == 4
    scanned = ["tl.range(count, num_stages=" in source for source in runtime.sources]
    assert scanned == ([True, True, False, False] if cell is TwoHalves else [True] * 4)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


SCANNED = [(TwoHalves, "forward"), (Leaky, "all"), (Shifted, "none"), (Mean, "none"), (MGU, "none")]


@pytest.mark.parametrize("case", sample(SCANNED), ids=lambda case: case[0].__name__)
def test_which_cells_are_scanned(case: Any) -> None:
    cell, scanned = case
    compiled: Any = BACKEND.compile(cell(4, 40), torch.float32, torch.device("cuda", 0))
    assert (compiled.inference.specs[0].choice.strategy == SCAN) is (scanned != "none")
    assert (compiled.training.specs[0].choice.strategy == SCAN) is (scanned != "none")
    assert (compiled.backward.specs[0].choice.strategy == SCAN) is (scanned == "all")

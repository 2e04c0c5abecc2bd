"""Every published cell with quantized weights: both engines agree, and the error is small."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.cells.quantized_products import FORMATS

pytestmark = NEEDS_COMPILER
ALL_FORMATS = ("GRU", "SLSTM", "RHN", "FastGRNN")
CELLS = [name if name == "LSTM" else pytest.param(name, marks=pytest.mark.slow) for name in ur.cells.__all__]


@pytest.mark.parametrize("name", CELLS)
def test_every_cell(name: str) -> None:
    cell: Any = getattr(ur.cells, name)
    layer = ur.Recurrent(cell, 16, 16).eval()
    x = torch.randn(6, 3, 16)
    expected = layer(x)[0].detach()
    for weights in FORMATS if name in ALL_FORMATS else ("int8", "bfloat16"):
        quantized = ur.quantize(layer, weights)
        with ur.engine("native"):
            found = quantized(x)[0]
            assert torch.equal(torch.cat([quantized(x[:, k : k + 1])[0] for k in range(3)], 1), found)
        with ur.engine("reference"):
            reference = quantized(x)[0]
        error, flips = (found - expected).norm(), (found - reference).norm()
        limit = 0.1 if weights == "int8" else 0.02
        assert error < limit * expected.norm(), (weights, float(error / expected.norm()))
        # Gates differ in their last bits, and sometimes a value is rounded to another whole number.
        assert flips < 0.5 * error + 1e-5 * expected.norm(), (weights, float(flips / error))
        del quantized
        report = ur.quantize(layer, weights).report([x])
        assert report.layers[""]["h" if "h" in layer._first.state else next(iter(layer._first.state))]

"""Custom cells in fewer bits, and calls in torch transforms: every engine rounds the same products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.cells.quantized_products import quantized_mm


class Buffered(ur.Cell):
    """A cell that writes to a part of a tensor."""

    state = ("h",)
    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Any:
        values = torch.zeros_like(h)
        values[:, :2] = h[:, 2:4]
        return torch.tanh(x @ self.w.t() + values @ self.u.t())


class Strided(ur.Cell):
    """A cell whose products read every other column, or none."""

    state = ("h",)
    w = ur.Param("hidden", "2*input")
    u = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Any:
        nothing = x[:, :0] @ self.w.t()[:0]
        return torch.tanh(x @ self.w[:, ::2].t() + h @ self.u.t() + nothing)


class Expanded(ur.Cell):
    """A cell with one matrix for all rows of the batch."""

    state = ("h",)
    w = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Any:
        matrix = self.w.t().expand(x.shape[0], -1, -1)
        return torch.tanh(torch.bmm(x.unsqueeze(1), matrix).squeeze(1) + h)


class Parameterless(ur.Cell):
    """A cell without parameters."""

    state = ("h",)

    def step(self, x: Tensor, h: Tensor) -> Any:
        return torch.tanh(x + h)


def sequence() -> Tensor:
    return torch.randn(4, 3, 5)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:.* runs on the reference engine")
@pytest.mark.parametrize("cell", [Buffered, Strided, Expanded])
def test_the_input_is_rounded_on_every_engine(cell: Any) -> None:
    quantized, x = ur.quantize(ur.Recurrent(cell, 5, 7).eval()), sequence()[:1]
    matrix = quantized.w_l0.t()[::2] if cell is Strided else quantized.w_l0.t()
    expected = torch.tanh(quantized_mm(x[0], matrix, "int8", 0.0))
    for engine in ("auto", "reference"):
        with ur.engine(engine):
            torch.testing.assert_close(quantized(x)[0][0], expected)


def test_a_cell_without_parameters() -> None:
    with pytest.raises(ValueError, match="has no recurrent layer with a matrix product"):
        ur.quantize(ur.Recurrent(Parameterless, 5, 5).eval())


def test_vmap_on_the_reference_engine() -> None:
    quantized, x = ur.quantize(ur.GRU(5, 7).eval()), sequence()
    with ur.engine("reference"):
        expected = quantized(x)[0]
        found = torch.func.vmap(lambda part: quantized(part)[0])(torch.stack([x, x.flip(0)]))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_forward_mode() -> None:
    quantized, x = ur.quantize(ur.GRU(5, 7).eval()), sequence()
    with forward_ad.dual_level():
        assert torch.equal(quantized(x)[0], quantized(x)[0])
        with pytest.raises(ValueError, match=r"has a tangent: detach it"):
            quantized(forward_ad.make_dual(x, x))
    with pytest.raises(ValueError, match=r"has a tangent: detach it"):
        torch.func.jvp(lambda part: quantized(part)[0], (x,), (x,))

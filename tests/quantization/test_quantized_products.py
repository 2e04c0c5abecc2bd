"""Products with quantized weights: integers, scales, special values, bit-identical results."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, use_threads
from helpers.sampling import sample
from helpers.toolchain import X86_ONLY, run_python
from unrolled.cells.quantized_products import (
    quantize_weights,
    quantized_mm,
    round_weights,
    weight_scales,
)


class Products(ur.Cell):
    """A cell with nothing but products, so that engines can be compared bit for bit."""

    state = ("h",)
    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Any:
        h = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        return h


class Heads(ur.Cell):
    """Products with a matrix for each head, with slices of a matrix, and with one that is computed."""

    state = {"h": "hidden", "c": "2*hidden"}
    matrices = ur.Param("2", "hidden", "hidden")
    joint = ur.Param("input + hidden", "hidden")
    scale = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        heads = c.view(-1, 2, self.hidden).transpose(0, 1)
        c = torch.bmm(heads, self.matrices).transpose(0, 1).reshape(-1, 2 * self.hidden) * 0.5
        scaled = self.joint[self.input :] * self.scale
        h = torch.cat([x, h], 1) @ self.joint - torch.addmm(self.scale, h, scaled, beta=2, alpha=0.5)
        return h, c


def expected_int8(x: Tensor, matrix: Tensor) -> numpy.ndarray[Any, Any]:
    """The product by its definition, with NumPy's integers."""
    values, weights = x.numpy(), matrix.numpy()
    one = numpy.float32
    row_scales = numpy.abs(values).max(1, keepdims=True) / one(127)
    rows = numpy.rint(values * (one(127) / numpy.abs(values).max(1, keepdims=True))).astype(numpy.int64)
    scales = numpy.array([rounded_up(float(s)) for s in numpy.abs(weights).max(0) / one(127)], one)
    columns = numpy.rint(weights / scales).astype(numpy.int64)
    return ((rows @ columns).astype(one) * scales * row_scales).astype(one)


def rounded_up(scale: float) -> float:
    """The smallest number with 17 bits that isn't smaller."""
    unit = Fraction(2) ** (math.frexp(scale)[1] - 17)
    return float(-(-Fraction(scale) // unit) * unit)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(("batch", "depth", "width"), [(1, 1, 1), (3, 7, 5), (4, 130, 33)])
def test_int8_is_the_product_of_whole_numbers(batch: int, depth: int, width: int, size: float) -> None:
    x, matrix = torch.randn(batch, depth) * size, torch.randn(depth, width)
    result = quantized_mm(x, matrix, "int8", 0.0)
    assert numpy.array_equal(result.numpy(), expected_int8(x, matrix))
    exact = x.double() @ matrix.double()
    bound = x.abs().amax(1, keepdim=True) * matrix.abs().amax(0) * depth / 127  # half a unit of each factor
    assert ((result - exact).abs() <= 1.01 * bound).all()


def test_rows_are_divided_once() -> None:
    """The inverse of a scale is rounded like a quotient, not like a product with a reciprocal."""
    x, matrix = torch.rand(400_000, 2) + 0.5, torch.tensor([[127.0], [1.0]])
    assert numpy.array_equal(quantized_mm(x, matrix, "int8", 0.0).numpy(), expected_int8(x, matrix))


def test_scales_and_whole_numbers_survive_a_round_trip() -> None:
    """Weights that are whole numbers times their scale are stored without a loss."""
    for shape, dim in (((50, 70), 1), ((50, 70), 0), ((3, 20, 30), 1)):
        weights = torch.randn(shape) * torch.logspace(-6, 6, shape[-1])
        scales = weight_scales(weights, dim)
        whole = quantize_weights(weights, scales)
        stored = whole * scales
        assert whole.abs().amax(dim).eq(127).all()
        assert torch.equal(weight_scales(stored, dim), scales)
        assert torch.equal(quantize_weights(stored, scales), whole)
        assert torch.equal(stored.double(), whole.double() * scales.double())  # exact in float32


@pytest.mark.parametrize("engine", ["reference", pytest.param("native", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_special_values(scale: float, engine: str) -> None:
    """A row with an infinity or NaN gives NaN, but not the others. Zeros and tiny values give zeros."""
    layer = ur.Recurrent(Products, 20, 18).eval()
    calibration = None if not scale else [torch.full((1, 1, 20), 127 * scale)]
    quantized = ur.quantize(layer, calibration=calibration)
    x = torch.randn(3, 6, 20)
    x[:, 0, 17], x[:, 1, 3], x[:, 2, 0] = torch.nan, torch.inf, -torch.inf
    x[:, 3], x[:, 4] = 0.0, 1e-38
    with ur.engine(engine):
        output = quantized(x)[0]
        alone = quantized(x[:, 5:])[0]
    assert output[:, :3].isnan().all()
    assert torch.equal(output[:, 3:5], torch.zeros(3, 2, 18))
    assert torch.equal(output[:, 5:], alone)
    assert alone.abs().max() > 0


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 7, 4, 3), (33, 40, 1, 2), (64, 130, 5, 9), (17, 64, 3, 33)]
)
def test_int8_has_the_bits_of_the_definition(sizes: tuple[int, int, int, int]) -> None:
    input_size, hidden, steps, batch = sizes
    quantized = ur.quantize(ur.Recurrent(Products, input_size, hidden).eval())
    x, h = torch.randn(steps, batch, input_size), torch.randn(1, batch, hidden)
    with ur.engine("reference"):
        expected = quantized(x, h)[0]
    with ur.engine("native"):
        for threads in (1, 2):
            with use_threads(threads):
                assert torch.equal(quantized(x, h)[0], expected)
                rows = [quantized(x[:, k : k + 1], h[:, k : k + 1])[0] for k in range(batch)]
                assert torch.equal(torch.cat(rows, 1), expected)
    with ur.engine("native"), ur.frozen(quantized):
        assert torch.equal(quantized(x, h)[0], expected)


@NEEDS_COMPILER
def test_large_products_have_the_same_bits_for_two_threads() -> None:
    quantized = ur.quantize(ur.LSTM(200, 300).eval())
    x, results = torch.randn(12, 40, 200), []
    with ur.engine("native"):
        for threads in (1, 2):
            with use_threads(threads):
                results += [quantized(x)[0], torch.cat([quantized(x[:, :7])[0], quantized(x[:, 7:])[0]], 1)]
    assert all(torch.equal(result, results[0]) for result in results)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
def test_heads_slices_and_computed_matrices(weights: str) -> None:
    layer = ur.Recurrent(Heads, 6, 9).eval()
    quantized = ur.quantize(layer, weights)
    assert quantized.weight_storage.dims == {"matrices_l0": 1}  # the others are read by other operations, too
    x = torch.randn(4, 5, 6)
    with ur.engine("reference"):
        expected = quantized(x)[0]
    with ur.engine("native"):
        torch.testing.assert_close(quantized(x)[0], expected, rtol=1e-5, atol=1e-6)
    error = (expected - layer(x)[0]).abs().max()
    assert 0 < error < 0.05 * expected.abs().max()


@NEEDS_COMPILER
@pytest.mark.parametrize("weights", sample(["bfloat16", "float16"], fast=["float16"]))
@pytest.mark.parametrize("sizes", sample([(1, 1, 1), (7, 33, 4), (40, 130, 9)], fast=[(7, 33, 4)]))
def test_16_bits_have_the_bits_of_rounded_weights(sizes: tuple[int, int, int], weights: str) -> None:
    """Also of weights that are subnormal in float16."""
    input_size, hidden, batch = sizes
    layer = ur.LSTM(input_size, hidden).eval()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(torch.logspace(-8, 0, hidden))
    quantized = ur.quantize(layer, weights)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parameter = getattr(layer, name)
        parameter.data = parameter.detach().to(getattr(torch, weights)).float()
    x = torch.randn(6, batch, input_size)
    with torch.no_grad(), ur.engine("native"):
        assert torch.equal(quantized(x)[0], layer(x)[0])


def test_float16_of_large_values() -> None:
    values = torch.tensor([65504.0, 65519.0, 1e6, -1e6])
    assert torch.equal(
        round_weights(values, torch.float16), torch.tensor([65504.0, 65504.0, 65504.0, -65504.0])
    )


BITS = """
import hashlib, torch, unrolled as ur
torch.manual_seed(0)
layers = [ur.LSTM(33, 70), ur.GRU(64, 130)]
for layer in layers:
    x = torch.randn(9, 7, layer.input_size)
    with ur.engine("native"):
        print(hashlib.sha256(ur.quantize(layer.eval())(x)[0].numpy().tobytes()).hexdigest())
"""


@X86_ONLY
@NEEDS_COMPILER
@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    """VNNI, AVX-512 without it, and AVX2, as far as this processor has them."""
    results = {}
    for arch in ("native", "skylake-avx512", "x86-64-v3"):
        done = run_python(BITS, UNROLLED_ARCH=arch)
        if "has no" in done.stderr or "can't run" in done.stderr:
            continue
        results[arch] = re.findall(r"[0-9a-f]{64}", done.stdout)
    assert len(results) > 1, "no other instruction set runs here"
    assert all(len(bits) == 2 and bits == results["native"] for bits in results.values())

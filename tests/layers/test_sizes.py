"""Sizes at the ends: nothing at all, and more than 32-bit numbers count."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, assert_close, gradients, pair, tensors
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns

PAST = 2**31

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_of_nothing(kind: str, bidirectional: bool, engine: str) -> None:
    """No row: empty outputs, and gradients of the parameters that are zero, as in torch.nn."""
    ours, theirs = pair(kind, 3, 5, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(4, 0, 3, requires_grad=True)
    expected = theirs(x)
    weights = [torch.randn_like(part) for part in tensors(expected)]
    zeros = gradients(theirs, x, None, weights)
    with ur.engine(engine):
        assert_close(ours(x), expected, 0)
        with torch.no_grad():
            assert_close(ours(x), expected, 0)
        found = gradients(ours, x, None, weights)
        assert_close(found, zeros, 0)
        output, _ = ours(x, checkpoint=2)
        assert_close(torch.autograd.grad(output.sum(), [x, *ours.parameters()]), zeros, 0)
    assert all(not part.count_nonzero() for part in found)


@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_step_and_no_width_are_refused_as_in_torch(kind: str, engine: str) -> None:
    ours, theirs = pair(kind, 3, 5)
    for layer in (ours, theirs):
        with ur.engine(engine), pytest.raises(RuntimeError, match="Expected sequence length to be larger"):
            layer(torch.randn(0, 2, 3))
    for sizes, name in (((0, 5), "input_size"), ((3, 0), "hidden_size")):
        for made in LAYERS[kind][:2]:
            with pytest.raises(ValueError, match=f"{name} must be greater than zero"):
                made(*sizes)


@NEEDS_COMPILER
@pytest.mark.parametrize("features", [BATCH_SYMBOL, 2 * BATCH_SYMBOL])
def test_a_width_that_cannot_be_told_from_the_batch_is_refused(features: int) -> None:
    layer = ur.RNN(features, 2)
    with (
        ur.engine("native"),
        pytest.raises(RuntimeError, match=f"a size of {features}, a multiple"),
    ):
        layer(torch.randn(2, 1, features))


def test_more_elements_than_names_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="a value of 16777217 elements, more than 16777216"):
        Columns(torch.float32).names(torch.empty(2**24 + 1, device="meta"))


# --- past 2**31 elements ---


def needs(gigabytes: float) -> Any:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return pytest.mark.skipif(free < gigabytes * 2**30, reason=f"{gigabytes} GiB of memory are not free")


@NEEDS_COMPILER
@pytest.mark.exhaustive
@needs(11)
@pytest.mark.parametrize("back", [False, True])
def test_an_input_past_the_numbers_of_32_bits(back: bool) -> None:
    """What lies behind the limit is read there: the steps at either end give the bits of a short sequence."""
    features, batch = 4096, 64
    steps = PAST // (features * batch) + 2
    layer = ur.RNN(features, 8, bidirectional=back)
    x = torch.zeros(steps, batch, features)
    x[-3:], x[:3] = torch.randn(2, 3, batch, features)
    assert x.numel() > PAST
    with torch.no_grad(), ur.engine("native"):
        whole, _ = layer(x)
        part, _ = layer(x[-3:].clone(), whole[-4, :, :8].repeat(1 + back, 1, 1).contiguous())
        assert torch.equal(whole[-3:, :, :8], part[..., :8])
        if back:
            part, _ = layer(x[:3].clone(), torch.stack([torch.zeros(batch, 8), whole[3, :, 8:]]))
            assert torch.equal(whole[:3], part)


@NEEDS_COMPILER
@pytest.mark.exhaustive
@needs(12)
def test_an_output_past_the_numbers_of_32_bits() -> None:
    hidden, batch = 32, 2**16
    steps = PAST // (hidden * batch) + 2
    layer, x = ur.GRU(1, hidden), torch.randn(steps, batch, 1)
    with torch.no_grad(), ur.engine("native"):
        whole, final = layer(x)
        assert whole.numel() > PAST
        part, last = layer(x[-3:].clone(), whole[-4].unsqueeze(0).clone())
        assert torch.equal(whole[-3:], part)
        assert torch.equal(final, last)


@NEEDS_COMPILER
@pytest.mark.exhaustive
@needs(14)
def test_gradients_past_the_numbers_of_32_bits() -> None:
    """Sums and products over so many elements, of integers: to the bit those of two halves of them."""
    features, batch = 2048, 2**10
    steps = PAST // (features * batch) + 2
    layer, half = ur.RNN(features, 2, nonlinearity="relu"), steps // 2
    x = torch.zeros(steps, batch, features)
    for step in (0, 1, half, -2, -1):
        x[step] = torch.randint(-1, 2, (batch, features))
    assert x.numel() > PAST
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.randint(-1, 2, (2, features)))
        for parameter in (layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0):
            parameter.zero_()  # no gradient passes from one half to the other

    def found(x: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())))

    with ur.engine("native"):
        whole, first, second = found(x), found(x[:half]), found(x[half:])
    assert all(part.count_nonzero() for part in whole)
    assert all(torch.equal(all_of, a + b) for all_of, a, b in zip(whole, first, second, strict=True))


@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("shape", [(2, 2), (1,), (12, 4, 1), (12, 5)])
def test_a_parameter_of_another_shape_is_refused(engine: str, shape: tuple[int, ...]) -> None:
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3)
    cell = ur.GRUCell(3, 4)
    wrong = {"weight_hh_l0": torch.ones(shape)}
    words = rf"GRU: the parameter weight_hh_l0 should have the shape \(12, 4\), it has \({shape[0]},"
    calls = [
        lambda: torch.func.functional_call(layer, wrong, (x,)),
        lambda: torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,))[0].sum())(wrong),
    ]
    with ur.engine(engine):
        for call in calls:
            with pytest.raises(ValueError, match=words):
                call()
        layer.weight_hh_l0 = torch.nn.Parameter(wrong["weight_hh_l0"])
        with torch.no_grad(), ur.frozen(layer), pytest.raises(ValueError, match=words):
            layer(x)
        with pytest.raises(ValueError, match=words):
            ur.Stream(layer)(x)
        cell.bias_hh = torch.nn.Parameter(torch.ones(1))
        with pytest.raises(ValueError, match="GRUCell: the parameter bias_hh should have the shape"):
            cell(x[0])

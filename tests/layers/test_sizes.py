"""Extreme sizes: empty batches, tensors with more than 2**31 elements, and sizes that an export varies."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, assert_close, gradients, pair, tensors
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.columns import Columns

LIMIT = 2**31

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch(kind: str, bidirectional: bool, engine: str) -> None:
    """Outputs are empty and the gradients of the parameters are zero, as in torch.nn."""
    ours, theirs = pair(kind, 3, 5, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(4, 0, 3, requires_grad=True)
    expected = theirs(x)
    weights = [torch.randn_like(part) for part in tensors(expected)]
    zeros = gradients(theirs, x, None, weights)
    with ur.engine(engine):
        assert_close(ours(x), expected, 0)
        with torch.no_grad():
            assert_close(ours(x), expected, 0)
        actual = gradients(ours, x, None, weights)
        assert_close(actual, zeros, 0)
        output, _ = ours(x, checkpoint=2)
        assert_close(torch.autograd.grad(output.sum(), [x, *ours.parameters()]), zeros, 0)
    assert all(not part.count_nonzero() for part in actual)


@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_errors_for_empty_sequences_and_sizes_of_zero(kind: str, engine: str) -> None:
    ours, theirs = pair(kind, 3, 5)
    for layer in (ours, theirs):
        with ur.engine(engine), pytest.raises(RuntimeError, match="Expected sequence length to be larger"):
            layer(torch.randn(0, 2, 3))
    for sizes, name in (((0, 5), "input_size"), ((3, 0), "hidden_size")):
        for cls in LAYERS[kind][:2]:
            with pytest.raises(ValueError, match=f"{name} must be greater than zero"):
                cls(*sizes)


@NEEDS_COMPILER
@pytest.mark.parametrize("features", [BATCH_SYMBOL, 2 * BATCH_SYMBOL])
def test_a_width_that_equals_the_batch_symbol_is_not_supported(features: int) -> None:
    layer = ur.RNN(features, 2)
    with (
        ur.engine("native"),
        pytest.raises(RuntimeError, match=f"its size {features} is a multiple"),
    ):
        layer(torch.randn(2, 1, features))


def test_too_many_elements_for_the_lowering() -> None:
    with pytest.raises(UnsupportedError, match="splits a value of 16777217 elements, more than 16777216"):
        Columns(torch.float32).ids_of(torch.empty(2**24 + 1, device="meta"))


# --- more than 2**31 elements ---


def needs_memory(gigabytes: float) -> Any:
    """Skip a test if less memory is available."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return pytest.mark.skipif(free < gigabytes * 2**30, reason=f"needs {gigabytes} GiB of free memory")


@NEEDS_COMPILER
@pytest.mark.exhaustive
@needs_memory(11)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_input_with_more_than_2_31_elements(bidirectional: bool) -> None:
    """The first and last steps are bit-identical to those of a short sequence."""
    features, batch = 4096, 64
    steps = LIMIT // (features * batch) + 2
    layer = ur.RNN(features, 8, bidirectional=bidirectional)
    x = torch.zeros(steps, batch, features)
    x[-3:], x[:3] = torch.randn(2, 3, batch, features)
    assert x.numel() > LIMIT
    with torch.no_grad(), ur.engine("native"):
        output, _ = layer(x)
        expected, _ = layer(x[-3:].clone(), output[-4, :, :8].repeat(1 + bidirectional, 1, 1).contiguous())
        assert torch.equal(output[-3:, :, :8], expected[..., :8])
        if bidirectional:
            expected, _ = layer(x[:3].clone(), torch.stack([torch.zeros(batch, 8), output[3, :, 8:]]))
            assert torch.equal(output[:3], expected)


@NEEDS_COMPILER
@pytest.mark.exhaustive
@needs_memory(12)
def test_an_output_with_more_than_2_31_elements() -> None:
    hidden, batch = 32, 2**16
    steps = LIMIT // (hidden * batch) + 2
    layer, x = ur.GRU(1, hidden), torch.randn(steps, batch, 1)
    with torch.no_grad(), ur.engine("native"):
        output, final = layer(x)
        assert output.numel() > LIMIT
        expected, last = layer(x[-3:].clone(), output[-4].unsqueeze(0).clone())
        assert torch.equal(output[-3:], expected)
        assert torch.equal(final, last)


@NEEDS_COMPILER
@pytest.mark.exhaustive
@needs_memory(14)
def test_gradients_over_more_than_2_31_elements() -> None:
    """All values are integers, so the gradients are exactly the sum of those of both halves."""
    features, batch = 2048, 2**10
    steps = LIMIT // (features * batch) + 2
    layer, half = ur.RNN(features, 2, nonlinearity="relu"), steps // 2
    x = torch.zeros(steps, batch, features)
    for step in (0, 1, half, -2, -1):
        x[step] = torch.randint(-1, 2, (batch, features))
    assert x.numel() > LIMIT
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.randint(-1, 2, (2, features)))
        for parameter in (layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0):
            parameter.zero_()  # the second half doesn't depend on the first

    def weight_gradients(x: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())))

    with ur.engine("native"):
        total, first, second = weight_gradients(x), weight_gradients(x[:half]), weight_gradients(x[half:])
    assert all(part.count_nonzero() for part in total)
    assert all(torch.equal(both, a + b) for both, a, b in zip(total, first, second, strict=True))


@pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])
@pytest.mark.parametrize("shape", [(2, 2), (1,), (12, 4, 1), (12, 5)])
def test_error_for_a_parameter_of_the_wrong_shape(engine: str, shape: tuple[int, ...]) -> None:
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3)
    cell = ur.GRUCell(3, 4)
    wrong = {"weight_hh_l0": torch.ones(shape)}
    message = rf"GRU: the parameter weight_hh_l0 should have the shape \(12, 4\), but has \({shape[0]},"
    calls = [
        lambda: torch.func.functional_call(layer, wrong, (x,)),
        lambda: torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,))[0].sum())(wrong),
    ]
    with ur.engine(engine):
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
        layer.weight_hh_l0 = torch.nn.Parameter(wrong["weight_hh_l0"])
        with torch.no_grad(), ur.frozen(layer), pytest.raises(ValueError, match=message):
            layer(x)
        with pytest.raises(ValueError, match=message):
            ur.Stream(layer)(x)
        cell.bias_hh = torch.nn.Parameter(torch.ones(1))
        with pytest.raises(ValueError, match="GRUCell: the parameter bias_hh should have the shape"):
            cell(x[0])


@pytest.mark.slow
@pytest.mark.parametrize("make", [ur.LSTMCell, ur.GRUCell])
def test_cells_with_a_state_are_exported_with_a_dynamic_batch(make: Any) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = make(3, 4)

        def forward(self, x: Tensor) -> Any:
            state = self.cell(x[0])
            return self.cell(x[1], state)

    module, sizes = Loop().eval(), {"x": {1: torch.export.Dim("batch", max=64)}}
    exported = torch.export.export(module, (torch.randn(2, 2, 3),), dynamic_shapes=sizes).module()
    for batch in (1, 5):
        x = torch.randn(2, batch, 3)
        torch.testing.assert_close(exported(x), module(x))

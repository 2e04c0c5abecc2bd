"""Results of the native engine, compared with the reference engine and torch.nn."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from compare_engines import PackedLayer, assert_engines_agree, make_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import (
    LAYERS,
    NEEDS_COMPILER,
    TOLERANCE,
    assert_close,
    gradients,
    pair,
    tensors,
    use_threads,
)  # fmt: skip
from helpers.sampling import sample
from unrolled.engines import registry
from unrolled.engines.native.backend import BACKEND

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_threads_split_the_rows(kind: str, time: int) -> None:
    ours, theirs = pair(kind, 32, 64)
    x = torch.randn(time, 64, 32)
    with use_threads(2), torch.no_grad(), ur.engine("native"):
        assert_close(ours(x), theirs(x), TOLERANCE[x.dtype])


@pytest.mark.slow
@settings(max_examples=60)
@given(
    kind=st.sampled_from([*LAYERS, "mgu"]),
    sizes=st.tuples(st.integers(1, 40), st.integers(4, 70)),
    time=st.integers(1, 6),
    batch=st.integers(1, 20),
    bidirectional=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size(
    kind: str, sizes: tuple[int, int], time: int, batch: int, bidirectional: bool, dtype: torch.dtype
) -> None:
    layer = make_layer(kind, *sizes, bidirectional=bidirectional, dtype=dtype)
    assert_engines_agree(layer, torch.randn(time, batch, sizes[0], dtype=dtype).requires_grad_())


@pytest.mark.slow
@settings(max_examples=30)
@given(
    kind=st.sampled_from([*LAYERS, "mgu"]),
    hidden=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_packed_sequences(
    kind: str, hidden: int, lengths: list[int], threads: int, dtype: torch.dtype
) -> None:
    layer = make_layer(kind, 5, hidden + 4, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(max(lengths), len(lengths), 5, dtype=dtype).requires_grad_()
    with use_threads(threads):
        assert_engines_agree(PackedLayer(layer, lengths), x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LAYERS, "mgu"])
def test_bfloat16_is_at_least_as_accurate_as_the_reference(kind: str) -> None:
    layer = make_layer(kind, 9, 33, num_layers=2, dtype=torch.bfloat16)
    x = torch.randn(12, 5, 9, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    weights = [torch.randn_like(part) for part in tensors(exact(x.double()))]
    results = {}
    for engine in ("native", "reference"):
        with ur.engine(engine):
            grads = gradients(layer, x, None, [weight.bfloat16() for weight in weights])
            results[engine] = [*tensors(layer(x)), *grads]
    truth = [*tensors(exact(x.double())), *gradients(exact, x.double(), None, weights)]
    native, reference = (
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results[engine], truth, strict=True)]
        for engine in ("native", "reference")
    )
    assert all(a <= 1.1 * b + 2**-9 for a, b in zip(native, reference, strict=True)), (native, reference)


@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64]))
@pytest.mark.parametrize("kind", sample([*LAYERS, "mgu"], ["gru", "lstm-proj", "mgu"]))
def test_results_are_bit_identical(kind: str, dtype: torch.dtype) -> None:
    """A row's result doesn't depend on threads, the rest of the batch, or splits of the sequence."""
    layer = make_layer(kind, 9, 37, dtype=dtype)
    x = torch.randn(8, 23, 9, dtype=dtype)
    with torch.no_grad(), ur.engine("native"):
        whole, final = layer(x)
        for batch, row in ((1, 0), (1, 22), (5, 3), (6, 17), (7, 9), (12, 11)):
            part, _ = layer(x[:, row : row + batch])
            assert torch.equal(part, whole[:, row : row + batch])
        for split in (1, 3, 7):
            first, state = layer(x[:split])
            second, last = layer(x[split:], state)
            assert torch.equal(torch.cat([first, second]), whole)
            assert all(torch.equal(a, b) for a, b in zip(tensors(last), tensors(final), strict=True))
        for threads in (1, 2, 3):
            with use_threads(threads):
                assert torch.equal(layer(x)[0], whole)
                assert torch.equal(layer(x[:, 7:9])[0], whole[:, 7:9])


@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64]))
@pytest.mark.parametrize("kind", sample([*LAYERS, "mgu"], ["lstm-proj", "gru"]))
def test_bits_of_few_rows(kind: str, dtype: torch.dtype) -> None:
    """Calls of one or two steps with few rows don't pack the weights, forward and backward."""
    layer = make_layer(kind, 35, 41, dtype=dtype)
    x = torch.randn(2, 9, 35, dtype=dtype)
    with ur.engine("native"):
        state = tuple(part.detach() for part in tensors(layer(x)[1]))
        for steps in (1, 2):

            def run(rows: slice, steps: int = steps) -> list[torch.Tensor]:
                given = x[:steps, rows].clone().requires_grad_()
                parts = [part[:, rows].clone().requires_grad_() for part in state]
                results = tensors(layer(given, tuple(parts) if len(parts) > 1 else parts[0]))
                loss = sum((result * (k + 1)).sum() for k, result in enumerate(results))
                return [*results, *torch.autograd.grad(loss, [given, *parts])]

            whole = run(slice(None))
            for batch in (1, 2, 3, 4, 5):
                for part, all_rows in zip(run(slice(2, 2 + batch)), whole, strict=True):
                    assert torch.equal(part, all_rows[:, 2 : 2 + batch])


@pytest.mark.slow
def test_vector_functions_are_within_two_units() -> None:
    """exp, sigmoid and tanh of floats of every magnitude and sign, and of special values."""

    class Elementwise(ur.Cell):
        weight = ur.Param("hidden", "hidden", init=nn.init.zeros_)
        name: str = "exp"

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            functions = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
            return functions[self.name](x + linear(h, self.weight))

    bits = torch.arange(-(2**31), 2**31, 2**31 // 2**20 + 1, dtype=torch.int64).to(torch.int32)
    specials = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 88.72, -103.9, -87.4, 9.01]
    )
    x = torch.cat([bits.view(torch.float32), specials, torch.linspace(-110, 100, 50_000)])
    for name in ("exp", "sigmoid", "tanh"):
        layer = ur.Recurrent(Elementwise, 1, 1, name=name)
        with torch.no_grad(), ur.engine("native"):
            actual = layer(x.view(1, -1, 1))[0].flatten()
        truth = getattr(torch, name)(x.double())
        assert torch.equal(actual.isnan(), truth.isnan())
        rounded = truth.float()
        same = (actual == rounded) | truth.isnan()
        unit = torch.nextafter(rounded.abs(), torch.tensor(torch.inf)).double() - rounded.abs().double()
        error = ((actual.double() - truth).abs() / unit)[~same]
        assert not len(error) or error.max() <= 2, (name, error.max(), x[~same][error.argmax()])


def test_nan_and_infinity_propagate_as_in_torch() -> None:
    for kind in LAYERS:
        ours, theirs = pair(kind, 4, 20)
        x = torch.randn(5, 3, 4)
        x[2, 1, 0], x[1, 2, 3] = torch.nan, torch.inf
        with torch.no_grad(), ur.engine("native"):
            torch.testing.assert_close(ours(x)[0], theirs(x)[0], equal_nan=True)


def test_strided_inputs_empty_batches_and_frozen_parameters() -> None:
    layer = ur.GRU(4, 5, batch_first=True)
    x = torch.randn(6, 8, 8)[::2, ::2, ::2].requires_grad_()
    with ur.engine("native"):
        assert layer(torch.randn(0, 3, 4))[0].shape == (0, 3, 5)
        assert_engines_agree(layer, x)
        layer.weight_hh_l0.requires_grad_(False)
        layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None


def test_other_default_device() -> None:
    layer, x = ur.LSTM(6, 11), torch.randn(7, 3, 6)
    packed = nn.utils.rnn.pack_padded_sequence(x, [7, 4, 2])
    with torch.device("meta"):  # memory on this device would have no address
        results = layer(packed), layer(x)
        results[0][0].data.sum().backward()
        with torch.no_grad(), ur.frozen(layer):
            layer(x)
        ur.Stream(layer)(x)
    with ur.engine("reference"):
        torch.testing.assert_close((results[0][0].data, results[1]), (layer(packed)[0].data, layer(x)))


@pytest.mark.slow
def test_one_source_for_all_sizes() -> None:
    def source(*sizes: int) -> str:
        return registry.compiled(ur.cells.LSTM(*sizes), torch.float32).training.spec.source

    assert source(3, 8) == source(50, 21)
    for cell in (ur.cells.LSTM(3, 8), ur.cells.GRU(3, 8)):
        assert len({registry.compiled(cell, dtype).inference.spec.source for dtype in BACKEND.dtypes}) == 2


def test_layers_can_be_pickled_after_a_run() -> None:
    layer, x = ur.GRU(3, 4), torch.randn(2, 3)
    with ur.engine("native"):
        expected = layer(x)[0]
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], expected)

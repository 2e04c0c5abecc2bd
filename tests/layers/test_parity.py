"""Outputs, final states and all gradients compared with torch.nn, for all combinations of options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from helpers.layer_pairs import CELLS, LAYERS, TOLERANCE, assert_close, gradients, pair, tensors
from helpers.sampling import sample

FORMS = ["batched", "unbatched", "packed", "packed-unsorted"]


def random_input(
    form: str, time: int, batch: int, features: int, batch_first: bool, dtype: torch.dtype
) -> Any:
    if form == "unbatched":
        return torch.randn(time, features, dtype=dtype).requires_grad_()
    if form == "batched":
        shape = (batch, time, features) if batch_first else (time, batch, features)
        return torch.randn(shape, dtype=dtype).requires_grad_()
    lengths = [time, *torch.randint(1, time + 1, (batch - 1,)).tolist()]
    lengths = sorted(lengths, reverse=True) if form == "packed" else lengths[::-1]
    rows = [torch.randn(length, features, dtype=dtype) for length in lengths]
    packed = pack_sequence(rows, enforce_sorted=form == "packed")
    return PackedSequence(packed.data.requires_grad_(), *packed[1:])


def random_state(layer: Any, form: str, batch: int, dtype: torch.dtype) -> Any:
    count = layer.num_layers * (1 + layer.bidirectional)
    rows = () if form == "unbatched" else (batch,)
    h = torch.randn(count, *rows, layer.proj_size or layer.hidden_size, dtype=dtype).requires_grad_()
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(count, *rows, layer.hidden_size, dtype=dtype).requires_grad_()


FORMS_AND_DTYPES = [
    pytest.param(form, dtype, marks=() if (form, dtype) == ("packed", torch.float32) else pytest.mark.slow)
    for form, dtype in itertools.product(FORMS, (torch.float32, torch.float64))
]


@pytest.mark.parametrize(("form", "dtype"), FORMS_AND_DTYPES)
@pytest.mark.parametrize("kind", sample(LAYERS, ["gru"]))
@pytest.mark.slow
def test_all_combinations_of_options(kind: str, form: str, dtype: torch.dtype) -> None:
    grid = itertools.product([1, 3], [True, False], [True, False], [True, False], [True, False])
    for num_layers, bias, batch_first, bidirectional, with_state in grid:
        ours, theirs = pair(
            kind, 5, 7, num_layers=num_layers, bias=bias, batch_first=batch_first,
            bidirectional=bidirectional, dtype=dtype,
        )  # fmt: skip
        x = random_input(form, 6, 4, 5, batch_first, dtype)
        state = random_state(ours, form, 4, dtype) if with_state else None
        expected = theirs(x, state)
        assert_close(ours(x, state), expected, TOLERANCE[dtype])
        weights = [torch.randn_like(part) for part in tensors(expected)]
        actual_gradients = gradients(ours, x, state, weights)
        expected_gradients = gradients(theirs, x, state, weights)
        assert len(actual_gradients) == len(expected_gradients)
        assert_close(actual_gradients, expected_gradients, TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16(kind: str, form: str) -> None:
    ours, theirs = pair(kind, 5, 7, num_layers=2, bidirectional=True, dtype=torch.bfloat16)
    x = random_input(form, 6, 4, 5, False, torch.bfloat16)
    output, final = ours(x)
    assert all(part.dtype == torch.bfloat16 for part in tensors((output, final)))
    exact = theirs.double()(
        PackedSequence(x.data.double(), *x[1:]) if isinstance(x, PackedSequence) else x.double()
    )
    for a, b in zip(tensors((output, final)), tensors(exact), strict=True):
        assert_close(a.double(), b, 4 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_the_same_mask(kind: str, form: str) -> None:
    ours, theirs = pair(kind, 5, 7, num_layers=3, dropout=0.4, bidirectional=True)
    x = random_input(form, 6, 4, 5, False, torch.float32)
    torch.manual_seed(3)
    actual = ours(x)
    torch.manual_seed(3)
    expected = theirs(x)
    assert_close(actual, expected, 1e-5)
    assert_close(ours.eval()(x), theirs.eval()(x), 1e-5)
    assert not torch.equal(next(tensors(actual)), next(tensors(ours(x))))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    sizes=st.tuples(st.integers(1, 9), st.integers(4, 9), st.integers(1, 3)),
    time=st.integers(1, 7),
    batch=st.integers(1, 5),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    form=st.sampled_from(FORMS),
    with_state=st.booleans(),
)
def test_random_shapes(
    kind: str,
    sizes: tuple[int, int, int],
    time: int,
    batch: int,
    flags: tuple[bool, bool, bool],
    form: str,
    with_state: bool,
) -> None:
    bias, batch_first, bidirectional = flags
    ours, theirs = pair(
        kind, *sizes, bias=bias, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64
    )
    x = random_input(form, time, batch, sizes[0], batch_first, torch.float64)
    state = random_state(ours, form, batch, torch.float64) if with_state else None
    assert_close(ours(x, state), theirs(x, state), 1e-12)


@pytest.mark.parametrize("kind", sample(LAYERS))
def test_strided_input(kind: str) -> None:
    ours, theirs = pair(kind, 5, 7, batch_first=True, dtype=torch.float64)
    x = torch.randn(10, 8, 12, dtype=torch.float64)[::2, ::2, 1:11:2]
    assert not x.is_contiguous()
    assert_close(ours(x), theirs(x), 1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_ignore_padding(kind: str) -> None:
    ours, theirs = pair(kind, 5, 7, bidirectional=True)
    x = torch.randn(6, 3, 5)
    x[3:, 1] = torch.nan
    packed = pack_padded_sequence(x, torch.tensor([6, 3, 5]), enforce_sorted=False)
    actual = ours(packed)
    assert not any(part.isnan().any() for part in tensors(actual))
    assert_close(actual, theirs(packed), 1e-5)


@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64]))
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, dtype: torch.dtype) -> None:
    for batched, bias, with_state in itertools.product([True, False], repeat=3):
        ours, theirs = pair(kind, 5, 7, table=CELLS, bias=bias, dtype=dtype)
        rows = (4,) if batched else ()
        x = torch.randn(*rows, 5, dtype=dtype).requires_grad_()
        parts = [torch.randn(*rows, 7, dtype=dtype).requires_grad_() for _ in range(1 + (kind == "lstm"))]
        state: Any = (tuple(parts) if kind == "lstm" else parts[0]) if with_state else None
        expected = theirs(x, state)
        assert_close(ours(x, state), expected, TOLERANCE[dtype])
        weights = [torch.randn_like(part) for part in tensors(expected)]
        assert_close(
            gradients(ours, x, state, weights), gradients(theirs, x, state, weights), TOLERANCE[dtype]
        )

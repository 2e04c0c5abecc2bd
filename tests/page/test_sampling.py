"""Which part of a large trace a page contains, and how its values are encoded, sorted and averaged."""

from __future__ import annotations

import base64
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_helpers import Rare

import unrolled as ur
from unrolled.page.contents import page_data
from unrolled.page.sampling import PageSample, bin_means, encode_values, feature_order, unit_order


@settings(max_examples=30)
@given(length=st.integers(1, 60), limit=st.integers(1, 20_000), hidden=st.integers(1, 12))
def test_sample_stays_within_the_limit(length: int, limit: int, hidden: int) -> None:
    part = ur.trace(ur.RNN(2, hidden), torch.zeros(1, 1, 2)).layers[0]
    weights, per_step = hidden * (hidden + 4), 2 + 4 * hidden
    sample = PageSample.within(part, length, per_step, limit)
    assert sample.steps == sorted(set(sample.steps))
    assert sample.steps[0] == 0
    assert sample.steps[-1] == length - 1
    assert sample.complete == (sample.parameters and len(sample.steps) == length)
    used = weights * sample.parameters + per_step * len(sample.steps)
    assert used <= max(limit, per_step * min(2, length) + weights * (weights <= 0.8 * limit))
    if weights + per_step * length <= limit:
        assert sample.complete
    gaps = {b - a for a, b in zip(sample.steps, sample.steps[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spaced


def test_note_gives_the_reason_for_omitted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sampling", "layer_data"):
        monkeypatch.setattr(sys.modules[f"unrolled.page.{module}"], "MAX_STEPS", 6)
    t = ur.trace(ur.Recurrent(Rare, 2, 3), torch.zeros(7, 2))
    (note,) = page_data(t, 0, None, "numbers", None, 1_000_000)["notes"]
    assert note.startswith(
        "This page contains 6 of the 7 time steps of layer 0, forward, evenly spaced, "
        "because the maximum is 6 steps."
    )
    note, _ = page_data(t, 0, None, "numbers", None, 7)["notes"]
    assert note.startswith(
        "This page contains 2 of the 7 time steps of layer 0, forward, evenly spaced, "
        "because the trace is too large for a page."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_encoding_is_exact(dtype: torch.dtype) -> None:
    values = (100 * torch.randn(3, 4)).to(dtype)
    encoded = encode_values(values)
    decoded = np.frombuffer(base64.b64decode(encoded["data"]), "<f8" if encoded["float64"] else "<f4")
    assert torch.equal(torch.tensor(decoded).reshape(3, 4).to(dtype), values)


def test_similar_units_are_next_to_each_other() -> None:
    time = torch.linspace(0, 12, 80).unsqueeze(1)
    kinds = torch.randint(3, (30,))
    series = torch.stack([time.sin(), time.cos(), (2 * time).sin()])[kinds].squeeze(-1).T
    order = unit_order(series + 0.01 * torch.randn(80, 30))
    assert sorted(order) == list(range(30))
    runs = 1 + sum(int(kinds[a] != kinds[b]) for a, b in itertools.pairwise(order))
    assert runs <= 5  # the circle of angles may be cut within a kind; a random order has about twenty
    assert unit_order(torch.full((5, 4), math.nan)) == unit_order(torch.zeros(5, 4))
    assert feature_order([1, 0], 4) == [1, 0, 3, 2]
    assert feature_order([1, 0], 3) == [0, 1, 2]


def test_bins_are_means() -> None:
    values = torch.randn(600, 200, dtype=torch.float64)
    means, bin_steps, bin_features = bin_means(values)
    assert (bin_steps, bin_features) == (3, 3)
    assert means.shape == (200, 67)
    torch.testing.assert_close(means[7, 66], values[21:24, 198:].mean().float())
    random_state = torch.get_rng_state()
    unit_order(values)
    assert torch.equal(torch.get_rng_state(), random_state)

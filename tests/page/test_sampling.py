"""What of a large trace a page keeps, and the order of its units."""

from __future__ import annotations

import base64
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unrolled as ur
from unrolled.page.contents import contents
from unrolled.page.sampling import Kept, binned, packed, spread_order, unit_order


@given(length=st.integers(1, 60), room=st.integers(1, 20_000), hidden=st.integers(1, 12))
def test_no_more_than_there_is_room_for(length: int, room: int, hidden: int) -> None:
    part = ur.trace(ur.RNN(2, hidden), torch.zeros(1, 1, 2)).layers[0]
    kept = Kept.of(part, length, room)
    weights, width = hidden * (hidden + 4), 2 + 4 * hidden
    assert kept.steps == sorted(set(kept.steps))
    assert kept.steps[0] == 0
    assert kept.steps[-1] == length - 1
    assert kept.all == (kept.parameters and len(kept.steps) == length)
    used = weights * kept.parameters + width * len(kept.steps)
    assert used <= max(room, width * min(2, length) + weights * (weights <= 0.8 * room))
    if weights + width * length <= room:
        assert kept.all
    gaps = {b - a for a, b in zip(kept.steps, kept.steps[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread


def test_the_reason_why_steps_are_left_out_is_the_true_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kept", "contents"):
        monkeypatch.setattr(sys.modules[f"unrolled.page.{module}"], "STEPS", 6)
    t = ur.trace(ur.RNN(2, 3), torch.zeros(7, 2))
    (note,) = contents(t, 0, None, "numbers", None, 1_000_000)["notes"]
    assert note.startswith(
        "A page has 6 time steps at most: of the 7 time steps of layer 0, forward, 6 are kept"
    )
    note, _ = contents(t, 0, None, "numbers", None, 20)["notes"]
    assert note.startswith("Too large for a page: of the 7 time steps of layer 0, forward, 2 are kept")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_numbers_are_kept_to_the_last_bit(dtype: torch.dtype) -> None:
    values = (100 * torch.randn(3, 4)).to(dtype)
    found = packed(values)
    read = np.frombuffer(base64.b64decode(found["data"]), "<f8" if found["wide"] else "<f4")
    assert torch.equal(torch.tensor(read).reshape(3, 4).to(dtype), values)


def test_units_that_do_alike_stand_together() -> None:
    time = torch.linspace(0, 12, 80).unsqueeze(1)
    kinds = torch.randint(3, (30,))
    courses = torch.stack([time.sin(), time.cos(), (2 * time).sin()])[kinds].squeeze(-1).T
    order = unit_order(courses + 0.01 * torch.randn(80, 30))
    assert sorted(order) == list(range(30))
    runs = 1 + sum(int(kinds[a] != kinds[b]) for a, b in itertools.pairwise(order))
    assert runs <= 5  # a circle of angles may be cut within a kind; at random some twenty
    assert unit_order(torch.full((5, 4), math.nan)) == unit_order(torch.zeros(5, 4))
    assert spread_order([1, 0], 4) == [1, 0, 3, 2]
    assert spread_order([1, 0], 3) == [0, 1, 2]


def test_bins_are_means() -> None:
    grid = torch.randn(600, 200, dtype=torch.float64)
    means, tall, wide = binned(grid)
    assert (tall, wide) == (3, 3)
    assert means.shape == (200, 67)
    torch.testing.assert_close(means[7, 66], grid[21:24, 198:].mean().float())
    random = torch.get_rng_state()
    unit_order(grid)
    assert torch.equal(torch.get_rng_state(), random)

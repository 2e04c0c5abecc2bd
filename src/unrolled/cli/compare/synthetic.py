"""Tasks with synthetic data: adding and copy memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from unrolled.cli.compare.base import Task, cross_entropy_per_step

_TEST_SEED = 2**62  # seed of the test set; no run trains with it
_TEST_SEQUENCES = 1000
_SYMBOLS, _COPIED = 8, 10  # copy memory: kinds of symbols, and the number of symbols to repeat


def adding(length: int) -> Task:
    """Create the adding task: add two marked numbers of a sequence.

    The task is experiment 4 of Hochreiter & Schmidhuber (1997), with the setup of Arjovsky et al. (2016,
    arXiv:1511.06464): the numbers are between 0 and 1, and one is marked in each half of the sequence.

    Args:
        length: The sequence length.

    Raises:
        ValueError: If the sequence has fewer than two time steps.
    """
    if length < 2:
        raise ValueError(f"adding needs a --length of at least 2 to mark two numbers, got {length}")

    def sample(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.rand(length, batch, generator=generator)
        first = torch.randint(0, length // 2, (1, batch), generator=generator)
        second = torch.randint(length // 2, length, (1, batch), generator=generator)
        marks = torch.zeros(length, batch).scatter_(0, torch.cat([first, second]), 1.0)
        return torch.stack([numbers, marks], -1), (numbers * marks).sum(0).unsqueeze(1)

    test_set = _test_set(sample)
    mean = torch.ones_like(test_set[1])  # the mean of the sum of two numbers between 0 and 1
    baseline = "always predict 1", mse_loss(mean, test_set[1]).item()
    return Task(
        2, 1, False, sample, test_set, mse_loss, lambda output, target: mse_loss(output, target).item(),
        "mean squared error", False, baseline,
    )  # fmt: skip


def copy(length: int) -> Task:
    """Create the copy task: read ten symbols, wait, then repeat them.

    The task is from Arjovsky et al. (2016, arXiv:1511.06464). As there, the loss includes all steps. The
    score is the cross-entropy of the ten repeated symbols only.

    Args:
        length: The number of time steps between the last symbol and the signal to repeat them.
    """
    blank, signal = _SYMBOLS, _SYMBOLS + 1

    def sample(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(0, _SYMBOLS, (_COPIED, batch), generator=generator)
        codes = torch.full((length + 2 * _COPIED, batch), blank)
        codes[:_COPIED] = symbols
        codes[-_COPIED - 1] = signal
        target = torch.full_like(codes, blank)
        target[-_COPIED:] = symbols
        return torch.nn.functional.one_hot(codes, signal + 1).float(), target

    def score(output: Tensor, target: Tensor) -> float:
        return cross_entropy_per_step(output[-_COPIED:], target[-_COPIED:]).item()

    test_set = _test_set(sample)
    target = test_set[1]
    uniform = torch.full((*target.shape, _SYMBOLS + 1), -math.inf)
    uniform[..., :_SYMBOLS] = 0.0
    baseline = "all symbols equally likely (ln 8)", score(uniform, target)
    return Task(
        signal + 1, _SYMBOLS + 1, True, sample, test_set, cross_entropy_per_step, score,
        "nats per repeated symbol", False, baseline,
    )  # fmt: skip


def _test_set(sample: Callable[[int, Generator], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return sample(_TEST_SEQUENCES, Generator().manual_seed(_TEST_SEED))

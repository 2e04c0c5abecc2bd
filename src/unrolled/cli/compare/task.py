"""What a task is, and the two that are made of random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, mse_loss

_HELD_OUT = 2**62  # seed of what is held out: no run has it
_ROWS = 1000  # sequences that are held out
_SYMBOLS, _COPIED = 8, 10  # of copy memory: kinds, and how many are to be remembered


@dataclass(frozen=True)
class Task:
    """What cells are trained on: data, a loss, and a score with something to compare it with.

    Args:
        features: I of the input ``(T, B, I)``.
        outputs: K, the numbers that a linear map of the layer's output gives.
        every_step: whether after every step, ``(T, B, K)``, or after the last one, ``(B, K)``.
        sample: draws a batch of so many rows with a generator: input and target.
        held_out: input and target that nothing is trained on.
        loss: of an output and a target, a scalar; what is trained for.
        score: of the output and target that are held out.
        measure: what the score is, in words.
        higher: whether a higher score is better.
        baseline: what the score is compared with, in words, and its score.
    """

    features: int
    outputs: int
    every_step: bool
    sample: Callable[[int, Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    measure: str
    higher: bool
    baseline: tuple[str, float]


def adding(length: int) -> Task:
    """The sum of two marked numbers of a sequence (Hochreiter & Schmidhuber, 1997, experiment 4).

    As Arjovsky et al. (2016, arXiv:1511.06464) set it up: of numbers from 0 to 1 one in each half is marked.

    Args:
        length: time steps.

    Raises:
        ValueError: fewer than two time steps.
    """
    if length < 2:
        raise ValueError(f"adding needs a length of at least 2, to mark two numbers, got {length}")

    def sample(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.rand(length, rows, generator=generator)
        first = torch.randint(0, length // 2, (1, rows), generator=generator)
        second = torch.randint(length // 2, length, (1, rows), generator=generator)
        marks = torch.zeros(length, rows).scatter_(0, torch.cat([first, second]), 1.0)
        return torch.stack([numbers, marks], -1), (numbers * marks).sum(0).unsqueeze(1)

    held_out = _held_out(sample)
    mean = torch.ones_like(held_out[1])  # of two numbers from 0 to 1
    baseline = "always the mean, 1", mse_loss(mean, held_out[1]).item()
    return Task(
        2, 1, False, sample, held_out, mse_loss, lambda output, target: mse_loss(output, target).item(),
        "mean squared error", False, baseline,
    )  # fmt: skip


def copy(length: int) -> Task:
    """Ten symbols, a wait, then the same ten again (Arjovsky et al., 2016, arXiv:1511.06464).

    The loss is of all steps, as there; the score is the cross-entropy of the ten where they are to come back.

    Args:
        length: time steps between the last symbol and the sign to repeat them.
    """
    blank, sign = _SYMBOLS, _SYMBOLS + 1

    def sample(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(0, _SYMBOLS, (_COPIED, rows), generator=generator)
        codes = torch.full((length + 2 * _COPIED, rows), blank)
        codes[:_COPIED] = symbols
        codes[-_COPIED - 1] = sign
        target = torch.full_like(codes, blank)
        target[-_COPIED:] = symbols
        return torch.nn.functional.one_hot(codes, sign + 1).float(), target

    def score(output: Tensor, target: Tensor) -> float:
        return steps_loss(output[-_COPIED:], target[-_COPIED:]).item()

    held_out = _held_out(sample)
    target = held_out[1]
    even = torch.full((*target.shape, _SYMBOLS + 1), -math.inf)
    even[..., :_SYMBOLS] = 0.0
    baseline = "any symbol as likely, ln 8", score(even, target)
    return Task(
        sign + 1, _SYMBOLS + 1, True, sample, held_out, steps_loss, score,
        "nats per symbol to repeat", False, baseline,
    )  # fmt: skip


def steps_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of scores ``(T, B, K)`` and classes ``(T, B)``."""
    return cross_entropy(output.flatten(0, 1), target.flatten())


def drawn_from(inputs: Tensor, targets: Tensor) -> Callable[[int, Generator], tuple[Tensor, Tensor]]:
    """Batches of rows that are drawn at random, of inputs ``(T, N, I)`` and targets ``(N, …)``."""

    def sample(rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(targets), (rows,), generator=generator)
        return inputs[:, chosen], targets[chosen]

    return sample


def _held_out(sample: Callable[[int, Generator], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return sample(_ROWS, Generator().manual_seed(_HELD_OUT))

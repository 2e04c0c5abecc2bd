"""What a task is: data, a loss, a score and a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Task:
    """A task for training cells.

    Args:
        features: The number of input features. Inputs have shape ``(time, batch, features)``.
        outputs: The number of values that the linear layer on top of the recurrent layer returns.
        every_step: Whether there is an output at every step, of shape ``(time, batch, outputs)``, or only
            after the last one, of shape ``(batch, outputs)``.
        sample: Draws a batch with a given number of sequences: inputs and targets.
        held_out: Inputs and targets of the test set.
        loss: The training loss of outputs and targets, a scalar.
        score: The score of outputs and targets on the test set.
        measure: What the score measures, in words.
        higher_is_better: Whether a higher score is better.
        baseline: The description of a simple method, and its score.
    """

    features: int
    outputs: int
    every_step: bool
    sample: Callable[[int, Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    measure: str
    higher_is_better: bool
    baseline: tuple[str, float]


def cross_entropy_per_step(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over all steps.

    Args:
        output: Logits of shape ``(time, batch, classes)``.
        target: Class indices of shape ``(time, batch)``.
    """
    return cross_entropy(output.flatten(0, 1), target.flatten())


def sample_from(inputs: Tensor, targets: Tensor) -> Callable[[int, Generator], tuple[Tensor, Tensor]]:
    """Return a function that draws random batches.

    Args:
        inputs: Sequences of shape ``(time, sequences, features)``.
        targets: Targets of shape ``(sequences, ...)``.
    """

    def sample(batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(0, len(targets), (batch,), generator=generator)
        return inputs[:, index], targets[index]

    return sample

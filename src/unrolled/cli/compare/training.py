"""One cell on one task with one seed: the size that the budget allows, the training, what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.cli.compare.task import Task
from unrolled.layers.recurrent import Recurrent

_POINTS = 20  # of the curve of a run
_GAP = 1024  # sizes in a row that a cell may refuse, such as those below that of its projection
_LAST_RATE = 0.01  # of the learning rate, at the end


@dataclass(frozen=True)
class Budget:
    """What every cell is given alike.

    Args:
        parameters: how many to come near to, of the layer and the linear map of its output.
        steps: of the optimiser.
        batch: sequences in each.
        rate: Adam's learning rate at the start; it falls to a hundredth along a cosine.
        layers: on top of each other.
        threads: of torch, on which the last bits hang.
    """

    parameters: int
    steps: int
    batch: int
    rate: float
    layers: int
    threads: int = 1


@dataclass(frozen=True)
class Contender:
    """A cell with its options."""

    cell: type[Cell]
    options: dict[str, Any] = field(default_factory=dict)

    def parameters(self, task: Task, units: int, layers: int) -> int:
        """How many a model of so many units has; a ValueError where the cell can't have that size."""
        total, features = 0, task.features
        for _ in range(layers):
            made = self.cell(features, units, **self.options)
            total += sum(map(math.prod, made.shapes().values()))
            features = next(iter(made.state_sizes().values()))
        return total + (features + 1) * task.outputs


class Model(nn.Module):
    """Recurrent layers of any cell, and a linear map of their output."""

    def __init__(self, contender: Contender, task: Task, units: int, layers: int) -> None:
        super().__init__()
        self.layer = Recurrent(contender.cell, task.features, units, layers, **contender.options)
        sizes = contender.cell(task.features, units, **contender.options).state_sizes()
        self.head = nn.Linear(next(iter(sizes.values())), task.outputs)
        self._every_step = task.every_step

    def forward(self, x: Tensor) -> Tensor:
        """``(T, B, I)`` to ``(T, B, K)``, or to ``(B, K)`` after the last step."""
        output = self.layer(x)[0]
        scores: Tensor = self.head(output if self._every_step else output[-1])
        return scores


def units_for(contender: Contender, task: Task, budget: Budget) -> int:
    """The number of units with which a model's parameters come nearest to the budget.

    Raises:
        ValueError: with as few units as the cell can have it is beyond the budget already, or more units
            bring no more parameters.
    """

    def at(units: int) -> tuple[int, int]:
        """The first size from here on that the cell can have, and its parameters."""
        for size in range(units, units + _GAP):
            try:
                return size, contender.parameters(task, size, budget.layers)
            except ValueError as error:
                why = error
        raise why

    name = contender.cell.__name__
    below = at(1)
    if below[1] > budget.parameters:
        raise ValueError(
            f"--parameters {budget.parameters} are too few for {name}, which has {below[1]} with "
            f"{below[0]} unit{'s' * (below[0] > 1)}"
        )
    above = at(2 * below[0])
    while above[1] < budget.parameters:
        below, above = above, at(2 * above[0])
        if above[1] <= below[1]:
            raise ValueError(f"{name} has {above[1]} parameters, however many units: no budget compares it")
    first, last = below[0], above[0]
    while last - first > 1:
        middle = (first + last) // 2
        found = at(middle)
        if found[1] < budget.parameters:
            first, below = found[0], found
        else:
            last, above = middle, found
    return min(below, above, key=lambda found: abs(found[1] - budget.parameters))[0]


def train(
    contender: Contender, task: Task, budget: Budget, seed: int, told: Callable[[], Any]
) -> dict[str, Any]:
    """Train a cell once; torch's random state and number of threads stay as they were.

    The seed draws the parameters and, apart from them, the batches: the same for every cell.

    Args:
        contender: the cell.
        task: what it is trained on.
        budget: with what.
        seed: of the draws.
        told: is called after each step.

    Returns:
        ``units`` and ``parameters`` of the model; ``curve``: pairs of a step and the score after it;
        ``score``: the last of these; ``diverged``: None, or the step at which loss or score was no finite
        number any more, where training ends and ``score`` is None.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        torch.set_num_threads(budget.threads)
        try:
            return _train(contender, task, budget, torch.Generator().manual_seed(seed), told)
        finally:
            torch.set_num_threads(before)


def _train(
    contender: Contender,
    task: Task,
    budget: Budget,
    batches: torch.Generator,
    told: Callable[[], Any],
) -> dict[str, Any]:
    model = Model(contender, task, units_for(contender, task, budget), budget.layers)
    parameters = list(model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=budget.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, budget.steps, budget.rate * _LAST_RATE)
    curve: list[tuple[int, float]] = []
    diverged = None
    for step in range(1, budget.steps + 1):
        x, target = task.sample(budget.batch, batches)
        loss = task.loss(model(x), target)
        value = loss.item()
        if math.isfinite(value):
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            if step == budget.steps or step % max(1, budget.steps // _POINTS) == 0:
                value = _score(model, task)
                curve.append((step, value))
        if not math.isfinite(value):
            diverged = step
            curve = [point for point in curve if math.isfinite(point[1])]
            break
        told()
    return {
        "units": model.layer.hidden_size,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "curve": curve,
        "score": None if diverged else curve[-1][1],
        "diverged": diverged,
    }


def _score(model: Model, task: Task) -> float:
    model.eval()
    with torch.no_grad():
        output = model(task.held_out[0])
    model.train()
    return task.score(output, task.held_out[1]) if output.isfinite().all() else math.nan

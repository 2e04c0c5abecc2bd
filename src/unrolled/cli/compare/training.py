"""Train one cell on one task with one seed, with the hidden size that fits the parameter budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.cli.compare.base import Task
from unrolled.layers.recurrent import Recurrent

_CURVE_POINTS = 20
_MAX_GAP = 1024  # consecutive hidden sizes that a cell may reject, such as those below its projection size
_FINAL_RATE = 0.01  # final learning rate, relative to the initial one


@dataclass(frozen=True)
class Budget:
    """The training budget, the same for all cells.

    Args:
        parameters: The number of parameters to aim for, of the recurrent layers and the linear layer.
        steps: The number of optimizer steps.
        batch: The batch size.
        rate: The initial learning rate of Adam. It falls to a hundredth along a cosine.
        layers: The number of stacked layers.
        threads: The number of threads of torch. The last bits of the result depend on it.
    """

    parameters: int
    steps: int
    batch: int
    rate: float
    layers: int
    threads: int = 1


@dataclass(frozen=True)
class CellConfig:
    """A cell and its options."""

    cell: type[Cell]
    options: dict[str, Any] = field(default_factory=dict)

    def count_parameters(self, task: Task, units: int, layers: int) -> int:
        """Count the parameters of a model with this hidden size.

        Raises:
            ValueError: If the cell can't have this hidden size.
        """
        total, features = 0, task.features
        for _ in range(layers):
            cell = self.cell(features, units, **self.options)
            total += sum(map(math.prod, cell.shapes().values()))
            features = next(iter(cell.state_sizes().values()))
        return total + (features + 1) * task.outputs


class Model(nn.Module):
    """Recurrent layers with any cell, and a linear layer on their output."""

    def __init__(self, config: CellConfig, task: Task, units: int, layers: int) -> None:
        super().__init__()
        self.layer = Recurrent(config.cell, task.features, units, layers, **config.options)
        sizes = config.cell(task.features, units, **config.options).state_sizes()
        self.head = nn.Linear(next(iter(sizes.values())), task.outputs)
        self._every_step = task.every_step

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(time, batch, outputs)``, or ``(batch, outputs)`` after the last step."""
        output = self.layer(x)[0]
        scores: Tensor = self.head(output if self._every_step else output[-1])
        return scores


def units_for(config: CellConfig, task: Task, budget: Budget) -> int:
    """Find the hidden size that brings a model closest to the number of parameters in the budget.

    Raises:
        ValueError: If the smallest hidden size exceeds the budget, or if the number of parameters doesn't
            grow with the hidden size.
    """

    def next_size(units: int) -> tuple[int, int]:
        """Return the first hidden size from `units` that the cell accepts, and its number of parameters."""
        for size in range(units, units + _MAX_GAP):
            try:
                return size, config.count_parameters(task, size, budget.layers)
            except ValueError as error:
                last_error = error
        raise last_error

    name = config.cell.__name__
    below = next_size(1)
    if below[1] > budget.parameters:
        raise ValueError(
            f"--parameters {budget.parameters} is too small for {name}: a model with {below[0]} "
            f"unit{'s' * (below[0] > 1)} has {below[1]} parameters"
        )
    above = next_size(2 * below[0])
    while above[1] < budget.parameters:
        below, above = above, next_size(2 * above[0])
        if above[1] <= below[1]:
            raise ValueError(
                f"{name} can't reach --parameters {budget.parameters}: it has {above[1]} parameters for "
                "every hidden size"
            )
    first, last = below[0], above[0]
    while last - first > 1:
        middle = (first + last) // 2
        candidate = next_size(middle)
        if candidate[1] < budget.parameters:
            first, below = candidate[0], candidate
        else:
            last, above = middle, candidate
    return min(below, above, key=lambda candidate: abs(candidate[1] - budget.parameters))[0]


def train(
    config: CellConfig, task: Task, budget: Budget, seed: int, on_step: Callable[[], Any]
) -> dict[str, Any]:
    """Train a cell once. torch's random state and number of threads are restored afterwards.

    The seed determines the parameters and, separately, the batches, which are the same for every cell.

    Args:
        config: The cell and its options.
        task: The task to train on.
        budget: The training budget.
        seed: The random seed.
        on_step: Is called after each step.

    Returns:
        A dictionary with the ``units`` and ``parameters`` of the model, the ``curve`` as pairs of a step and
        the score after it, the last ``score``, and ``diverged``. ``diverged`` is None, or the step at which
        the loss or the score became infinite or NaN. Training stops there, and ``score`` is None.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        torch.set_num_threads(budget.threads)
        try:
            return _train(config, task, budget, torch.Generator().manual_seed(seed), on_step)
        finally:
            torch.set_num_threads(threads)


def _train(
    config: CellConfig,
    task: Task,
    budget: Budget,
    batch_generator: torch.Generator,
    on_step: Callable[[], Any],
) -> dict[str, Any]:
    model = Model(config, task, units_for(config, task, budget), budget.layers)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=budget.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps, budget.rate * _FINAL_RATE)
    curve: list[tuple[int, float]] = []
    diverged = None
    for step in range(1, budget.steps + 1):
        x, target = task.sample(budget.batch, batch_generator)
        loss = task.loss(model(x), target)
        value = loss.item()
        if math.isfinite(value):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step == budget.steps or step % max(1, budget.steps // _CURVE_POINTS) == 0:
                value = _score(model, task)
                curve.append((step, value))
        if not math.isfinite(value):
            diverged = step
            curve = [point for point in curve if math.isfinite(point[1])]
            break
        on_step()
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

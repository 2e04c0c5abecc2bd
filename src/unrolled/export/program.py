"""A model as a list of stages: steps of cells, each of which reads and writes values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import rounds_activations

# How far outputs may differ if sums are rounded in another way, relative to the largest output: far above
# rounding, far below another formula. In int8, a value may also be rounded to the next whole number.
_TOLERANCE, _TOLERANCE_INT8 = 1e-4, 0.05


def largest(values: Tensor) -> float:
    """Return the largest magnitude of finite values, at least 1: what a difference is compared with."""
    return max(1.0, float(torch.where(values.isfinite(), values, 0).abs().max()))


@dataclass(eq=False)
class Value:
    """Numbers of each time step.

    Attributes:
        width: How many.
    """

    width: int


@dataclass(eq=False)
class Stage:
    """The step of a cell.

    Attributes:
        name: Its name in the model, for messages.
        cell: The cell, bound to its parameters.
        inputs: What it reads, side by side.
        output: What it writes.
        column: First column of the output that it writes.
        reverse: Whether it runs from the last time step to the first.
        has_state: Whether it reads its state. If not, it is a function of its inputs.
        initial: Its states before the first step.
    """

    name: str
    cell: Cell
    inputs: list[Value]
    output: Value
    column: int = 0
    reverse: bool = False
    has_state: bool = True
    initial: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.initial:
            self.initial = [torch.zeros(size) for size in self.cell.state_sizes().values()]

    def run(self, x: Tensor) -> Tensor:
        """Return its output for a sequence, ``(time, input)``, computed by torch."""
        states = [state.unsqueeze(0) for state in self.initial]
        outputs = []
        for row in reversed(x) if self.reverse else x:
            new = self.cell.step(row.unsqueeze(0), *states)
            states = list(new) if isinstance(new, tuple) else [new]
            outputs.append(states[0])
        return torch.cat(outputs[::-1] if self.reverse else outputs)


@dataclass(eq=False)
class Lookup:
    """Rows of a table, chosen by the model's input: an embedding.

    Attributes:
        table: The table, ``(rows, width)``.
        output: What it writes.
    """

    table: Tensor
    output: Value


@dataclass
class Program:
    """A model.

    Attributes:
        input: Its input. If there is a lookup, one whole number.
        output: Its output.
        stages: Its stages, in order.
        lookup: The embedding of its input, if there is one.
    """

    input: Value
    output: Value
    stages: list[Stage]
    lookup: Lookup | None = None

    @property
    def bidirectional(self) -> bool:
        """Whether a stage runs from the last time step to the first."""
        return any(stage.reverse for stage in self.stages)

    @property
    def tolerance(self) -> float:
        """The difference between results on two processors that counts as equal, for outputs up to 1."""
        has_int8 = any(rounds_activations(stage.cell) for stage in self.stages)
        return _TOLERANCE_INT8 if has_int8 else _TOLERANCE

    def run(self, x: Tensor) -> Tensor:
        """Return the output for a sequence, computed by torch stage by stage.

        Args:
            x: ``(time, input)``, or whole numbers ``(time,)`` for a lookup.
        """
        values = {self.input: x}
        if self.lookup is not None:
            values[self.lookup.output] = self.lookup.table[x]
        with torch.no_grad():
            for stage in self.stages:
                inputs = torch.cat([values[value] for value in stage.inputs], 1)
                if stage.output not in values:
                    values[stage.output] = torch.empty(len(inputs), stage.output.width)
                result = stage.run(inputs)
                values[stage.output][:, stage.column : stage.column + result.shape[1]] = result
        return values[self.output]

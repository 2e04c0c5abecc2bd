"""The directions of a layer: how their tensors and results are grouped in flat lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.threads import thread_count

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class DirectionSpec:
    """A cell that runs over a sequence in one direction, without its tensors.

    Attributes:
        compiled: The compiled loops of the cell.
        cell: The cell, bound to its parameters.
        stateful: Whether initial states are given. If not, they are zeros.
        reverse: Whether it runs from the last time step to the first.
    """

    compiled: CompiledCell
    cell: Cell
    stateful: bool
    reverse: bool

    @property
    def state_count(self) -> int:
        """The number of initial states that are given."""
        return len(self.cell.state) if self.stateful else 0

    @property
    def extra_input_count(self) -> int:
        """1 if wrappers read features in addition to x, else 0."""
        return int(self.cell.features > self.cell.input)

    @property
    def tensor_count(self) -> int:
        """The number of tensors: initial states, parameters and extra inputs."""
        return self.state_count + len(self.cell.shapes()) + self.extra_input_count


def threads_per_direction(directions: Sequence[object]) -> int:
    """Return the number of threads for each direction: one each if two directions share two threads."""
    threads = thread_count()
    return 1 if len(directions) == 2 and threads == 2 else threads


def split_by_direction(
    specs: Sequence[DirectionSpec], tensors: Sequence[Tensor]
) -> list[tuple[States | None, list[Tensor]]]:
    """Return for each direction its initial states, and its parameters followed by its extra inputs."""
    directions, offset = [], 0
    for spec in specs:
        part = tensors[offset : offset + spec.tensor_count]
        offset += spec.tensor_count
        states = tuple(part[: spec.state_count]) if spec.stateful else None
        directions.append((states, list(part[spec.state_count :])))
    return directions


def group_by_direction(
    flat: Sequence[Any], specs: Sequence[DirectionSpec]
) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return for each direction its output and final states, or their gradients."""
    directions, offset = [], 0
    for spec in specs:
        count = len(spec.cell.state)
        directions.append((flat[offset], tuple(flat[offset + 1 : offset + 1 + count])))
        offset += 1 + count
    return directions

"""Where the rows of each time step lie, and those of the step before and of the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Steps in a row, each with as many rows as are left.

    Attributes:
        steps: how many.
        batch: the rows of the first step, the most.
        starts: int64, where each step begins and the last one ends; None where all have as many rows.
    """

    steps: int
    batch: int
    starts: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, sizes: list[int] | None) -> Layout:
        """That of ``(time, batch, features)``, or with ``sizes`` of ``(sum of sizes, features)``."""
        if sizes is None:
            steps, batch, _ = x.shape
            return _regular(steps, batch)
        return cls(len(sizes), sizes[0], torch.tensor([0, *sizes], device="cpu").cumsum(0))

    @cached_property
    def rows(self) -> int:
        """The rows of all steps."""
        return self.steps * self.batch if self.starts is None else int(self.starts[-1])

    def before(self, state: Tensor, initial: Tensor | None, back: bool) -> ShiftedState:
        """The values before each step, from those after each, ``(rows, width)``, and the initial ones."""
        if self.starts is None:
            return ShiftedState(state, initial, self.batch, back)
        return ShiftedState(state, initial, self.batch, back, self._before_back if back else self._before)

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """The step and the row of the batch of each row."""
        assert self.starts is not None
        step = torch.repeat_interleave(torch.arange(self.steps, device="cpu"), self.starts.diff())
        return step, torch.arange(self.rows, device="cpu") - self.starts[step]

    @cached_property
    def _before(self) -> Tensor:
        assert self.starts is not None
        step, row = self._place
        return torch.where(step == 0, row, self.batch + self.starts[step - 1] + row)

    @cached_property
    def _before_back(self) -> Tensor:
        assert self.starts is not None
        step, row = self._place
        ends = torch.cat([self.starts, self.starts[-1:]])
        there = row < ends[step + 2] - ends[step + 1]  # it has a step after this one
        return torch.where(there, self.batch + ends[step + 1] + row, row)


@lru_cache(maxsize=1000)
def _regular(steps: int, batch: int) -> Layout:
    return Layout(steps, batch)


@dataclass(frozen=True)
class ShiftedState:
    """A state before each step: the one after each step, moved by one, and the initial one (None: zeros).

    Where not all steps have as many rows, ``places`` says where each row is among the initial ones and those
    after each step. The values may be computed after this is made: it holds where they will be.
    """

    state: Tensor
    initial: Tensor | None
    batch: int
    back: bool
    places: Tensor | None = None

    def first(self) -> Tensor:
        """The initial one."""
        if self.initial is not None:
            return self.initial
        return self.state.new_zeros(self.batch, self.state.shape[1])

    def whole(self) -> Tensor:
        """All of it as one tensor."""
        first = self.first()
        if self.places is not None:
            return torch.cat((first, self.state)).index_select(0, self.places)
        kept = len(self.state) - self.batch
        if self.back:
            return torch.cat((self.state[self.batch :], first))
        return torch.cat((first, self.state[:kept]))

    def parts(self, rows: int) -> Iterator[tuple[Tensor, int, int, int]]:
        """A tensor, the row of all steps where it begins, its own first row, and how many.

        Initial zeros are left out.
        """
        if self.places is not None:
            yield self.whole(), 0, 0, rows
            return
        many = rows - self.batch
        if self.initial is not None:
            yield self.initial, many if self.back else 0, 0, self.batch
        if many:
            yield self.state, 0 if self.back else self.batch, self.batch if self.back else 0, many


def whole(value: Any) -> Any:
    """A value as one tensor, if it is a state before each step."""
    return value.whole() if isinstance(value, ShiftedState) else value

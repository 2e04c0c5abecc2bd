"""Where the rows of each time step lie, and those of the step before and of the last one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Steps in a row, each with as many rows as are left.

    A state is kept as ``(rows + initial rows, width)``: the initial one's rows first, or last where time
    runs back.

    Attributes:
        steps: how many.
        batch: the rows of the first step.
        starts: int64, where each step begins and the last one ends; None where all have as many rows.
    """

    steps: int
    batch: int
    starts: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, sizes: list[int] | None) -> Layout:
        """That of ``(time, batch, features)``, or with ``sizes`` of ``(sum of sizes, features)``."""
        if sizes is None:
            return cls(x.shape[0], x.shape[1])
        return cls(len(sizes), sizes[0], torch.tensor([0, *sizes]).cumsum(0))

    @property
    def rows(self) -> int:
        """The rows of all steps."""
        return self.steps * self.batch if self.starts is None else int(self.starts[-1])

    def after(self, state: Tensor, back: bool) -> Tensor:
        """The values after each step."""
        return state[: self.rows] if back else state[self.batch :]

    def before(self, state: Tensor, back: bool) -> Tensor:
        """The values before each step."""
        if self.starts is None:
            return state[self.batch :] if back else state[: self.rows]
        return state.index_select(0, self._before_back if back else self._before)

    def last(self, state: Tensor, back: bool) -> Tensor:
        """The values after each row's last step."""
        if back:
            return state[: self.batch]
        return state[self.rows :] if self.starts is None else state.index_select(0, self._last)

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """The step and the row of the batch of each row."""
        assert self.starts is not None
        step = torch.repeat_interleave(torch.arange(self.steps), self.starts.diff())
        return step, torch.arange(self.rows) - self.starts[step]

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
        return torch.where(there, ends[step + 1] + row, self.rows + row)

    @cached_property
    def _last(self) -> Tensor:
        assert self.starts is not None
        length = (self.starts.diff().unsqueeze(1) > torch.arange(self.batch)).sum(0)
        return self.batch + self.starts[length - 1] + torch.arange(self.batch)

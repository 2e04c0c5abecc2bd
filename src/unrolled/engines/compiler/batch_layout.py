"""Memory layout of the rows of all time steps, and states shifted by one step without a copy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.fork_safety import lazy_property


@dataclass(frozen=True)
class Layout:
    """Rows of all time steps, one step after another; later steps may have fewer rows.

    Attributes:
        steps: Number of time steps.
        batch: Number of rows of the first step, which has the most.
        starts: int64, ``(steps + 1,)``: the first row of each step, and the total number of rows. None if all
            steps have the same number of rows.
    """

    steps: int
    batch: int
    starts: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, sizes: list[int] | None) -> Layout:
        """Return the layout of ``(time, batch, features)``, or of packed ``(sum of sizes, features)``.

        Raises:
            ValueError: If the sizes don't fit the number of rows.
        """
        if sizes is None:
            steps, batch, _ = x.shape
            return _regular(steps, batch)
        error = batch_sizes_error(sizes, len(x))
        if error:
            raise ValueError(error)
        return cls(len(sizes), sizes[0], torch.tensor([0, *sizes], device="cpu").cumsum(0))

    @lazy_property
    def rows(self) -> int:
        """Number of rows of all steps together."""
        return self.steps * self.batch if self.starts is None else int(self.starts[-1])

    def on_device(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return :attr:`starts`, and the number of steps of each row, on a device. None for a regular layout.

        They are copied once, without waiting for the device.
        """
        if self.starts is None:
            return None, None
        cached = self._copies.get(device)
        if cached is None:
            counts = self.starts.diff().flip(0)
            rows = torch.arange(self.batch, device="cpu")
            lengths = self.steps - torch.searchsorted(counts, rows, right=True)
            copies = [values.to(device, non_blocking=True) for values in (self.starts, lengths)]
            cached = self._copies[device] = copies[0], copies[1]
        return cached

    @lazy_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def shift(self, state: Tensor, initial: Tensor | None, reverse: bool) -> ShiftedState:
        """Return the state before each step.

        Args:
            state: State after each step, ``(rows, width)``.
            initial: State before the first step, ``(batch, width)``; None means zeros.
            reverse: Whether the loop runs from the last time step to the first.
        """
        if self.starts is None:
            return ShiftedState(state, initial, self.batch, reverse)
        indices = self._indices_before_reverse if reverse else self._indices_before
        return ShiftedState(state, initial, self.batch, reverse, indices)

    @lazy_property
    def _step_and_batch_index(self) -> tuple[Tensor, Tensor]:
        """For each row, its time step and its index in the batch."""
        assert self.starts is not None
        step = torch.repeat_interleave(torch.arange(self.steps, device="cpu"), self.starts.diff())
        return step, torch.arange(self.rows, device="cpu") - self.starts[step]

    @lazy_property
    def _indices_before(self) -> Tensor:
        """For each row, where its previous state is in ``cat((initial, state))``."""
        assert self.starts is not None
        step, row = self._step_and_batch_index
        return torch.where(step == 0, row, self.batch + self.starts[step - 1] + row)

    @lazy_property
    def _indices_before_reverse(self) -> Tensor:
        """The same for a loop from the last time step to the first."""
        assert self.starts is not None
        step, row = self._step_and_batch_index
        ends = torch.cat([self.starts, self.starts[-1:]])
        has_next_step = row < ends[step + 2] - ends[step + 1]
        return torch.where(has_next_step, self.batch + ends[step + 1] + row, row)


def batch_sizes_error(sizes: list[int], rows: int) -> str:
    """Return what is wrong with the batch sizes of packed data with this number of rows, "" if nothing is."""
    if sizes and sizes[-1] > 0 and sum(sizes) == rows and sizes == sorted(sizes, reverse=True):
        return ""
    return (
        "batch_sizes of a packed sequence should be positive, never grow over time, and add up to the "
        f"{rows} rows of its data, got {reprlib.repr(sizes)}: create it with pack_padded_sequence or "
        "pack_sequence"
    )


@lru_cache(maxsize=1000)
def _regular(steps: int, batch: int) -> Layout:
    return Layout(steps, batch)


@dataclass(frozen=True)
class ShiftedState:
    """A state before each step, stored as the state after each step and the initial state.

    It refers to ``state`` without copying it, so ``state`` may be filled in later.

    Attributes:
        state: State after each step, ``(rows, width)``.
        initial: State before the first step, ``(batch, width)``; None means zeros.
        batch: Number of rows of the first step.
        reverse: Whether the loop runs from the last time step to the first.
        row_indices: For each row, the index of its previous state in ``cat((initial, state))``. None if all
            steps have the same number of rows.
    """

    state: Tensor
    initial: Tensor | None
    batch: int
    reverse: bool
    row_indices: Tensor | None = None

    def initial_or_zeros(self) -> Tensor:
        """Return the initial state as a tensor."""
        if self.initial is not None:
            return self.initial
        return self.state.new_zeros(self.batch, self.state.shape[1])

    def materialize(self) -> Tensor:
        """Copy the state before each step into one tensor ``(rows, width)``."""
        initial = self.initial_or_zeros()
        if self.row_indices is not None:
            indices = self.row_indices.to(self.state.device, non_blocking=True)
            return torch.cat((initial, self.state)).index_select(0, indices)
        others = len(self.state) - self.batch
        if self.reverse:
            return torch.cat((self.state.narrow(0, self.batch, others), initial))
        return torch.cat((initial, self.state.narrow(0, 0, others)))

    def segments(self, rows: int) -> Iterator[tuple[Tensor, int, int, int]]:
        """Yield contiguous segments. An initial state of zeros is one of them, because 0 · NaN is NaN.

        Args:
            rows: Number of rows of all steps together.

        Yields:
            A tensor, the segment's first row among all rows, its first row in the tensor, and its length.
        """
        if self.row_indices is not None:
            yield self.materialize(), 0, 0, rows
            return
        rows_of_state = rows - self.batch
        yield self.initial_or_zeros(), rows_of_state if self.reverse else 0, 0, self.batch
        if rows_of_state:
            if self.reverse:
                yield self.state, 0, self.batch, rows_of_state
            else:
                yield self.state, self.batch, 0, rows_of_state


def materialize(value: Any) -> Any:
    """Return a :class:`ShiftedState` as one tensor, and any other value unchanged."""
    return value.materialize() if isinstance(value, ShiftedState) else value

"""Which rows, time steps, quantities and units a trace keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell
from unrolled.engines.fork_safety import lazy_property
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors
from unrolled.tracing.indexing import as_int, normalize_index
from unrolled.tracing.step_recorder import StepRecorder


@dataclass(frozen=True)
class TraceFilter:
    """What to keep of every call, as passed to :func:`unrolled.record`. None keeps everything.

    Attributes:
        steps, rows, units: A slice or a tuple of integers.
        names: Names of quantities; ``"x"`` is the input.
    """

    steps: Any = None
    rows: Any = None
    names: tuple[str, ...] | None = None
    units: Any = None

    @classmethod
    def from_arguments(cls, steps: Any, rows: Any, names: Iterable[str] | None, units: Any) -> TraceFilter:
        """Check the arguments as far as possible without a call, and create a filter.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument selects nothing.
        """
        if names is not None:
            names = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"names must be a list of quantities, such as ['h'], got {names!r}")
        steps, rows, units = (
            _parse_indices(what, value)
            for what, value in (("steps", steps), ("rows", rows), ("units", units))
        )
        return cls(steps, rows, names, units)

    def selection(self, time: int, hidden: int) -> Selection:
        """Return what to keep of a call, all rows included.

        Args:
            time: Number of time steps of the call.
            hidden: Hidden size of the layer.

        Raises:
            IndexError: If a step or unit is out of range.
            ValueError: If nothing is selected.
        """
        names = None if self.names is None else frozenset(self.names)
        steps = _resolve("step", self.steps, time)
        return Selection(steps, self.selected_units(hidden), names, hidden=hidden)

    @property
    def counts_from_end(self) -> bool:
        """Whether steps are counted from the end."""
        steps = self.steps
        numbers = (steps.start, steps.stop, steps.step) if isinstance(steps, slice) else steps or ()
        return any(number is not None and number < 0 for number in numbers)

    def selects_step(self, step: int) -> bool:
        """Return whether to keep a step of a sequence whose length isn't known, because it runs step by step.

        Raises:
            ValueError: If steps are counted from the end.
        """
        if self.counts_from_end:
            raise ValueError("steps can't be counted from the end if the model runs the steps one by one")
        if isinstance(self.steps, slice):
            return step in range(step + 1)[self.steps]
        return self.steps is None or step in self.steps

    def selected_units(self, hidden: int) -> tuple[int, ...] | None:
        """Return the units to keep; None for all."""
        return _resolve("unit", self.units, hidden)

    def selected_rows(self, batch: int) -> tuple[int, ...] | None:
        """Return the rows to keep; None for all."""
        rows = _resolve("row", self.rows, batch)
        return None if rows is None or len(rows) == batch else rows


def _parse_indices(what: str, value: Any) -> Any:
    """Convert an argument to a slice or a tuple of integers."""
    if value is None:
        return value
    try:
        if isinstance(value, slice):
            range(1)[value]  # raises an error if the slice isn't one of integers
            return value
        indices = (value,) if hasattr(value, "__index__") and not _has_axes(value) else tuple(value)
        indices = tuple(as_int(index) for index in indices)
    except TypeError:
        raise TypeError(
            f"{what} must be an integer, a slice, a range or a list of integers, got {value!r}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{what}={value!r} is invalid: {error}") from None
    if not indices:
        raise ValueError(f"{what} is empty, so nothing would be recorded")
    return indices


def _has_axes(value: Any) -> bool:
    return bool(getattr(value, "ndim", 0))


def _resolve(what: str, indices: Any, size: int) -> tuple[int, ...] | None:
    """Return the selected positions among ``size``, sorted; None for all."""
    if indices is None:
        return None
    if not isinstance(indices, slice):
        return tuple(sorted({normalize_index(what, index, size) for index in indices}))
    positions = tuple(sorted(range(size)[indices]))
    if not positions:
        raise ValueError(f"{what}s={indices!r} selects none of {size}, so nothing would be recorded")
    return positions


@dataclass(frozen=True)
class Selection:
    """What to keep of one call of a layer. None keeps everything.

    Attributes:
        steps: The time steps.
        units: The units of the hidden size. For a quantity with a multiple of the hidden size, they are taken
            from each part.
        names: The quantities.
        rows: The rows of the batch.
        hidden: The hidden size.
    """

    steps: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    names: frozenset[str] | None = None
    rows: tuple[int, ...] | None = None
    hidden: int = 0

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is left out."""
        return all(kept is None for kept in (self.steps, self.units, self.names, self.rows))

    @property
    def keeps_partial_steps(self) -> bool:
        """Whether quantities or units of a step are left out."""
        return self.names is not None or self.units is not None

    def columns(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return which features to keep along a quantity's last axis; None for all.

        Args:
            shape: Shape of the quantity without time and batch.
        """
        if self.units is None or not shape or shape[-1] % self.hidden:
            return None
        return tuple(k + unit for k in range(0, shape[-1], self.hidden) for unit in self.units)

    def select_rows(self, tensor: Tensor) -> Tensor:
        """Return the kept rows of ``(batch, …)``."""
        return tensor if self.rows is None else _select(tensor, 0, self.rows)

    def select_state_rows(self, state: Tensor) -> Tensor:
        """Return the kept rows of ``(layers, batch, size)``."""
        return state if self.rows is None else _select(state, 1, self.rows)

    def select(self, values: Tensor) -> Tensor:
        """Return the kept part of a quantity, ``(time, batch, …)``."""
        columns = self.columns(tuple(values.shape[2:]))
        for axis, indices in ((0, self.steps), (1, self.rows), (-1, columns)):
            if indices is not None:
                values = _select(values, axis, indices)
        return values


class SelectiveRecorder(StepRecorder):
    """Records the selected part of every step that its ``cell`` runs. It never stores more than that.

    Args:
        cell: The cell to record.
        selection: What to keep.
        sequence: The layout of the sequences.
        reverse: Whether the last step runs first.
    """

    def __init__(self, cell: Cell, selection: Selection, sequence: SequenceBatch, reverse: bool) -> None:
        super().__init__(cell)
        self._selection = selection
        self._time = sequence.time
        self._selected_steps = set(range(self._time) if selection.steps is None else selection.steps)
        self._reverse = reverse
        self._steps_run = 0
        row_positions = sequence.to_user_order(torch.arange(sequence.batch), 0)
        self._row_positions = row_positions if selection.rows is None else row_positions[list(selection.rows)]
        self._states_before: list[dict[str, Tensor]] = []
        self._inputs: list[Tensor] = []
        self._columns: dict[str, tuple[int, ...]] = {}

    def layer_trace_fields(self) -> dict[str, Any]:
        """Stop recording and return what was recorded, as arguments of a :class:`LayerTrace`."""
        self.close()
        shape = (len(self._selected_steps), len(self._row_positions))
        first = self.recorded[0] if self.recorded else {}
        names = [name for name in first if all(name in step for step in self.recorded)]
        state_names = list(self._states_before[0]) if self._states_before else []
        return {
            "values": {name: self._stack([step.pop(name) for step in self.recorded]) for name in names},
            "input": self._stack(self._inputs) if self._inputs else torch.empty(*shape, 0),
            "before": {
                name: self._stack([states.pop(name) for states in self._states_before])
                for name in state_names
            },
            "steps": self._selection.steps,
            "units": self._selection.units,
            "partial": self._selection.keeps_partial_steps,
            "columns": self._columns,
        }

    def _stack(self, steps: list[Tensor]) -> Tensor:
        return torch.stack(steps[::-1] if self._reverse else steps)

    def _step(self, x: Tensor, *state: Tensor) -> Any:
        step = self._time - 1 - self._steps_run if self._reverse else self._steps_run
        self._steps_run += 1
        if step not in self._selected_steps:
            return self._original.step(x, *state)
        new = super()._step(x, *state)
        names = self._selection.names
        if names is None or "x" in names:
            self._inputs.append(self._select_rows(x))
        if not self._selection.keeps_partial_steps and self._selection.steps is not None:
            states = zip(self._original.state, map(self._select_rows, state), strict=True)
            self._states_before.append(dict(states))
        self.recorded[-1] = {
            name: self._select_units(name, self._select_rows(value))
            for name, value in self.recorded[-1].items()
            if name in self._batched_names and (names is None or name in names)
        }
        return new

    def _select_rows(self, tensor: Tensor) -> Tensor:
        """Return the kept rows of a step, with zeros for rows that have ended."""
        positions = self._row_positions.to(tensor.device)
        active = positions < len(tensor)
        rows = tensor.new_zeros(len(positions), *tensor.shape[1:])
        rows[active] = tensor.detach().index_select(0, positions[active])
        return rows

    def _select_units(self, name: str, tensor: Tensor) -> Tensor:
        """Return the kept units of a quantity, and note their positions in the whole quantity."""
        shape = tuple(tensor.shape[1:])
        columns = self._selection.columns(shape)
        if columns is None:
            return tensor
        offsets = range(0, tensor[0].numel(), shape[-1])
        self._columns[name] = tuple(offset + column for offset in offsets for column in columns)
        return _select(tensor, -1, columns)


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Selects some rows of a batch, as if the layer had been called with only these.

    Attributes:
        indices: The rows.
        batch_size: Number of rows in the batch.
        batch_first: Whether the batch is the first axis of inputs and outputs.
        packed: The input, if it was a packed sequence.
    """

    indices: tuple[int, ...]
    batch_size: int
    batch_first: bool
    packed: PackedSequence | None

    @classmethod
    def from_input(cls, indices: tuple[int, ...], x: Tensor | PackedSequence, batch_first: bool) -> BatchRows:
        """Select rows of an input."""
        sequence = SequenceBatch.from_input(x, batch_first, "")
        return cls(indices, sequence.batch, batch_first, sequence.packed)

    def select_states(self, state: Any) -> Any:
        """Return the rows of states, each of shape ``(layers, batch, size)``."""
        return map_tensors(state, lambda part: _select(part, 1, self.indices))

    def select_sequence(self, value: Any) -> Any:
        """Return the rows of an input or output, or of a tensor with the layout of packed data."""
        if self.packed is None:
            return _select(value, 0 if self.batch_first else 1, self.indices)
        data = value.data if isinstance(value, PackedSequence) else value
        data = _select(data, 0, self._packed_positions)
        if not isinstance(value, PackedSequence):
            return data
        active = self.packed.batch_sizes.unsqueeze(1) > self._sorted_positions
        order = torch.argsort(self._sorted_positions, stable=True)
        sizes = active.sum(1)
        return PackedSequence(
            data, sizes[sizes > 0], order.to(data.device), torch.argsort(order).to(data.device)
        )

    def dropout(self, steps: Tensor, probability: float) -> Tensor:
        """Apply dropout to the rows, with the random mask of the whole batch. The first axis is time."""
        if self.packed is not None:
            mask = dropout(steps.new_ones(len(self.packed.data), steps.shape[-1]), probability)
            return steps * _select(mask, 0, self._packed_positions)
        mask = dropout(steps.new_ones(len(steps), self.batch_size, steps.shape[-1]), probability)
        return steps * _select(mask, 1, self.indices)

    @lazy_property
    def _sorted_positions(self) -> Tensor:
        """The position of each row in the order of the packed sequence, which is sorted by length."""
        unsorted_indices = None if self.packed is None else self.packed.unsorted_indices
        indices = torch.tensor(self.indices)
        return indices if unsorted_indices is None else unsorted_indices.cpu()[indices]

    @lazy_property
    def _packed_positions(self) -> tuple[int, ...]:
        """The positions of the rows' steps in the data of the packed sequence."""
        assert self.packed is not None
        sizes = self.packed.batch_sizes
        rows = torch.sort(self._sorted_positions).values
        positions = (sizes.cumsum(0) - sizes).unsqueeze(1) + rows
        return tuple(positions[sizes.unsqueeze(1) > rows].tolist())


def _select(tensor: Tensor, axis: int, indices: tuple[int, ...]) -> Tensor:
    return tensor.index_select(axis, torch.tensor(indices, device=tensor.device))

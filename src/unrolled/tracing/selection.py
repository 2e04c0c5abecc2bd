"""What a trace keeps where it doesn't keep all: some rows, steps, quantities and units."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors
from unrolled.tracing.indexing import position, whole_number
from unrolled.tracing.step_recorder import StepRecorder


@dataclass(frozen=True)
class TraceFilter:
    """What is to be kept of every call, as users say it; None: all.

    Attributes:
        steps, rows, units: a whole number, a slice, a range or a list of whole numbers.
        names: of the quantities; ``"x"`` is the input.
    """

    steps: Any = None
    rows: Any = None
    names: tuple[str, ...] | None = None
    units: Any = None

    @classmethod
    def of(cls, steps: Any, rows: Any, names: Iterable[str] | None, units: Any) -> TraceFilter:
        """These limits, checked as far as they can be without a call.

        Raises:
            TypeError, ValueError: a limit of another form, or one that leaves nothing.
        """
        if names is not None:
            names = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"names should be the names of quantities, such as ['h'], got {names!r}")
        return cls(_form("steps", steps), _form("rows", rows), names, _form("units", units))

    def selection(self, time: int, hidden: int) -> Selection:
        """What of a call of so many steps is kept.

        Raises:
            IndexError: a step or unit that isn't there.
            ValueError: nothing is left.
        """
        names = None if self.names is None else frozenset(self.names)
        return Selection(_chosen("step", self.steps, time), self.units_of(hidden), names, hidden=hidden)

    def units_of(self, hidden: int) -> tuple[int, ...] | None:
        """Which units of so many are kept; None: all."""
        return _chosen("unit", self.units, hidden)

    def rows_of(self, batch: int) -> tuple[int, ...] | None:
        """Which rows are kept; None: all."""
        rows = _chosen("row", self.rows, batch)
        return None if rows is None or len(rows) == batch else rows


def _form(what: str, given: Any) -> Any:
    """A limit as a slice or a tuple of whole numbers."""
    if given is None:
        return given
    try:
        if isinstance(given, slice):
            range(1)[given]  # an error where it is no slice of whole numbers
            return given
        several = (given,) if hasattr(given, "__index__") and not _has_axes(given) else tuple(given)
        numbers = tuple(whole_number(one) for one in several)
    except TypeError:
        raise TypeError(
            f"{what} should be a whole number, a slice, a range or a list of whole numbers, got {given!r}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{what}={given!r} can't be: {error}") from None
    if not numbers:
        raise ValueError(f"{what} is empty: nothing would be kept")
    return numbers


def _has_axes(value: Any) -> bool:
    return bool(getattr(value, "ndim", 0))


def _chosen(what: str, given: Any, size: int) -> tuple[int, ...] | None:
    """The positions that a limit chooses of so many, in their order; None: all."""
    if given is None:
        return None
    if not isinstance(given, slice):
        return tuple(sorted({position(what, one, size) for one in given}))
    found = tuple(sorted(range(size)[given]))
    if not found:
        raise ValueError(f"{what}s={given!r} leaves none of {size}: nothing would be kept")
    return found


@dataclass(frozen=True)
class Selection:
    """What of one call of a layer is kept; None: all.

    Attributes:
        steps: the time steps.
        units: the units of the hidden size; of a quantity that has several times as many features, those of
            each such part.
        names: the quantities.
        rows: of the batch that runs.
        hidden: the hidden size.
    """

    steps: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    names: frozenset[str] | None = None
    rows: tuple[int, ...] | None = None
    hidden: int = 0

    @property
    def whole(self) -> bool:
        """Whether all is kept."""
        return all(kept is None for kept in (self.steps, self.units, self.names, self.rows))

    @property
    def partial(self) -> bool:
        """Whether not all of a step is kept."""
        return self.names is not None or self.units is not None

    def columns(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Which of the last of a quantity's axes are kept, by its axes without time and rows; None: all."""
        if self.units is None or not shape or shape[-1] % self.hidden:
            return None
        return tuple(k + unit for k in range(0, shape[-1], self.hidden) for unit in self.units)

    def of_rows(self, part: Tensor) -> Tensor:
        """What is kept of ``(batch, …)``."""
        return part if self.rows is None else _select(part, 0, self.rows)

    def of_states(self, part: Tensor) -> Tensor:
        """What is kept of ``(layers, batch, size)``."""
        return part if self.rows is None else _select(part, 1, self.rows)

    def cut(self, values: Tensor) -> Tensor:
        """What is kept of a quantity, ``(time, batch, …)``."""
        for axis, kept in ((0, self.steps), (1, self.rows), (-1, self.columns(tuple(values.shape[2:])))):
            if kept is not None:
                values = _select(values, axis, kept)
        return values


class LimitedRecorder(StepRecorder):
    """Keeps what a selection says of every step that its ``cell`` runs, and never more.

    Args:
        cell: whose steps.
        selection: what is kept.
        sequence: how the steps lie.
        reverse: whether the last step runs first.
    """

    def __init__(self, cell: Cell, selection: Selection, sequence: SequenceBatch, reverse: bool) -> None:
        super().__init__(cell)
        self._selection = selection
        self._time = sequence.time
        self._wanted = set(range(self._time) if selection.steps is None else selection.steps)
        self._reverse = reverse
        self._ran = 0
        place = sequence.to_user_order(torch.arange(sequence.batch), 0)
        self._places = place if selection.rows is None else place[list(selection.rows)]
        self._before: list[dict[str, Tensor]] = []
        self._inputs: list[Tensor] = []
        self._columns: dict[str, tuple[int, ...]] = {}

    def parts(self) -> dict[str, Any]:
        """What a :class:`LayerTrace` of it has of its own, by the names of its attributes."""
        self.end()
        shape = (len(self._wanted), len(self._places))
        start = self.kept[0] if self.kept else {}
        names = [name for name in start if all(name in kept for kept in self.kept)]
        states = list(self._before[0]) if self._before else []
        return {
            "values": {name: self._joined([kept.pop(name) for kept in self.kept]) for name in names},
            "input": self._joined(self._inputs) if self._inputs else torch.empty(*shape, 0),
            "before": {name: self._joined([kept.pop(name) for kept in self._before]) for name in states},
            "steps": self._selection.steps,
            "units": self._selection.units,
            "partial": self._selection.partial,
            "columns": self._columns,
        }

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts[::-1] if self._reverse else parts)

    def _step(self, x: Tensor, *state: Tensor) -> Any:
        at = self._time - 1 - self._ran if self._reverse else self._ran
        self._ran += 1
        if at not in self._wanted:
            return self._original.step(x, *state)
        new = super()._step(x, *state)
        names = self._selection.names
        if names is None or "x" in names:
            self._inputs.append(self._rows(x))
        if not self._selection.partial and self._selection.steps is not None:
            self._before.append(dict(zip(self._original.state, map(self._rows, state), strict=True)))
        self.kept[-1] = {
            name: self._units(name, self._rows(value))
            for name, value in self.kept[-1].items()
            if name in self._per_row and (names is None or name in names)
        }
        return new

    def _rows(self, tensor: Tensor) -> Tensor:
        """The kept rows of a step, zeros for those that have ended."""
        places = self._places.to(tensor.device)
        there = places < len(tensor)
        found = tensor.new_zeros(len(places), *tensor.shape[1:])
        found[there] = tensor.detach().index_select(0, places[there])
        return found

    def _units(self, name: str, tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape[1:])
        columns = self._selection.columns(shape)
        if columns is None:
            return tensor
        lines = range(0, tensor[0].numel(), shape[-1])
        self._columns[name] = tuple(line + column for line in lines for column in columns)
        return _select(tensor, -1, columns)


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Some rows of a batch, as if they had been given alone.

    Attributes:
        index: which.
        batch: how many there are.
        batch_first: whether the rows of a tensor of three axes are along the first.
        packed: the packed sequence that the batch came as, if it did.
    """

    index: tuple[int, ...]
    batch: int
    batch_first: bool
    packed: PackedSequence | None

    @classmethod
    def of(cls, index: tuple[int, ...], x: Tensor | PackedSequence, batch_first: bool) -> BatchRows:
        """These rows of an input."""
        sequence = SequenceBatch.of(x, batch_first, "")
        return cls(index, sequence.batch, batch_first, sequence.packed)

    def of_states(self, state: Any) -> Any:
        """The rows of ``(layers, batch, size)`` each."""
        return map_tensors(state, lambda part: _select(part, 1, self.index))

    def of_sequence(self, value: Any) -> Any:
        """The rows of an input or output, or of what is laid out as its data."""
        if self.packed is None:
            return _select(value, 0 if self.batch_first else 1, self.index)
        data = value.data if isinstance(value, PackedSequence) else value
        data = _select(data, 0, self._places)
        if not isinstance(value, PackedSequence):
            return data
        alive = self.packed.batch_sizes.unsqueeze(1) > self._order
        order = torch.argsort(self._order, stable=True)
        sizes = alive.sum(1)
        return PackedSequence(
            data, sizes[sizes > 0], order.to(data.device), torch.argsort(order).to(data.device)
        )

    def dropout(self, steps: Tensor, probability: float) -> Tensor:
        """Dropout of these rows, drawn as for the whole batch; time stands first."""
        if self.packed is not None:
            drawn = dropout(steps.new_ones(len(self.packed.data), steps.shape[-1]), probability)
            return steps * _select(drawn, 0, self._places)
        drawn = dropout(steps.new_ones(len(steps), self.batch, steps.shape[-1]), probability)
        return steps * _select(drawn, 1, self.index)

    @functools.cached_property
    def _order(self) -> Tensor:
        """Where each of these rows stands among the rows of a packed sequence."""
        given = None if self.packed is None else self.packed.unsorted_indices
        index = torch.tensor(self.index)
        return index if given is None else given.cpu()[index]

    @functools.cached_property
    def _places(self) -> tuple[int, ...]:
        """Which of the steps of a packed sequence are of these rows."""
        assert self.packed is not None
        sizes = self.packed.batch_sizes
        own = torch.sort(self._order).values
        places = (sizes.cumsum(0) - sizes).unsqueeze(1) + own
        return tuple(places[sizes.unsqueeze(1) > own].tolist())


def _select(tensor: Tensor, axis: int, index: tuple[int, ...]) -> Tensor:
    return tensor.index_select(axis, torch.tensor(index, device=tensor.device))

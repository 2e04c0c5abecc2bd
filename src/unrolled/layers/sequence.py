"""Sequences as users give them, in the one form that engines take, and back again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class InputError(ValueError, RuntimeError):
    """A tensor that doesn't fit the layer: a ValueError, and a RuntimeError as torch.nn raises."""


@dataclass(slots=True)
class SequenceBatch:
    """A batch of sequences, time first, longest row first where lengths differ.

    Attributes:
        steps: ``(time, batch, features)``; where lengths differ ``(sum of sizes, features)``.
        sizes: where lengths differ, how many rows have a step at each time (never growing), as a tensor
            where torch is compiling; None where every row has every step.
        packed: the packed sequence that it came from.
        batched, batch_first: how the user laid out the input.
        order: the rows in the order of the steps here; None: as the user has them.
        ragged: how a padded input was packed; None where it wasn't.
    """

    steps: Tensor
    sizes: list[int] | Tensor | None = None
    packed: PackedSequence | None = None
    batched: bool = True
    batch_first: bool = False
    order: Tensor | None = None
    ragged: PackedLayout | None = None

    @classmethod
    def of(cls, x: Tensor | PackedSequence, batch_first: bool, layer: str) -> SequenceBatch:
        """Read what a user gave to a layer.

        Args:
            x: ``(time, batch, features)``, ``(batch, time, features)`` with ``batch_first``,
                ``(time, features)`` for a single sequence, or a packed sequence.
            batch_first: whether a batch axis comes before the time axis.
            layer: the name of the layer, for messages.

        Raises:
            TypeError: x is neither a tensor nor a packed sequence.
            ValueError: x has another number of axes, or no time step.
        """
        if isinstance(x, PackedSequence):
            if x.data.dim() != 2:
                raise InputError(
                    f"{layer}: packed data must have 2 dimensions (steps, features), got {x.data.dim()}"
                )
            sizes = x.batch_sizes if torch.compiler.is_compiling() else x.batch_sizes.tolist()
            return cls(x.data, sizes, packed=x, order=x.sorted_indices)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{layer}: Expected input to be a Tensor or a PackedSequence, got {type(x).__name__}"
            )
        if x.layout is not torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else f"of the layout {x.layout}"
            raise InputError(f"{layer}: Expected a dense input, got a tensor that is {kind}")
        if x.dim() not in (2, 3):
            raise InputError(
                f"{layer}: Expected input to be 2D (time, features) or 3D with a batch axis, "
                f"got {x.dim()}D tensor instead, of shape {tuple(x.shape)}"
            )
        batched = x.dim() == 3
        steps = x.unsqueeze(1) if not batched else x.transpose(0, 1) if batch_first else x
        if steps.shape[0] == 0:
            raise InputError(
                f"{layer}: Expected sequence length to be larger than 0, got an input of shape "
                f"{tuple(x.shape)} with no time step"
            )
        return cls(steps, batched=batched, batch_first=batch_first)

    @property
    def batch(self) -> int:
        """How many rows."""
        if self.sizes is None:
            return self.steps.shape[1]
        return int(self.sizes[0]) if self.order is None else len(self.order)

    @property
    def time(self) -> int:
        """The number of steps of the longest row."""
        return self.steps.shape[0] if self.sizes is None else len(self.sizes)

    @property
    def lengths(self) -> Tensor:
        """The number of steps of every row, ``(batch,)``, in the user's order."""
        if self.sizes is None:
            return torch.full((self.batch,), self.steps.shape[0], device="cpu")
        alive = torch.tensor(self.sizes, device="cpu").unsqueeze(1) > torch.arange(self.batch, device="cpu")
        return self.to_user_order(alive.sum(0), 0)

    def packed_by(self, lengths: Tensor) -> SequenceBatch:
        """The same without the steps past the end of each row, at least one step a row.

        Args:
            lengths: ``(batch,)``, on the CPU, in the user's order.
        """
        ragged = PackedLayout.of(lengths, self.steps.shape[0], self.batch_first)
        steps = ragged.without_empty(ragged.pack(self.steps))
        return SequenceBatch(steps, ragged.sizes, None, True, self.batch_first, ragged.order, ragged)

    def output(self, steps: Tensor) -> Tensor | PackedSequence:
        """Lay out the steps of an output as the input was laid out, zeros past the end of a row."""
        if self.packed is not None:
            return PackedSequence(
                steps, self.packed.batch_sizes, self.packed.sorted_indices, self.packed.unsorted_indices
            )
        if self.ragged is not None:
            return self.ragged.unpack(steps)
        return steps.squeeze(1) if not self.batched else steps.transpose(0, 1) if self.batch_first else steps

    def padded(self, steps: Tensor) -> Tensor:
        """Steps as ``(time, batch, features)`` in the user's order of rows, zeros past their ends."""
        if self.sizes is None:
            return steps
        sizes = [int(size) for size in self.sizes]
        full = steps.new_zeros(len(sizes), self.batch, *steps.shape[1:])
        for t, alive in enumerate(torch.split(steps, sizes)):
            full[t, : len(alive)] = alive
        return self.to_user_order(full, 1)

    def state_in(self, state: Tensor) -> Tensor:
        """A user's ``(layers, batch, size)``, or ``(layers, size)``, in the order of the rows here."""
        if self.order is not None:
            return state.index_select(1, self.order.to(state.device))
        return state if self.batched else state.unsqueeze(1)

    def state_out(self, state: Tensor) -> Tensor:
        """The reverse of :meth:`state_in`."""
        return self.to_user_order(state, 1) if self.batched else state.squeeze(1)

    def to_user_order(self, rows: Tensor, axis: int) -> Tensor:
        """Rows in the order in which the user gave them, along this axis."""
        if self.order is None:
            return rows
        given = None if self.packed is None else self.packed.unsorted_indices
        inverse = torch.argsort(self.order) if given is None else given
        return rows.index_select(axis, inverse.to(rows.device))


@dataclass(slots=True)
class PackedLayout:
    """Where the steps of rows of several lengths lie in a padded tensor.

    Attributes:
        sizes: how many rows have a step at each time, never growing.
        order: the rows, longest first.
        places: of each step, time by time, its place among the rows of the padded tensor as they lie.
        shape: the first two axes of that tensor.
        batch_first: whether the first of them is the batch.
        empty: whether a row has no step, ``(rows in order, 1)``; None where all have one.
    """

    sizes: list[int]
    order: Tensor
    places: Tensor
    shape: tuple[int, int]
    batch_first: bool
    empty: Tensor | None

    @classmethod
    def of(cls, lengths: Tensor, time: int, batch_first: bool) -> PackedLayout:
        """For these lengths; a row of no step gets one, that is left out of the results."""
        order = torch.argsort(lengths, descending=True, stable=True)
        ordered = lengths[order]
        alive = ordered.clamp(min=1) > torch.arange(time, device="cpu").unsqueeze(1)
        batch, steps = len(lengths), torch.arange(time, device="cpu").unsqueeze(1)
        places = order * time + steps if batch_first else steps * batch + order
        empty = ordered.unsqueeze(1) == 0
        sizes = [size for size in alive.sum(1).tolist() if size]
        shape = (batch, time) if batch_first else (time, batch)
        return cls(sizes, order, places[alive], shape, batch_first, empty if bool(empty.any()) else None)

    def pack(self, steps: Tensor) -> Tensor:
        """``(time, batch, features)`` as ``(sum of sizes, features)``."""
        lying = steps.transpose(0, 1) if self.batch_first else steps
        return lying.flatten(0, 1).index_select(0, self.places.to(steps.device))

    def unpack(self, steps: Tensor) -> Tensor:
        """The reverse, as the padded tensor lay, zeros past the end of a row."""
        steps = self.without_empty(steps)
        full = steps.new_zeros(self.shape[0] * self.shape[1], *steps.shape[1:])
        filled = full.index_copy(0, self.places.to(steps.device), steps)
        return filled.view(*self.shape, *steps.shape[1:])

    def without_empty(self, steps: Tensor) -> Tensor:
        """``(sum of sizes, features)`` with zeros in the one step of the rows that have none."""
        if self.empty is None:
            return steps
        many = self.sizes[0]
        return torch.cat((torch.where(self.empty.to(steps.device), 0.0, steps[:many]), steps[many:]))

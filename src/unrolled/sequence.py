"""Sequences as users give them, in the one form that engines take, and back again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class InputError(ValueError, RuntimeError):
    """A tensor that doesn't fit the layer: a ValueError, and a RuntimeError as torch.nn raises."""


@dataclass(slots=True)
class Sequence:
    """A batch of sequences, time first, longest row first where lengths differ.

    Attributes:
        steps: ``(time, batch, features)``; from a packed sequence ``(sum of sizes, features)``.
        sizes: from a packed sequence, how many rows have a step at each time (never growing), as a tensor
            where torch is compiling; None where every row has every step.
        packed: the packed sequence that it came from.
        batched, batch_first: how the user laid out the input.
    """

    steps: Tensor
    sizes: list[int] | Tensor | None = None
    packed: PackedSequence | None = None
    batched: bool = True
    batch_first: bool = False

    @classmethod
    def of(cls, x: Tensor | PackedSequence, batch_first: bool, layer: str) -> Sequence:
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
            sizes = x.batch_sizes
            return cls(x.data, sizes if torch.compiler.is_compiling() else sizes.tolist(), packed=x)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{layer}: Expected input to be a Tensor or a PackedSequence, got {type(x).__name__}"
            )
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
        if self.packed is not None and self.packed.sorted_indices is not None:
            return len(self.packed.sorted_indices)
        return int(self.sizes[0])

    @property
    def lengths(self) -> Tensor:
        """The number of steps of every row, ``(batch,)``, in the user's order."""
        if self.sizes is None:
            return torch.full((self.batch,), self.steps.shape[0], device="cpu")
        alive = torch.tensor(self.sizes, device="cpu").unsqueeze(1) > torch.arange(self.batch, device="cpu")
        return self.to_user_order(alive.sum(0), 0)

    def output(self, steps: Tensor) -> Tensor | PackedSequence:
        """Lay out the steps of an output as the input was laid out."""
        if self.packed is not None:
            return PackedSequence(
                steps, self.packed.batch_sizes, self.packed.sorted_indices, self.packed.unsorted_indices
            )
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
        if self.packed is not None and self.packed.sorted_indices is not None:
            return state.index_select(1, self.packed.sorted_indices)
        return state if self.batched else state.unsqueeze(1)

    def state_out(self, state: Tensor) -> Tensor:
        """The reverse of :meth:`state_in`."""
        return self.to_user_order(state, 1) if self.batched else state.squeeze(1)

    def to_user_order(self, rows: Tensor, axis: int) -> Tensor:
        """Rows in the order in which the user gave them, along this axis."""
        if self.packed is None or self.packed.unsorted_indices is None:
            return rows
        return rows.index_select(axis, self.packed.unsorted_indices.to(rows.device))

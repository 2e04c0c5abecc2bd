"""The batch of sequences that a layer runs on, and its conversion from and to the user's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unrolled.engines import memory
from unrolled.engines._torch_private import assert_async, is_functional_tensor
from unrolled.engines.compiler.batch_layout import batch_sizes_error
from unrolled.engines.torch_ops import recording


class InputError(ValueError, RuntimeError):
    """A tensor has the wrong shape, dtype or device. Also a RuntimeError, which torch.nn raises."""


@dataclass(slots=True)
class SequenceBatch:
    """A batch of sequences, time first. If the lengths differ, it is packed as in a PackedSequence.

    Attributes:
        steps: The input, ``(time, batch, features)``, or ``(sum of batch_sizes, features)`` if packed.
        batch_sizes: If packed, the number of rows that have each time step, in descending order: a list, or a
            tensor while torch records a graph. None if every row has every step.
        packed: The user's PackedSequence. None if the input was a tensor.
        batched: Whether the user's input has a batch dimension.
        batch_first: Whether the batch dimension of the user's input comes first.
        sorted_indices: The user's row for each row of this batch. None if the order is the same.
        packed_layout: How a padded input was packed. None if it wasn't.
    """

    steps: Tensor
    batch_sizes: list[int] | Tensor | None = None
    packed: PackedSequence | None = None
    batched: bool = True
    batch_first: bool = False
    sorted_indices: Tensor | None = None
    packed_layout: PackedLayout | None = None

    @classmethod
    def from_input(cls, x: Tensor | PackedSequence, batch_first: bool, layer: str) -> SequenceBatch:
        """Create the batch from the input of a layer.

        Args:
            x: ``(time, batch, features)``, or ``(batch, time, features)`` with ``batch_first``. Also
                ``(time, features)`` for a single sequence, or a PackedSequence.
            batch_first: Whether the batch dimension comes before the time dimension.
            layer: Name of the layer, for error messages.

        Raises:
            TypeError: If ``x`` is neither a tensor nor a PackedSequence.
            InputError: If ``x`` has the wrong number of dimensions or no time step, or is nested, or the
                sizes or indices of a PackedSequence don't fit its data.
        """
        if isinstance(x, PackedSequence):
            batch_sizes = _check_packed(x, layer)
            return cls(x.data, batch_sizes, packed=x, sorted_indices=x.sorted_indices)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{layer}: Expected input to be a Tensor or a PackedSequence, got {type(x).__name__}"
            )
        if x.is_nested:
            raise InputError(f"{layer}: a nested tensor is not supported: pad it and pass lengths")
        memory.check_dense(layer, [x])
        if x.dim() not in (2, 3):
            raise InputError(
                f"{layer}: Expected input to be 2D (time, features) or 3D with a batch dimension, "
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
        """The number of rows."""
        if self.batch_sizes is None:
            return self.steps.shape[1]
        return self.sorted_indices.shape[0] if self.sorted_indices is not None else self.size_list[0]

    @property
    def size_list(self) -> list[int]:
        """The batch sizes as a list.

        Raises:
            RuntimeError: If they aren't known because torch records a graph. In torch.compile this ends the
                graph.
        """
        assert self.batch_sizes is not None
        if isinstance(self.batch_sizes, list):
            return self.batch_sizes
        if torch.compiler.is_dynamo_compiling():
            return [int(size) for size in self.batch_sizes]
        return recording.read_sizes(self.batch_sizes)

    def batch_of(self, state: Tensor) -> int:
        """Return the number of rows that a user's state should have: its own if only a graph knows the sizes.

        The torch operator then checks it.
        """
        if self.sorted_indices is not None or not isinstance(self.batch_sizes, Tensor):
            return self.batch
        return state.shape[1] if state.dim() == 3 else 0

    @property
    def time(self) -> int:
        """The number of time steps of the longest row."""
        return self.steps.shape[0] if self.batch_sizes is None else len(self.batch_sizes)

    @property
    def lengths(self) -> Tensor:
        """The number of time steps of every row, ``(batch,)``, in the user's order."""
        if self.batch_sizes is None:
            return torch.full((self.batch,), self.steps.shape[0], device="cpu")
        rows = torch.arange(self.batch, device="cpu")
        mask = torch.tensor(self.size_list, device="cpu").unsqueeze(1) > rows
        return self.to_user_order(mask.sum(0), 0)

    def pack(self, lengths: Tensor) -> SequenceBatch:
        """Return a packed batch without the steps past the end of each row. Empty rows keep one step.

        Args:
            lengths: The length of each row, ``(batch,)``, on the CPU and in the user's order.
        """
        layout = PackedLayout.from_lengths(lengths, self.steps.shape[0], self.batch_first)
        steps = layout.zero_empty_rows(layout.pack(self.steps))
        return SequenceBatch(
            steps, layout.batch_sizes, None, True, self.batch_first, layout.sorted_indices, layout
        )

    def output(self, steps: Tensor) -> Tensor | PackedSequence:
        """Convert outputs to the layout of the user's input, with zeros in padded steps."""
        if self.packed is not None:
            return PackedSequence(
                steps, self.packed.batch_sizes, self.packed.sorted_indices, self.packed.unsorted_indices
            )
        if self.packed_layout is not None:
            return self.packed_layout.unpack(steps)
        return steps.squeeze(1) if not self.batched else steps.transpose(0, 1) if self.batch_first else steps

    def padded(self, steps: Tensor) -> Tensor:
        """Return steps as ``(time, batch, features)`` in the user's order, with zeros in padded steps."""
        if self.batch_sizes is None:
            return steps
        batch_sizes = self.size_list
        padded = steps.new_zeros(len(batch_sizes), self.batch, *steps.shape[1:])
        for t, rows in enumerate(torch.split(steps, batch_sizes)):
            padded[t, : len(rows)] = rows
        return self.to_user_order(padded, 1)

    def state_in(self, state: Tensor) -> Tensor:
        """Convert a user's ``(layers, batch, size)`` or ``(layers, size)`` to the row order of this batch."""
        if self.sorted_indices is not None:
            memory.check_not_freed([state])
            return state.index_select(1, self.sorted_indices.to(state.device))
        return state if self.batched else state.unsqueeze(1)

    def state_out(self, state: Tensor) -> Tensor:
        """Convert states back to the user's layout: the inverse of :meth:`state_in`."""
        return self.to_user_order(state, 1) if self.batched else state.squeeze(1)

    def to_user_order(self, rows: Tensor, dim: int) -> Tensor:
        """Sort the rows along a dimension in the user's order."""
        if self.sorted_indices is None:
            return rows
        unsorted = None if self.packed is None else self.packed.unsorted_indices
        inverse = torch.argsort(self.sorted_indices) if unsorted is None else unsorted
        return rows.index_select(dim, inverse.to(rows.device))


def check_values(
    what: str, tensor: Tensor, may_be_meta: bool = False, may_be_functional: bool = False
) -> None:
    """Raise InputError if the values of a tensor can't be read: it is nested, sparse, or has none.

    Args:
        what: What the tensor is, for the message.
        tensor: The tensor.
        may_be_meta: Whether a tensor on the meta device is accepted.
        may_be_functional: Whether a functional tensor is accepted. In torch's transforms it always is.
    """
    if tensor.is_nested:
        kind = "a nested tensor"
    elif tensor.layout is not torch.strided:
        kind = f"a tensor with layout {tensor.layout}"
    elif tensor.is_meta and not may_be_meta:
        kind = "a tensor on the meta device, which has no values"
    elif not (may_be_functional or recording.active()) and is_functional_tensor(tensor):
        kind = "a functional tensor outside of torch's transforms"
    else:
        return
    raise InputError(f"{what} should be a dense tensor with values, got {kind}")


def _check_packed(x: PackedSequence, layer: str) -> list[int] | Tensor:
    """Check a PackedSequence, and return its batch sizes: a tensor while torch records a graph.

    Raises:
        TypeError: If it contains something else than tensors.
        InputError: If its data, sizes or indices don't fit together.
    """
    data, batch_sizes = x.data, x.batch_sizes
    for part in x:
        if part is not None and not isinstance(part, Tensor):
            raise TypeError(f"{layer}: a packed sequence should contain tensors, got {type(part).__name__}")
    if data.is_nested or data.dim() != 2:
        got = "a nested tensor" if data.is_nested else f"{data.dim()}"
        raise InputError(f"{layer}: packed data must have 2 dimensions (steps, features), got {got}")
    if batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise InputError(
            f"{layer}: batch_sizes of a packed sequence should be a one-dimensional int64 tensor on the CPU, "
            f"got {batch_sizes.dtype} with {batch_sizes.dim()} dimensions on {batch_sizes.device}"
            + (". While torch records a graph, pass a padded input and lengths" if recording.active() else "")
        )
    if recording.active():
        sizes: list[int] | Tensor = batch_sizes
    else:
        try:
            sizes = batch_sizes.tolist()
        except RuntimeError as error:  # sizes without values
            raise InputError(f"{layer}: can't read the batch_sizes of a packed sequence: {error}") from error
        error_message = batch_sizes_error(sizes, len(data))
        if error_message:
            raise InputError(f"{layer}: {error_message}")
    if x.sorted_indices is not None or x.unsorted_indices is not None:
        are_inverse = _check_order(x, None if isinstance(sizes, Tensor) else sizes[0], layer)
        if recording.in_jit_trace() and are_inverse is not None:
            # torch.jit.trace drops assertions from its graph, but the operator checks sizes.
            return torch.where(are_inverse, batch_sizes, -1)
    return sizes


def _check_order(x: PackedSequence, batch: int | None, layer: str) -> Tensor | None:
    """Raise InputError if the indices of a PackedSequence aren't two permutations that undo each other.

    Args:
        x: The PackedSequence.
        batch: Number of rows. None while torch records a graph, which then contains the check.
        layer: Name of the layer, for error messages.

    Returns:
        While torch records a graph, whether they are.
    """
    after, before = x.sorted_indices, x.unsorted_indices
    message = (
        f"{layer}: sorted_indices and unsorted_indices of a packed sequence should be permutations of its "
        f"{'' if batch is None else f'{batch} '}rows that undo each other: create it with "
        "pack_padded_sequence or pack_sequence"
    )
    if after is None or before is None:
        raise InputError(message)
    for indices in (after, before):
        if indices.is_meta or indices.dtype is not torch.int64 or indices.dim() != 1:
            raise InputError(message)
    if batch is None:
        ones = torch.ones_like(after), torch.ones_like(before)  # no size becomes a constant of the graph
        are_inverse = (before.index_select(0, after) == ones[0].cumsum(0) - 1).all()
        are_inverse &= (after.index_select(0, before) == ones[1].cumsum(0) - 1).all()
        are_inverse &= ones[0].sum() == x.batch_sizes[0].to(after.device)
        assert_async(are_inverse, message)
        return are_inverse.to(x.batch_sizes.device)
    if not (len(after) == len(before) == batch):
        raise InputError(message)
    if after.is_cuda and before.is_cuda:  # reading them would wait for the device, where torch checks indices
        return None
    after, before = after.cpu(), before.cpu()
    try:
        undone = after.index_select(0, before)
    except (IndexError, RuntimeError):  # an index out of range
        raise InputError(message) from None
    if not torch.equal(undone, torch.arange(batch, device="cpu")):
        raise InputError(message)
    return None


@dataclass(slots=True)
class PackedLayout:
    """The positions of packed steps in a padded tensor.

    Attributes:
        batch_sizes: The number of rows that have each time step, in descending order.
        sorted_indices: The rows of the padded tensor, longest first.
        flat_indices: The index of each packed step in the padded tensor, with time and batch flattened.
        padded_shape: The first two dimensions of the padded tensor.
        batch_first: Whether the batch is the first of them.
        empty_rows: Whether each sorted row has length 0, ``(batch, 1)``. None if no row is empty.
    """

    batch_sizes: list[int]
    sorted_indices: Tensor
    flat_indices: Tensor
    padded_shape: tuple[int, int]
    batch_first: bool
    empty_rows: Tensor | None

    @classmethod
    def from_lengths(cls, lengths: Tensor, time: int, batch_first: bool) -> PackedLayout:
        """Create the layout for rows of these lengths. An empty row gets one step, which results ignore."""
        sorted_indices = torch.argsort(lengths, descending=True, stable=True)
        sorted_lengths = lengths[sorted_indices]
        mask = sorted_lengths.clamp(min=1) > torch.arange(time, device="cpu").unsqueeze(1)
        batch, steps = len(lengths), torch.arange(time, device="cpu").unsqueeze(1)
        flat_indices = sorted_indices * time + steps if batch_first else steps * batch + sorted_indices
        empty_rows = sorted_lengths.unsqueeze(1) == 0
        batch_sizes = [size for size in mask.sum(1).tolist() if size]
        shape = (batch, time) if batch_first else (time, batch)
        return cls(
            batch_sizes,
            sorted_indices,
            flat_indices[mask],
            shape,
            batch_first,
            empty_rows if bool(empty_rows.any()) else None,
        )

    def pack(self, steps: Tensor) -> Tensor:
        """Convert ``(time, batch, features)`` to ``(sum of batch_sizes, features)``."""
        padded = steps.transpose(0, 1) if self.batch_first else steps
        return padded.flatten(0, 1).index_select(0, self.flat_indices.to(steps.device))

    def unpack(self, steps: Tensor) -> Tensor:
        """Convert packed steps to the layout of the padded tensor, with zeros in padded steps."""
        steps = self.zero_empty_rows(steps)
        padded = steps.new_zeros(self.padded_shape[0] * self.padded_shape[1], *steps.shape[1:])
        filled = padded.index_copy(0, self.flat_indices.to(steps.device), steps)
        return filled.view(*self.padded_shape, *steps.shape[1:])

    def zero_empty_rows(self, steps: Tensor) -> Tensor:
        """Set the one packed step of every empty row to zero."""
        if self.empty_rows is None:
            return steps
        rows = self.batch_sizes[0]
        return torch.cat((torch.where(self.empty_rows.to(steps.device), 0.0, steps[:rows]), steps[rows:]))

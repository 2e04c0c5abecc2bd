"""Functions for the nested tensors that layers take and return: tensors, packed sequences and tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unrolled.engines.torch_ops import transforms


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a nested value, and return the results in the same structure."""
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), *value[1:])
    if isinstance(value, (tuple, list)):
        return tuple(map_tensors(part, function) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors of a nested value as a flat list."""
    flat: list[Tensor] = []
    map_tensors(value, lambda tensor: flat.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return flat


def add_axis(state: Tensor, in_place: bool) -> Tensor:
    """Return a state with a leading axis.

    Args:
        state: The state.
        in_place: Change the tensor itself if possible. Unlike a view, it can be detached in place, as in
            truncated backpropagation through time: ``state.detach_()``.
    """
    if not in_place or transforms.active() or state._is_view():
        return state.unsqueeze(0)
    return state.unsqueeze_(0)

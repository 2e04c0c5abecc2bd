"""The tensors in what layers take and return: tensors, packed sequences, and tuples of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with a function of each tensor in its place."""
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), *value[1:])
    if isinstance(value, (tuple, list)):
        return tuple(map_tensors(part, function) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    """All of them in a row."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found

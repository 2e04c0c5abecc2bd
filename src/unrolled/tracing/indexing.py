"""Indices as users give them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def same(again: Tensor, there: Tensor) -> Tensor:
    """Which numbers of a step run again are the same but for rounding."""
    if not (there.is_floating_point() or there.is_complex()):
        return again == there
    rounding = torch.finfo(there.dtype).eps ** 0.5
    largest = there.abs().nan_to_num(0, 0, 0).max() if there.numel() else 0
    return torch.isclose(again.to(there.dtype), there, rounding, float(largest) * rounding, equal_nan=True)


def whole_number(value: Any) -> int:
    """A whole number, of NumPy and torch too, such as what argmax gives. Raises a TypeError for others."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise TypeError(f"{value!r} is no number")
    return operator.index(value)


def position(what: str, index: int, size: int) -> int:
    """An index counted from 0; negative ones count from the end. Raises where there is no such one."""
    try:
        whole = whole_number(index)
    except TypeError:
        raise TypeError(f"the {what} should be a whole number, got {index!r}") from None
    if not -size <= whole < size:
        raise IndexError(f"there is no {what} {whole}: there are {size}, counted from 0")
    return whole % size

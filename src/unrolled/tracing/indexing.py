"""Validation of indices and comparison of tensors up to rounding."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def equal_up_to_rounding(actual: Tensor, expected: Tensor) -> Tensor:
    """Compare two tensors element by element, with a tolerance for rounding.

    Args:
        actual: The recomputed values.
        expected: The original values, of the same shape. They set the dtype and the tolerance.

    Returns:
        A boolean tensor. NaNs are equal to each other.
    """
    if not (expected.is_floating_point() or expected.is_complex()):
        return actual == expected
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    largest = expected.abs().nan_to_num(0, 0, 0).max() if expected.numel() else 0
    return torch.isclose(
        actual.to(expected.dtype), expected, tolerance, float(largest) * tolerance, equal_nan=True
    )


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor could be a copy of the other."""
    return a.dtype is b.dtype and a.device == b.device and torch.equal(a, b)


def absolute_differences(a: Tensor, b: Tensor) -> Tensor:
    """Return a 0, then the absolute differences, flattened. Equal infinities and NaNs differ by 0."""
    a, b = a.double().flatten(), b.double().flatten()
    equal = (a == b) | (a.isnan() & b.isnan())
    return torch.cat([a.new_zeros(1), (a - b).abs().masked_fill(equal, 0)])


def as_int(value: Any) -> int:
    """Convert an integer to ``int``, including integers of NumPy and torch, such as the result of ``argmax``.

    Raises:
        TypeError: If the value is a boolean or not an integer.
    """
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise TypeError(f"expected an integer, got {value!r}")
    return operator.index(value)


def normalize_index(what: str, index: int, size: int) -> int:
    """Return the index as a number from 0 to ``size - 1``; negative indices count from the end.

    Args:
        what: What is indexed, for error messages, such as ``"time step"``.
        index: The index.
        size: The number of elements.

    Raises:
        TypeError: If the index isn't an integer.
        IndexError: If the index is out of range.
    """
    try:
        value = as_int(index)
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {index!r}") from None
    if not -size <= value < size:
        raise IndexError(f"{what} {value} is out of range: there are {size}, counted from 0")
    return value % size

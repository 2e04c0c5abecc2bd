"""Calls outside of torch transforms."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")


def run_outside_transforms(function: Callable[[], _Result]) -> _Result:
    """Call a function in a new thread, where no torch transform is active."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()

"""An observer that is given launches instead of the native engine, to record what a call would launch."""

from __future__ import annotations

import array
import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol


class LaunchObserver(Protocol):
    """Takes the launches of the native engine in place of the hardware."""

    def launch(self, calls: Sequence[Any]) -> None:
        """Take kernel calls that are independent of each other, each a ``KernelCall``."""

    def run_bulk(self, function: int, operations: array.array[int]) -> None:
        """Take matrix products and sums of columns.

        Args:
            function: Address of the function that runs them.
            operations: Its first argument, see ``Products.run_bulk``.
        """


current_observer: ContextVar[LaunchObserver | None] = ContextVar("current_observer", default=None)


@contextlib.contextmanager
def observe_launches(observer: LaunchObserver) -> Iterator[None]:
    """Hand every launch of this thread to an observer, and run nothing."""
    token = current_observer.set(observer)
    try:
        yield
    finally:
        current_observer.reset(token)

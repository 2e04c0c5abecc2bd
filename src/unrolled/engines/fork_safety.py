"""Locks and computed attributes that stay usable in a forked child process.

A child has only the thread that forked. A lock that another thread of the parent held at that moment is never
released in the child, and what that thread was doing is never finished.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar, overload

_Value = TypeVar("_Value")

# A step is arbitrary code, which may wait for the thread that forks, so a fork doesn't wait for longer.
_LONGEST_DELAY = 10.0  # seconds
_delay_lock = threading.RLock()
_forking = threading.local()  # .locked: whether the fork of this thread holds _delay_lock


@contextmanager
def delay_forks() -> Iterator[None]:
    """Make forks of this process by other threads wait until the end of the block, up to 10 s.

    A block surrounds what can't be finished or undone in a child: imports, whose locks Python doesn't renew,
    and torch's tracing, which patches torch while it runs.
    """
    with _delay_lock:
        yield


def renew_after_fork(renew: Callable[[], None]) -> Callable[[], None]:
    """Call a function in every child process that forks from this one; usable as a decorator.

    Each module with a lock replaces the lock there::

        @renew_after_fork
        def _renew_lock() -> None:
            global _lock
            _lock = threading.Lock()

    Args:
        renew: Called in the child, before any other code of the child.

    Returns:
        The function itself.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=renew)
    return renew


class lazy_property(Generic[_Value]):  # noqa: N801  # used as a decorator, like functools.cached_property
    """An attribute that is computed at the first access and then stored in the instance.

    Unlike ``functools.cached_property`` of Python 3.11, it holds no lock while it computes. If several
    threads compute the value at the same time, all of them get the one that is stored first.
    """

    def __init__(self, compute: Callable[[Any], _Value]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> _Value: ...

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return vars(instance).setdefault(self._name, self._compute(instance))


def _begin_fork() -> None:
    _forking.locked = _delay_lock.acquire(timeout=_LONGEST_DELAY)


def _end_fork() -> None:
    if _forking.locked:
        _delay_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork)


@renew_after_fork
def _renew_lock() -> None:
    global _delay_lock
    _delay_lock = threading.RLock()

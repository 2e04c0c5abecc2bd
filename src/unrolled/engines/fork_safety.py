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
_LONGEST_DELAY = 60.0  # seconds
_delays: list[int] = []  # the thread of each block that delays forks
_delays_changed = threading.Condition()
_forking = threading.local()  # .locked: whether the fork of this thread holds the lock of _delays_changed


@contextmanager
def delay_forks() -> Iterator[None]:
    """Make forks of this process by other threads wait until the end of the block, up to 60 s.

    A block surrounds what can't be finished or undone in a child: imports, whose locks Python doesn't renew,
    torch's tracing, which patches torch while it runs, and the start of a subprocess, whose pipes a child
    would keep open. Several threads can be in such blocks at the same time.
    """
    thread = threading.get_ident()
    with _delays_changed:
        _delays.append(thread)
    try:
        yield
    finally:
        with _delays_changed:
            _delays.remove(thread)
            _delays_changed.notify_all()


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
    this_thread = threading.get_ident()
    _forking.locked = _delays_changed.acquire(timeout=_LONGEST_DELAY)
    if _forking.locked:  # until the end of the fork, so that no block begins meanwhile
        _delays_changed.wait_for(lambda: all(thread == this_thread for thread in _delays), _LONGEST_DELAY)


def _end_fork() -> None:
    if _forking.locked:
        _delays_changed.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork)


@renew_after_fork
def _forget_other_threads() -> None:
    global _delays_changed
    _delays_changed = threading.Condition()
    _delays[:] = [thread for thread in _delays if thread == threading.get_ident()]

"""Locks that stay usable in a forked child process."""

from __future__ import annotations

import os
from collections.abc import Callable


def renew_after_fork(renew: Callable[[], None]) -> Callable[[], None]:
    """Call a function in every child process that forks from this one; usable as a decorator.

    A child has only the thread that forked. A lock that another thread of the parent held at that moment is
    never released in the child, so each module with a lock replaces the lock there::

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

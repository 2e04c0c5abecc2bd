"""Blocks that record a model run what torch.compile compiled eagerly."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch

from unrolled.engines._torch_private import dynamo_imported
from unrolled.engines.fork_safety import delay_forks, renew_after_fork


class Block(Protocol):
    """A block that records the calls of one thread.

    Attributes:
        thread: The thread; 0 for none.
    """

    thread: int

    def __exit__(self, kind: None, error: None, trace: None, /) -> None: ...


_lock = threading.Lock()  # guards the two below
_running: list[Any] = []  # the blocks of all threads
_stance: Any = None  # the stance of torch.compile during these blocks; to be exited after the last one


def begin(block: Block) -> None:
    """Run what torch.compile compiled eagerly, since hooks don't see calls inside compiled code.

    Blocks of several threads can end in any order.
    """
    global _stance
    with _lock, delay_forks():
        if _stance is None and dynamo_imported():
            _stance = torch.compiler.set_stance("force_eager")
        _running.append(block)


def end(block: Block) -> None:
    """Run compiled code again if no other block is running."""
    global _stance
    with _lock, delay_forks():
        _running[:] = [other for other in _running if other is not block]
        if not _running and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None


@renew_after_fork
def _end_blocks_of_other_threads() -> None:
    """In a forked child, renew the lock and end the blocks of other threads, which are gone."""
    global _lock
    _lock = threading.Lock()
    for block in _running[:]:
        if block.thread != threading.get_ident():
            block.thread = 0
            block.__exit__(None, None, None)

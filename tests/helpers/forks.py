"""Forked children of a process in which another thread holds a lock."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any


def exit_code_of_child(lock: Any, function: Callable[[], Any], seconds: int = 300) -> int:
    """Fork while another thread holds a lock, call a function in the child, and return its exit code.

    A child that waits for the lock is ended by SIGALRM after some seconds; the code is then negative.
    """
    locked, done = threading.Event(), threading.Event()

    def hold_lock() -> None:
        with lock:
            locked.set()
            done.wait()

    thread = threading.Thread(target=hold_lock)
    thread.start()
    locked.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            function()
        except BaseException:  # the child must not go on with the tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        done.set()
        thread.join()

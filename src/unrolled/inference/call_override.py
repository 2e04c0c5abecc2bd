"""Calls of modules, taken over while a block runs, in one thread: for others the modules are as ever."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_Instead = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]

_here = threading.local()  # .taken: what takes over calls in this thread, by the module's id
_count: dict[int, int] = {}  # how many blocks, of all threads, want the calls of a module, by its id
_lock = threading.Lock()


@contextmanager
def intercepted(modules: Iterable[nn.Module], instead: _Instead) -> Iterator[None]:
    """Have ``instead(module, call, args, kwargs)`` run in the place of calls of modules in this thread.

    It may run ``call(*args, **kwargs)``, which is the module's own call with all its hooks. Of the module one
    attribute is set meanwhile, the one in which ``Module.compile`` keeps its result: copies and pickles leave
    it out (those of torch.nn's own recurrent layers don't).

    Args:
        modules: any.
        instead: what runs in their place.
    """
    modules = list(modules)
    before = getattr(_here, "taken", {})
    with _lock:
        for module in modules:
            if not _count.get(id(module)):
                held = vars(module).get("_compiled_call_impl")
                vars(module)["_compiled_call_impl"] = functools.partial(_call, module, held)
            _count[id(module)] = _count.get(id(module), 0) + 1
    _here.taken = {**before, **{id(module): instead for module in modules}}
    try:
        yield
    finally:
        _here.taken = before
        with _lock:
            for module in modules:
                _count[id(module)] -= 1
                if not _count[id(module)]:
                    del _count[id(module)]
                    held = vars(module)["_compiled_call_impl"].args[1]
                    vars(module)["_compiled_call_impl"] = held
                    if held is None:
                        del vars(module)["_compiled_call_impl"]


def _call(module: nn.Module, held: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """A call of a module, whoever makes it."""
    call = held or module._call_impl
    instead = getattr(_here, "taken", {}).get(id(module))
    return call(*args, **kwargs) if instead is None else instead(module, call, args, kwargs)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that the child doesn't have may hold the other one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

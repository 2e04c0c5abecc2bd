"""Override calls of modules inside a ``with`` block, for the calling thread only."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from unrolled.engines.fork_safety import renew_after_fork

_Override = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]

_thread = threading.local()  # .overrides: the overrides of this thread, by the module's id
_block_count: dict[int, int] = {}  # number of active blocks of all threads, by the module's id
_lock = threading.Lock()


@contextmanager
def override_calls(modules: Iterable[nn.Module], override: _Override) -> Iterator[None]:
    """Run ``override(module, call, args, kwargs)`` instead of each call of the modules in this thread.

    The override may run ``call(*args, **kwargs)``, the original call with all hooks. Inside the block, the
    attribute in which ``Module.compile`` stores its result is set on each module. Copies and pickles of a
    module leave this attribute out, except for those of torch.nn's recurrent layers.

    Args:
        modules: The modules.
        override: The function to call instead.
    """
    modules = list(modules)
    outer_overrides = getattr(_thread, "overrides", {})
    with _lock:
        for module in modules:
            if not _block_count.get(id(module)):
                compiled_call = vars(module).get("_compiled_call_impl")
                vars(module)["_compiled_call_impl"] = functools.partial(_call, module, compiled_call)
            _block_count[id(module)] = _block_count.get(id(module), 0) + 1
    _thread.overrides = {**outer_overrides, **{id(module): override for module in modules}}
    try:
        yield
    finally:
        _thread.overrides = outer_overrides
        with _lock:
            for module in modules:
                _block_count[id(module)] -= 1
                if not _block_count[id(module)]:
                    del _block_count[id(module)]
                    compiled_call = vars(module)["_compiled_call_impl"].args[1]
                    vars(module)["_compiled_call_impl"] = compiled_call
                    if compiled_call is None:
                        del vars(module)["_compiled_call_impl"]


def _call(module: nn.Module, compiled_call: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Run a module's override if this thread has one, else its original call."""
    call = compiled_call or module._call_impl
    override = getattr(_thread, "overrides", {}).get(id(module))
    return call(*args, **kwargs) if override is None else override(module, call, args, kwargs)


@renew_after_fork
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()

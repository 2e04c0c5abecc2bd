"""Override calls of modules inside a ``with`` block, for the calling thread only."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import nn

from unrolled.engines.fork_safety import renew_after_fork

_Override = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]

_thread = threading.local()  # .overrides: the overrides of this thread, by the module's id
_blocks: dict[object, tuple[int, list[nn.Module]]] = {}  # active blocks: their threads and modules
_lock = threading.Lock()  # guards the dictionary


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
    modules, block = list(modules), object()
    outer_overrides = getattr(_thread, "overrides", {})
    with _lock:
        _blocks[block] = threading.get_ident(), modules
        for module in modules:
            compiled_call = vars(module).get("_compiled_call_impl")
            if not _is_override(compiled_call):
                vars(module)["_compiled_call_impl"] = functools.partial(_call, module, compiled_call)
    _thread.overrides = {**outer_overrides, **{id(module): override for module in modules}}
    try:
        yield
    finally:
        _thread.overrides = outer_overrides
        with _lock:
            _end(block)


def _end(block: object) -> None:
    """Remove a block, and restore the calls of its modules that no other block overrides."""
    _, modules = _blocks.pop(block)
    overridden = {id(module) for _, others in _blocks.values() for module in others}
    for module in modules:
        call = vars(module).get("_compiled_call_impl")
        if id(module) not in overridden and _is_override(call):
            compiled_call = call.args[1]
            vars(module)["_compiled_call_impl"] = compiled_call
            if compiled_call is None:
                del vars(module)["_compiled_call_impl"]


def _is_override(call: Any) -> TypeGuard[functools.partial[Any]]:
    return isinstance(call, functools.partial) and call.func is _call


def _call(module: nn.Module, compiled_call: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Run a module's override if this thread has one, else its original call."""
    call = compiled_call or module._call_impl
    override = getattr(_thread, "overrides", {}).get(id(module))
    return call(*args, **kwargs) if override is None else override(module, call, args, kwargs)


@renew_after_fork
def _keep_blocks_of_this_thread() -> None:
    """In a forked child, renew the lock and end the blocks of other threads, which are gone."""
    global _lock
    _lock = threading.Lock()
    for block, (thread, _) in list(_blocks.items()):
        if thread != threading.get_ident():
            _end(block)

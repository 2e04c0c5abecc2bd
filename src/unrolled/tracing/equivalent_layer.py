"""The layer of this library that computes what a recurrent module computes; for subclasses, too.

A subclass that overrides `forward` can change arguments and results around its call of `super().forward`. Its
parameters determine only what that inner call computes, so that is the call to observe.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from unrolled.engines.fork_safety import renew_after_fork
from unrolled.layers.cell_layers import is_single_step, layer_of_cell
from unrolled.layers.convert import as_recurrent
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import CELLS, LAYERS, DropInCell, DropInLayer

_BASES: tuple[Any, ...] = (
    DropInLayer,
    Recurrent,
    DropInCell,
    SingleStep,
    *(ours.torch_class for ours in LAYERS),
    *(ours.torch_class for ours in CELLS),
)


def equivalent_layer(module: nn.Module) -> Recurrent:
    """Return a layer of this library that computes what the `forward` of a module's base class computes.

    Args:
        module: A recurrent layer or single-step cell of this library or of torch.nn, or of a subclass.

    Raises:
        TypeError: If the module isn't recurrent, or its `forward` can't be one that calls that of its base.
    """
    if is_single_step(module):
        if "forward" in vars(module):
            raise TypeError(f"{type(module).__name__} replaces the forward method of its class")
        return layer_of_cell(module)
    if overridden_base(module) is None:
        return as_recurrent(module)
    if isinstance(module, Recurrent):
        return module
    if parametrize.is_parametrized(module):
        return as_recurrent(module)  # raises the error
    base = next(ours.torch_class for ours in LAYERS if isinstance(module, ours.torch_class))
    plain = object.__new__(base)
    vars(plain).update(vars(module))
    return as_recurrent(plain)


def overridden_base(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of this library or torch.nn whose `forward` a subclass overrides, or None."""
    if "forward" in vars(module):
        return None
    first, *others = (cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return None if first in _BASES else next((cls for cls in others if cls in _BASES), None)


_Before = Callable[[nn.Module, Any, Any], None]
_After = Callable[[nn.Module, Any, Any, Any], None]
_observers: dict[type[nn.Module], list[tuple[set[int], _Before, _After]]] = {}
_originals: dict[type[nn.Module], Any] = {}
_lock = threading.Lock()  # guards both


def observe_inner_calls(modules: list[nn.Module], before: _Before, after: _After) -> Callable[[], None]:
    """Call functions around the calls of `super().forward` in the overriding `forward` of some modules.

    Meanwhile, the `forward` of the base class is wrapped.

    Args:
        modules: Modules with an :func:`overridden_base`.
        before: Called with module, args and kwargs.
        after: Called with module, args, kwargs and the result.

    Returns:
        A function that ends this.
    """
    by_base: dict[type[nn.Module], set[int]] = {}
    for module in modules:
        base = overridden_base(module)
        assert base is not None
        by_base.setdefault(base, set()).add(id(module))
    added = [(base, (ids, before, after)) for base, ids in by_base.items()]
    with _lock:
        for base, observer in added:
            _observers.setdefault(base, []).append(observer)
            if base not in _originals:
                _originals[base] = vars(base)["forward"]
                base.forward = _wrapped(base, _originals[base])

    def end() -> None:
        with _lock:
            for base, observer in added:
                _observers[base].remove(observer)
                if not _observers[base]:
                    base.forward = _originals.pop(base)

    return end


def _wrapped(base: type[nn.Module], original: Any) -> Any:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        active = [observer for observer in _observers[base] if id(self) in observer[0]]
        for _, before, _ in active:
            before(self, args, kwargs)
        result = original(self, *args, **kwargs)
        for _, _, after in active:
            after(self, args, kwargs, result)
        return result

    return forward


@renew_after_fork
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()

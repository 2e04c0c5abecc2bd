"""Users' subclasses of torch.nn's recurrent layers and cells, whose inherited part runs on this library.

A converted instance keeps its class as a base: for ``class Mine(nn.LSTM)``, the new class is a subclass of
``Mine``, and ``super()`` in the methods of ``Mine`` finds :class:`unrolled.LSTM` before ``nn.LSTM``.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import nn

# What the forward methods of torch.nn use, and those of this library don't.
_USED_BY_FORWARD = frozenset({
    "_all_weights", "_flat_weights", "_flat_weights_names", "_init_flat_weights", "_update_flat_weights",
    "all_weights", "check_forward_args", "check_hidden_size", "check_input", "get_expected_cell_size",
    "get_expected_hidden_size", "permute_hidden",
})  # fmt: skip
_STORES_STATE = frozenset({"__getstate__", "__reduce__", "__reduce_ex__", "__setstate__"})


def conflict(name: str, ours: Any, base: Any) -> str | None:
    """Return why a user's attribute of a torch.nn module prevents its conversion, or None if it doesn't.

    Args:
        name: Name of the attribute.
        ours: The class of this library, or an instance, that replaces the module.
        base: The class of torch.nn, or an instance.
    """
    if name in _USED_BY_FORWARD:
        return f"it replaces {name}, which torch.nn's forward method uses"
    if name == "_compiled_call_impl":
        return "it is compiled: convert it before Module.compile()"
    if hasattr(ours, name) and not hasattr(base, name):
        return f"its attribute {name!r} has a meaning in unrolled.{_class_name(ours)}: rename it"
    return None


def reason_to_keep(cls: Any, ours: Any, base: Any) -> str | None:
    """Return why instances of a subclass must not be converted, or None if they can be.

    Args:
        cls: The subclass.
        ours: The class of this library that replaces ``base``.
        base: The class of torch.nn that it inherits from.
    """
    for owner in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(owner).items():
            if name == "forward" and not _calls_super(value):
                return f"{owner.__name__}.forward doesn't call super().forward"
            if name in _STORES_STATE or (name == "__slots__" and value):
                return f"{owner.__name__} has its own {name}"
            reason = conflict(name, ours, base)
            if reason is not None:
                return f"{owner.__name__}: {reason}"
    try:
        converted_class(cls, ours, base)
    except TypeError as error:  # a metaclass, or __init_subclass__, may refuse
        return f"a subclass of it can't be created: {error}"
    return None


def _calls_super(forward: Any) -> bool:
    """Return whether a forward method calls that of its base class."""
    code: Any = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and {"super", "forward"} <= {*code.co_names}


@functools.lru_cache(maxsize=1000)
def converted_class(cls: Any, ours: Any, base: Any) -> Any:
    """Return a subclass of a torch.nn class that computes as a class of this library.

    Args:
        cls: ``base``, or a subclass of it.
        ours: The class of this library that replaces ``base``.
        base: A class of torch.nn.

    Raises:
        TypeError: If ``cls`` can't be subclassed.
    """
    bases = (ours, base) if cls is base else (cls, converted_class(base, ours, base))
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_converted_from": (cls, ours, base),
    }
    return types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))


def original_class(cls: type[nn.Module]) -> Any:
    """Return the class that :func:`converted_class` was given, None if ``cls`` isn't a converted class."""
    origin: Any = vars(cls).get("_converted_from")
    return None if origin is None else origin[0]


def with_class(module: nn.Module, cls: Any) -> nn.Module:
    """Return a module of a subclass with the attributes of a module, without a call of its constructor."""
    instance: nn.Module = object.__new__(cls)
    vars(instance).update(vars(module))
    return instance


def _reduce(module: Any, protocol: Any) -> Any:
    """Copy and pickle a converted instance by its original class."""
    return _new_instance, type(module)._converted_from, module.__getstate__()


def _new_instance(cls: Any, ours: Any, base: Any) -> Any:
    return object.__new__(converted_class(cls, ours, base))


def _class_name(value: Any) -> str:
    name: str = (value if isinstance(value, type) else type(value)).__name__
    return name

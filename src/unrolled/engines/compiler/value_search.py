"""Search for the Python values that a cell's step may read.

The search follows the code of the step: the globals, closures and attributes that it names, and those of each
function and method that it may call. It ends at torch, NumPy, the standard library and installed packages.
"""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import enum
import functools
import hashlib
import importlib.util
import operator
import os
import secrets
import sys
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell, Param
from unrolled.engines.compiler.code_names import code_content, code_names, is_installed, is_standard
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.process_state import (
    is_compiled_module,
    is_keyed_module,
    reads_process_state,
    replaced_function,
)
from unrolled.engines.compiler.watched_values import WatchedValues
from unrolled.engines.memory import memory_of

_MAX_VALUES = 5000
_FIXED_PACKAGES = {"torch", "numpy", "unrolled"}  # neither their code nor their globals change
_FOLLOWED_MODULES = "unrolled.cells."  # whose code is searched all the same
_PLAIN_TYPES = {
    int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented), slice, range,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
}  # fmt: skip
_DESCRIPTORS: dict[Any, tuple[str, ...]] = {  # by type: the attributes that hold functions
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
    functools.cached_property: ("func",),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.partial: ("func", "args", "keywords"),
    types.MethodType: ("__func__", "__self__"),
}
_FUNCTION_TYPES = types.FunctionType, *_DESCRIPTORS
_CONTAINER_MODULES = {"collections", "configparser"}  # of the standard library, with values in attributes
_GETTERS = operator.attrgetter, operator.itemgetter, operator.methodcaller
_BUILTIN_TYPES = types.BuiltinFunctionType, types.MethodWrapperType
_MAPPINGS = dict, types.MappingProxyType
_COLLECTIONS = (*_MAPPINGS, list, collections.deque, set, frozenset, tuple)
# Functions that may read an attribute whose name is computed.
_READ_ANY_NAME = {"getattr", "vars", "__dict__", "asdict", "astuple", "fields", "attrgetter", "dir", "eval"}
# What torch knows only while the step itself runs.
_UNKNOWN_IN_LOOPS = {
    "is_grad_enabled", "requires_grad", "is_inference_mode_enabled", "is_inference", "is_leaf", "grad_fn",
}  # fmt: skip
_USED_BY_ENGINES = {"bind", "innermost"}  # methods of a cell that aren't searched
_CONSTRUCTORS = {"__init__", "__new__"}
_NOT_IN_STEP = {"__repr__", "__init_subclass__", "__getstate__", "__setstate__"}
# Attributes of a cell that its class, sizes and options determine.
_DERIVED = {
    "input", "hidden", "bias", "unbound", "features", "training", "_shapes", "_state_sizes", "_engine_cache",
}  # fmt: skip
_HEAP_TYPE = 1 << 9  # a flag of classes that aren't part of the interpreter
_PROCESS = secrets.token_hex(8)  # tells ids of objects of different processes apart


class ValueSearch:
    """One search for the values that a step may read.

    Args:
        cell: The cell, without wrappers and tensors.
        names: Names of the attributes that the step and the functions that it calls may read.

    Attributes:
        names: The names, and those that this search has found in functions.
        contents: The values by path, such as ``self.act.alpha``. Equal values have equal contents.
        watched: The places where they were found.
        opaque: Objects that are told apart by their ids, because their values can't be read.
        only_here: Path of the first value or function that may be another one in another process, although
            the contents are equal. Empty if there is none.

    Raises:
        UnsupportedError: If there are too many values.
    """

    def __init__(self, cell: Cell, names: frozenset[str]) -> None:
        self.names, self.contents, self.watched = {"step", *names}, dict[str, str](), WatchedValues()
        self.opaque: list[Any] = []
        self.only_here = ""
        self._package = _root(type(cell).__module__)
        self._reads_any_name = not names.isdisjoint(_READ_ANY_NAME)
        self._paths: dict[int, str] = {}  # of objects, by id
        self._alive: list[Any] = []  # keeps the ids of these objects from being reused
        self._items_read: set[tuple[int, Any]] = set()  # ids of dictionaries, with keys
        self._add("sizes", cell.input, cell.hidden, cell.bias, cell.shapes(), cell.state_sizes())
        self._value(cell, "self")
        if replaced := replaced_function(self.names):
            self._note_only_here(replaced)

    def _is_followed(self, module: str | None) -> bool:
        """Return whether the code of a module is searched: the user's, and that of the published cells."""
        root = _root(module or "")
        if root in _FIXED_PACKAGES:
            return (module or "").startswith(_FOLLOWED_MODULES)
        return root == self._package or not (is_installed(root) or is_standard(root))

    def _add(self, path: str, *content: Any) -> None:
        while path in self.contents:  # two keys of a dictionary may look the same
            path += "'"
        self.contents[path] = repr(content)

    def _note_only_here(self, path: str) -> None:
        self.only_here = self.only_here or path

    def _add_opaque(self, path: str, value: Any) -> None:
        self.opaque.append(value)
        self._note_only_here(path)
        self._add(path, _qualified_name(type(value)), id(value), _PROCESS)

    def _add_outside(self, path: str, value: Any) -> None:
        """Add a class or a function whose code isn't searched."""
        if "<locals>" in value.__qualname__:
            self._add_opaque(path, value)
        elif not is_keyed_module(value.__module__ or ""):
            self._note_only_here(path)

    def _item(self, mapping: Any, key: Any, path: str) -> None:
        """Read an item of a namespace."""
        if (id(mapping), key) not in self._items_read:
            self._items_read.add((id(mapping), key))
            self._alive.append(mapping)
            self._value(self.watched.item(mapping, key), path)

    def _attribute(self, owner: Any, name: str, path: str) -> None:
        try:
            value = self.watched.attribute(owner, name)
        except (AttributeError, ValueError):  # an empty slot or closure
            return
        self._value(value, path)

    def _value(self, value: Any, path: str) -> None:
        kind: Any = type(value)
        if kind in _PLAIN_TYPES or issubclass(kind, np.generic):
            self._add(path, kind.__name__, repr(value))  # NaN equals NaN, and 0.0 doesn't equal -0.0
            if kind is str:
                self.names.update(part for part in value.split(".") if part.isidentifier())
            return
        if id(value) in self._paths:
            self._add(path, "same as", self._paths[id(value)])
            return
        self._paths[id(value)] = path
        self._alive.append(value)
        if len(self._paths) > _MAX_VALUES:
            raise UnsupportedError(f"its step may read over {_MAX_VALUES} Python values (such as {path})")
        if isinstance(value, Cell):
            self._cell(value, path)
        elif isinstance(value, Tensor):
            self._tensor(value, path)
        elif isinstance(value, (np.ndarray, array.array, bytearray, memoryview)):
            self._array(value, path)
        elif value is os.environ or value is os.getenv:
            self._environment(path)
        elif isinstance(value, types.ModuleType):
            self._module(value, path)
        elif isinstance(value, type):
            self._class(value, path)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, contextvars.ContextVar):
            self._value(self.watched.result(functools.partial(value.get, None)), f"{path}.get()")
        elif isinstance(value, weakref.ref):
            self._value(value(), f"{path}()")
        elif kind in _DESCRIPTORS:
            self._add(path, kind.__name__)
            for name in _DESCRIPTORS[kind]:
                self._value(getattr(value, name), f"{path}.{name}")
        elif isinstance(value, _BUILTIN_TYPES):
            self._add(path, kind.__name__, value.__name__)
            if value.__module__ and not is_keyed_module(value.__module__):
                self._note_only_here(path)
            self._value(value.__self__, f"{path}.__self__")
        elif isinstance(value, _GETTERS):
            self._add(path, kind.__name__)
            self._value(value.__reduce__()[1], f"{path}()")
        elif isinstance(value, enum.Enum):
            self._value(kind, f"{path}.__class__")
            self._add(path, value.name)
            self._value(value.value, f"{path}.value")
        elif not isinstance(value, Param):
            self._object(value, path)

    def _cell(self, cell: Cell, path: str) -> None:
        attributes = vars(cell)
        self._value(type(cell), f"{path}.__class__")
        self.watched.size(attributes)
        for name in [*attributes]:
            if name in _DERIVED or isinstance(getattr(type(cell), name, None), Param):
                continue
            if isinstance(value := attributes[name], Tensor):  # an input of the captured graph
                self._add(f"{path}.{name}", value.dtype, value.shape, value.requires_grad)
            else:
                self._item(attributes, name, f"{path}.{name}")

    def _tensor(self, tensor: Tensor, path: str) -> None:
        self._add_opaque(path, tensor)
        if not tensor.is_inference():
            self._add(f"{path}._version", self.watched.content(lambda: tensor._version))
        content = self.watched.content(lambda: memory_of(tensor)) or b""
        self._add(f"{path}.data", hashlib.sha256(content).hexdigest())

    def _array(self, value: Any, path: str) -> None:
        def content() -> Any:
            if isinstance(value, np.ndarray):
                data = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
                return value.dtype.str, value.shape, data
            return getattr(value, "typecode", ""), bytes(value)

        *header, data = self.watched.content(content)
        self._add(path, type(value).__name__, header, hashlib.sha256(data).hexdigest())

    def _environment(self, path: str) -> None:
        environment: Any = os.environ  # its own methods decode all variables, which takes 20 times as long
        ignored = environment.encodekey("TORCHINDUCTOR_CACHE_DIR")  # torch sets it
        # All others, because a step may compute a name.
        variables = self.watched.content(lambda: {**environment._data, ignored: None})
        self._note_only_here(path)
        self._add(path, sorted(variables.items()))

    def _module(self, module: types.ModuleType, path: str) -> None:
        self._add(path, module.__name__)
        root = _root(module.__name__)
        is_followed = self._is_followed(module.__name__)
        is_keyed = "__getattr__" not in vars(module) if is_followed else is_keyed_module(module.__name__)
        if not is_keyed or module.__name__ == "builtins":
            self._note_only_here(path)
        if module is os and not self.names.isdisjoint(("environ", "getenv")):
            self._environment(f"{path}.environ")
        if root not in _FIXED_PACKAGES and not is_standard(root):
            for name in sorted(self.names & vars(module).keys()):
                self._item(vars(module), name, f"{module.__name__}.{name}")

    def _class(self, cls: type, path: str) -> None:
        """Read the attributes of a class, and of its base classes."""
        self._add(path, [_qualified_name(base) for base in cls.__mro__])
        if not self._is_followed(cls.__module__):
            self._add_outside(path, cls)
            return
        if is_compiled_module(cls.__module__):
            self._note_only_here(path)
        if type(cls) is not type:
            self._value(type(cls), f"{path}.__class__")
        bases = [base for base in cls.__mro__ if self._is_followed(base.__module__) and base is not Cell]
        # Code that isn't searched may call any method: torch, for instance, that of an nn.Module.
        any_method = len({*cls.__mro__} - {*bases, object, Cell}) > 0
        not_called = _NOT_IN_STEP if cls.__name__ in self.names else _NOT_IN_STEP | _CONSTRUCTORS
        for base in bases:
            if (
                issubclass(cls, Cell)
                and _USED_BY_ENGINES & vars(base).keys()
                and _root(base.__module__) != "unrolled"
            ):
                self._note_only_here(path)
            self.watched.size(vars(base))
            for name in sorted(vars(base)):
                is_special = name.startswith("__")
                is_read = (
                    name in self.names or name == "__call__" or (self._reads_any_name and not is_special)
                )
                if isinstance(value := vars(base)[name], _FUNCTION_TYPES):
                    is_read |= name not in not_called and (is_special or any_method)
                elif (is_special and name != "__call__") or isinstance(value, Param):
                    continue
                elif isinstance(value, Tensor) and issubclass(cls, Cell):  # an input of the captured graph
                    self._add(
                        f"{_qualified_name(base)}.{name}", value.dtype, value.shape, value.requires_grad
                    )
                    continue
                if is_read:
                    self._item(vars(base), name, f"{_qualified_name(base)}.{name}")

    def _function(self, function: types.FunctionType, path: str) -> None:
        scope, attributes = function.__globals__, vars(function)
        module = scope.get("__name__")
        if "__wrapped__" in attributes:
            self._value(attributes["__wrapped__"], f"{path}.__wrapped__")
        if not self._is_followed(module):
            self._add(path, _qualified_name(function))
            self._add_outside(path, function)
            if is_standard(_root(module or "")):  # such as functools.singledispatch
                for k, cell in enumerate(function.__closure__ or ()):
                    self._attribute(cell, "cell_contents", f"{path}.<{k}>")
            return
        code = self.watched.attribute(function, "__code__")
        names = code_names(code)
        unknown = names.read & _UNKNOWN_IN_LOOPS or names.globals & {"eval", "exec"}
        if unknown:
            raise UnsupportedError(f"it reads {sorted(unknown)[0]}, which a compiled loop doesn't know")
        if state := reads_process_state(names, scope):
            self._note_only_here(f"{path}: {state}")
        self._add(path, hashlib.sha256(repr(code_content(code)).encode()).hexdigest())
        self.names |= names.all
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name):
                self._attribute(function, name, f"{path}.{name}")
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._attribute(cell, "cell_contents", f"{path}.<{name}>")
        if attributes:
            self._value(attributes, f"{path}.__dict__")
        read = names.globals | names.all if "globals" in names.globals else names.globals
        for name in sorted(read & scope.keys()):
            if _root(module or "") == "unrolled":  # nobody changes these
                self._value(scope[name], f"{module}.{name}")
            else:
                self._item(scope, name, f"{module}.{name}")
        for name in sorted(names.modules):
            if name.startswith(".") and scope.get("__package__"):
                with contextlib.suppress(ImportError):
                    name = importlib.util.resolve_name(name, scope["__package__"])
            if name in sys.modules:
                self._value(sys.modules[name], name)

    def _object(self, value: Any, path: str) -> None:
        """Read the items and attributes of a collection or of any other object."""
        cls = type(value)
        is_followed = self._is_followed(cls.__module__)
        attributes = getattr(value, "__dict__", None)
        is_fixed = _root(cls.__module__) in _FIXED_PACKAGES and not isinstance(value, nn.Module)
        has_hidden_value = any(
            not base.__flags__ & _HEAP_TYPE and base is not object and base not in _COLLECTIONS
            for base in cls.__mro__
        )
        is_opaque = has_hidden_value or (not is_followed and (not attributes or is_fixed))
        if is_opaque and not isinstance(value, _COLLECTIONS):
            self._add_opaque(path, value)
        if is_fixed:
            self._note_only_here(path)
            return
        self._value(cls, f"{path}.__class__")
        if isinstance(value, _COLLECTIONS):
            self._items(value, path)
        if attributes:
            # Code that isn't searched may read any attribute, but the standard library reads none of a user.
            by_name = not self._reads_any_name and all(
                self._is_followed(base.__module__)
                or (is_standard(_root(base.__module__)) and base.__module__ not in _CONTAINER_MODULES)
                for base in cls.__mro__
            )
            self.watched.size(attributes)
            read = {*self.names, "__wrapped__"}
            names = [name for name in map(str, attributes) if not by_name or name in read]
            for name in sorted(names):
                self._item(attributes, name, f"{path}.{name}")
        elif attributes is not None:
            self.watched.size(attributes)
        for name in sorted(self.names) if is_followed else ():
            if isinstance(getattr(cls, name, None), types.MemberDescriptorType):  # a slot
                self._attribute(value, name, f"{path}.{name}")

    def _items(self, value: Any, path: str) -> None:
        """Read the items of a collection."""
        self._add(path, len(value))
        if isinstance(value, _MAPPINGS):
            self.watched.sequence(value)
            self.watched.sequence(value.values())
            for k, (key, item) in enumerate([*value.items()]):
                if type(key) not in (str, int):
                    self._value(key, f"{path}.keys[{k}]")
                self._value(item, f"{path}[{key!r}]")
            return
        if not isinstance(value, (tuple, frozenset)):
            self.watched.sequence(value)
        is_set = isinstance(value, (set, frozenset))
        for k, item in enumerate(sorted(value, key=repr) if is_set else [*value]):
            self._value(item, f"{path}[{k}]")


def _root(module: str) -> str:
    return module.partition(".")[0]


def _qualified_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"

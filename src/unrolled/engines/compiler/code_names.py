"""The names that the code of a Python function uses, and where code comes from."""

from __future__ import annotations

import dis
import functools
import os
import sys
import types
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CodeNames:
    """The names in the code of a function, including the functions that it defines.

    Attributes:
        globals: Names of globals.
        modules: Names of modules that it may import. Those of relative imports begin with dots.
        imports: Modules that import statements name, each with the names that it imports from it.
        read: Names of globals, attributes and imported modules.
        all: These names, and the strings that may be names of attributes.
    """

    globals: frozenset[str]
    modules: frozenset[str]
    imports: frozenset[tuple[str, tuple[str, ...]]]
    read: frozenset[str]
    all: frozenset[str]


@functools.lru_cache(maxsize=1000)
def code_names(code: types.CodeType) -> CodeNames:
    """Return the names in the code of a function."""
    scope, modules, read = set[str](), set[str](), set(code.co_names)
    imports = set[tuple[str, tuple[str, ...]]]()
    names = set(read)
    constants: list[Any] = []  # loaded last
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            scope.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            level, items = constants[-2:]
            module = "." * level + instruction.argval
            separator = "." if instruction.argval else ""
            modules |= {module, *(f"{module}{separator}{item}" for item in items or ())}
            imports.add((module, items or ()))
        elif instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            constants.append(instruction.argval)
    pending = [*code.co_consts]
    for constant in pending:
        if isinstance(constant, types.CodeType):
            inner = code_names(constant)
            scope |= inner.globals
            modules |= inner.modules
            imports |= inner.imports
            read |= inner.read
            names |= inner.all
        elif isinstance(constant, (tuple, frozenset)):
            pending += constant
        elif isinstance(constant, str):
            modules.add(constant)  # for importlib.import_module or sys.modules
            names.update(part for part in constant.split(".") if part.isidentifier())
    return CodeNames(
        frozenset(scope), frozenset(modules), frozenset(imports), frozenset(read), frozenset(names)
    )


def code_content(value: Any) -> Any:
    """Return a code object, or a constant in it, as numbers and strings, without file and line numbers."""
    if isinstance(value, types.CodeType):
        constants = [code_content(constant) for constant in value.co_consts]
        variables = value.co_varnames, value.co_cellvars, value.co_freevars
        arguments = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        return value.co_code, value.co_exceptiontable, value.co_names, variables, arguments, constants
    if isinstance(value, tuple):
        return tuple(map(code_content, value))
    if isinstance(value, frozenset):
        return "frozenset", sorted(map(repr, map(code_content, value)))
    return repr(value)


def _file(package: str) -> str:
    return getattr(sys.modules.get(package), "__file__", None) or ""


@functools.lru_cache(maxsize=1000)
def is_installed(package: str) -> bool:
    """Return whether a package lies in a folder of installed packages."""
    return "site-packages" in _file(package) or "dist-packages" in _file(package)


@functools.lru_cache(maxsize=1000)
def is_standard(package: str) -> bool:
    """Return whether a package is part of the standard library, not a module of the user with its name."""
    file = _file(package)  # empty for modules that are part of the interpreter
    is_in_folder = not file or file.startswith(os.path.dirname(os.__file__))
    return package in sys.stdlib_module_names and is_in_folder

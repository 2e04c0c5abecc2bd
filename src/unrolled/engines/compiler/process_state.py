"""Code that may read what the search for values doesn't see: the state of the process, files, other packages.

What such code returns is a constant of a captured graph, so the graph isn't valid in other processes.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Collection, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unrolled.engines.compiler.code_names import CodeNames

# Modules whose functions return the same in every process with the same Python version.
_PURE_MODULES = {
    "__future__", "_abc", "_collections", "_collections_abc", "_functools", "_operator", "_weakref", "abc",
    "array", "builtins", "cmath", "collections", "contextlib", "copy", "dataclasses", "enum", "fractions",
    "functools", "itertools", "math", "numbers", "operator", "re", "string", "textwrap", "types", "typing",
    "warnings", "weakref",
}  # fmt: skip
_KEYED_PACKAGES = {"torch", "numpy"}  # the name of a stored capture hashes their versions
_KEYED_MODULES = "unrolled.cells"  # and the sources of these
_BUILTINS = {"__import__", "breakpoint", "hash", "id", "input", "open"}
_EXTENSIONS = tuple(importlib.machinery.EXTENSION_SUFFIXES)
# Names of functions and modules of torch and NumPy that read files, settings or registered functions.
_NAMES = {
    "accelerator", "backends", "classes", "cuda", "device_count", "distributed", "from_file", "fromfile",
    "fromregex", "genfromtxt", "hub", "initial_seed", "is_available", "library", "load", "loadtxt", "memmap",
    "mps", "ops", "seed", "xpu",
    *(name for name in dir(torch) if name.startswith(("are_", "get_", "set_")) and name != "get_device"),
    *(name for name in dir(torch) if name.endswith(("_available", "_enabled"))),
}  # fmt: skip
_OWNERS: tuple[tuple[str, Any], ...] = (
    *(("torch", owner) for owner in (torch, functional, Tensor, torch.special, torch.linalg, torch.fft)),
    ("numpy", np),
)


def is_keyed_module(module: str) -> bool:
    """Return whether a module that isn't searched computes the same in every process with the same key."""
    root = module.partition(".")[0]
    if root == "unrolled":
        return module.startswith(_KEYED_MODULES)
    return root in _KEYED_PACKAGES or root in _PURE_MODULES


def is_compiled_module(module: str) -> bool:
    """Return whether a module is an extension in machine code, which the search can't read."""
    return (getattr(sys.modules.get(module), "__file__", None) or "").endswith(_EXTENSIONS)


def reads_process_state(names: CodeNames, scope: Mapping[str, Any]) -> str:
    """Return the name of something outside that a function may read, or an empty string.

    Args:
        names: The names in its code.
        scope: Its globals.
    """
    found = (
        (names.globals - scope.keys()) & _BUILTINS | names.globals & {"__builtins__"} | names.read & _NAMES
    )
    if found:
        return min(found)
    for module, items in names.imports:
        try:
            name = importlib.util.resolve_name(module, scope.get("__package__"))
        except ImportError:
            return module
        imported = sys.modules.get(name)
        # A module that will be imported by the step has not been searched.
        if imported is None or not all(
            hasattr(imported, item) or f"{name}.{item}" in sys.modules for item in items
        ):
            return name
    return ""


def replaced_function(names: Collection[str]) -> str:
    """Return the name of a function of torch or NumPy that other code has replaced, or an empty string.

    Args:
        names: The names of the functions to check.
    """
    for package, owner in _OWNERS:
        for name in names:
            value = vars(owner).get(name)
            if isinstance(value, FunctionType):
                module = str(value.__globals__.get("__name__"))
                if module.partition(".")[0] != package:
                    return name
    return ""

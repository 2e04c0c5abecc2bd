"""Captured steps that other processes have stored, so that a process needn't capture a step again.

The name of an entry hashes everything that a capture depends on. If not all of it is known, nothing is
stored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unrolled._version import __version__
from unrolled.cells.base import Cell
from unrolled.engines import log
from unrolled.engines._torch_private import (
    DeviceContext,
    any_autocast_enabled,
    any_global_module_hook,
    current_dispatch_mode,
    function_modes,
    functorch_interpreter,
)
from unrolled.engines.compiler.capture import INDEX_DTYPES, CapturedStep
from unrolled.engines.compiler.checks import tensor_attributes
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.compiler.stored_graph import NotStorableError, from_data, to_data

_FORMAT = 1  # raised when the data of an entry changes its form or meaning
_PARTS = "cells", "engines"  # of this package, on whose sources a captured graph depends
_IMPORTED_AT = time.time() - 2  # a little before these sources were imported


class Store(Protocol):
    """A place where texts are stored by name."""

    def read(self, name: str) -> str | None:
        """Return a text, or None if it isn't there or is damaged."""

    def write(self, name: str, text: str) -> None:
        """Store a text, if that is possible."""


class Entry:
    """What is stored for a cell, or may be stored.

    Args:
        kind: What it is, such as ``"capture"``.
        cell: The cell.
        training: Whether the cell is in training mode.
        dtype: Dtype of the input, the states and the parameters.
        store: Where it is stored. If None, nothing is stored or read.
    """

    def __init__(
        self, kind: str, cell: Cell, training: bool, dtype: torch.dtype, store: Store | None
    ) -> None:
        self._arguments = kind, cell, training, dtype
        self._store = store
        self._name = None if store is None else _name(*self._arguments)

    @property
    def is_storable(self) -> bool:
        """Whether there is a store, and all that the data depends on is known."""
        return self._store is not None and self._name is not None

    def read(self) -> Any:
        """Return the data, or None if there is none."""
        if self._store is None or self._name is None:
            return None
        text = self._store.read(self._name)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return None

    def write(self, data: Any) -> None:
        """Store data: numbers, strings, lists and dictionaries."""
        # A step may change the values that it reads.
        if self._store is not None and self._name is not None and self._name == _name(*self._arguments):
            self._store.write(self._name, json.dumps(data, separators=(",", ":")))


class CaptureEntry:
    """The stored capture of a cell.

    Args:
        cell: The cell.
        dtype: Dtype of the input, the states and the parameters.
        store: Where captures are stored. If None, nothing is stored or read.
    """

    def __init__(self, cell: Cell, dtype: torch.dtype, store: Store | None) -> None:
        self._cell, self._dtype = cell, dtype
        # A mode or a transform may change the graph that is captured.
        self._store = None if _in_transform() else store
        self._entry = Entry("capture", cell, cell.training, dtype, self._store)

    def load(self) -> CapturedStep | None:
        """Return the captured step, or None if it isn't stored or is damaged.

        A step that does the same in training and in evaluation mode is stored for one of them.
        """
        return self._load(self._entry) or self._load(
            Entry("capture", self._cell, not self._cell.training, self._dtype, self._store), other_mode=True
        )

    def _load(self, entry: Entry, other_mode: bool = False) -> CapturedStep | None:
        data = entry.read()
        if data is None:
            return None
        try:
            with torch.inference_mode(False):
                captured = from_data(data, self._cell)
        except Exception as error:  # damaged, although its checksum is right
            log.build.info("a stored capture can't be used (%s: %s)", type(error).__name__, error)
            return None
        return None if other_mode and not captured.mode_independent else captured

    @property
    def is_storable(self) -> bool:
        """Whether the captured step can be stored, as far as that is known before."""
        return self._entry.is_storable

    def save(self, captured: CapturedStep) -> None:
        """Store a captured step, if that is possible."""
        try:
            data = to_data(captured)
        except NotStorableError as error:
            name = type(self._cell.innermost).__name__
            log.build.info("the captured step of %s isn't stored: %s", name, error)
        else:
            self._entry.write(data)


def _name(kind: str, cell: Cell, training: bool, dtype: torch.dtype) -> str | None:
    """Return a name that hashes everything that a capture depends on, or None if that isn't known."""
    environment = _environment()
    try:
        values = step_values(cell)
    except UnsupportedError:
        return None
    if environment is None or values.only_here or any_global_module_hook():
        return None
    attributes = [(name, *_description(tensor)) for name, tensor in tensor_attributes(cell).items()]
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    wrappers = cell._wrapper_spec, cell.features, [*cell.state_sizes().items()]
    parts = (kind, environment, values.digest, wrappers, training, dtype, attributes, settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _description(tensor: Tensor) -> tuple[object, ...]:
    """Return what a capture may depend on of a tensor that is an attribute: of indices, their values."""
    values = ""
    if tensor.dtype in INDEX_DTYPES:
        content = tensor.detach().cpu().contiguous().numpy().tobytes()
        values = hashlib.sha256(content).hexdigest()
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        str(tensor.device),
        tensor.requires_grad,
        values,
    )


def _in_transform() -> bool:
    return (
        current_dispatch_mode() is not None
        or functorch_interpreter() is not None
        or any_autocast_enabled()
        or not all(isinstance(mode, DeviceContext) for mode in function_modes())
    )


@functools.cache
def _environment() -> tuple[object, ...] | None:
    """Return what all captures of this process depend on, or None if that isn't known."""
    package = files("unrolled")
    if not isinstance(package, Path):  # in an archive
        return None
    digest = hashlib.sha256()
    modules = set[str]()
    try:
        for file in sorted(file for part in _PARTS for file in (package / part).rglob("*.py")):
            status = file.stat()
            # A file that was moved here keeps its time of modification.
            if max(status.st_mtime, status.st_ctime) > _IMPORTED_AT:
                return None  # this process may run an older version
            path, content = file.relative_to(package), file.read_bytes()
            digest.update(f"{path.as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
            modules.add(".".join(("unrolled", *path.with_suffix("").parts)).removesuffix(".__init__"))
    except OSError:
        return None
    prefixes = tuple(f"unrolled.{part}" for part in _PARTS)
    if any(name.startswith(prefixes) and name not in modules for name in list(sys.modules)):
        return None  # an application without source files
    versions = __version__, torch.__version__, torch.version.git_version, np.__version__
    python = sys.implementation.name, *sys.version_info, sys.flags.optimize
    return _FORMAT, digest.hexdigest(), versions, python, sys.platform, platform.machine()

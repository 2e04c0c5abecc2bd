"""The compiled cells, by what their step reads.

The cell of a layer keeps what was compiled for it, so that a call finds it at once.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import threading
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.engines.backends import backend_for
from unrolled.engines.compiler.checks import read_tensor_attributes
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.step_values import (
    StepValues,
    check_same_values,
    count_version,
    reject,
    step_values,
)
from unrolled.engines.errors import UnavailableError
from unrolled.engines.fork_safety import delay_forks, renew_after_fork
from unrolled.engines.memory import memory_of

# By the values that the step reads, and a key of :func:`compiled`; those used last are at the end. The cell
# of a layer keeps what was compiled for it, so these are for new layers with the same sizes and options.
_cells: dict[object, CompiledCell | Exception] = {}
# Cells that use tensor attributes: the cell with their values, their versions, and the tensors themselves.
_cells_with_tensors: dict[object, tuple[CompiledCell, list[object], list[Tensor]]] = {}
_MAX_CELLS = 128  # a captured cell needs up to 1 MB
_MAX_CELLS_WITH_TENSORS, _MAX_BYTES = 1000, 2**26  # bytes of the tensors
_MAX_ATTEMPTS = 3  # to capture a step during which no value changes
_lock = threading.Lock()
_CPU = torch.device("cpu")


def compiled(
    cell: Cell, dtype: torch.dtype, device: torch.device = _CPU, values: StepValues | None = None
) -> CompiledCell:
    """Return the compiled cell. The first call compiles it.

    Args:
        cell: The cell.
        dtype: Dtype of the input, the states and the parameters.
        device: Their device.
        values: The values that the step reads. They may have changed since. If None, the current ones.

    Raises:
        UnsupportedError: If the step can't be compiled.
        UnavailableError: If the backend can't compile on this machine, such as for lack of a compiler.
        RuntimeError: If ``values`` have changed before the cell was compiled for this dtype.
    """
    dtype = backend_for(device).tensor_dtype(dtype)
    key: tuple[object, ...] = (
        cell._wrapper_spec,
        cell.training,
        torch.get_default_dtype(),
        dtype,
        device,
        backend_for(device).name,
    )
    latest = step_values(cell) if values is None else values
    result, contents = latest.derived.get(key) or _cells.get((latest.digest, key)), ""
    if isinstance(result, CompiledCell) and result.captured.constant_attributes:
        contents = _changed_constants(cell, result.captured.constant_attributes)
        if contents:
            key = (*key, contents)
            result = latest.derived.get(key) or _cells.get((latest.digest, key))
    if result is None:
        if values is not None:
            check_same_values(cell, values.digest, f"wasn't compiled for {dtype} before")
        result = _find_or_compile(cell, dtype, device, key, contents)
    latest.derived[key] = result
    if isinstance(result, Exception):
        raise type(result)(*result.args)
    return _with_tensor_attributes(result, cell, key) if result.captured.tensor_attributes else result


def _find_or_compile(
    cell: Cell, dtype: torch.dtype, device: torch.device, key: Any, contents: str
) -> CompiledCell | Exception:
    """Return the compiled cell for the current values, or the error. Compile it if it isn't cached."""
    with _lock:
        for _ in range(_MAX_ATTEMPTS):
            values = step_values(cell)
            result = _cells.pop((values.digest, key), None)
            if result is None:
                count_version(cell, values, contents)
                result = _compile(cell, dtype, device)
                if not values.unchanged():
                    continue
            keys = [key]
            if isinstance(result, CompiledCell) and result.captured.mode_independent:
                keys.append((key[0], not key[1], *key[2:]))
            for each in keys:
                _cells[values.digest, each] = values.derived[each] = result
            while len(_cells) > _MAX_CELLS:
                del _cells[next(iter(_cells))]
            return result
        raise reject(cell, f"it changes a Python value that it reads: {step_values(cell).changed}")


def _compile(cell: Cell, dtype: torch.dtype, device: torch.device) -> CompiledCell | Exception:
    try:
        with delay_forks(), torch.device("cpu"):  # whatever the default device is
            return backend_for(device).compile(cell, dtype, device)
    except (UnsupportedError, UnavailableError) as error:
        return type(error)(*error.args)  # a copy without the traceback, which holds tensors


def _with_tensor_attributes(compiled_cell: CompiledCell, cell: Cell, key: object) -> CompiledCell:
    """Return a compiled cell with a copy of the current values of the cell's tensor attributes."""
    attributes = compiled_cell.captured.tensor_attributes
    tensors = read_tensor_attributes(cell, attributes, compiled_cell.device)
    contents = list(map(_snapshot, tensors))
    tensors_key = (compiled_cell.digest, key, *map(id, tensors))
    with _lock:
        cached = _cells_with_tensors.get(tensors_key)
        if cached is not None and cached[1] == contents:
            return cached[0]
        values = [tensor.detach().clone().contiguous() for tensor in tensors]
        nodes = compiled_cell.captured.tensor_attributes.values()
        constants = {**compiled_cell.captured.constants, **dict(zip(nodes, values, strict=True))}
        result = copy.copy(compiled_cell if cached is None else cached[0])
        result.captured = dataclasses.replace(compiled_cell.captured, constants=constants)
        _cells_with_tensors[tensors_key] = result, contents, tensors
        size = sum(
            tensor.nbytes for _, _, attributes in _cells_with_tensors.values() for tensor in attributes
        )
        while len(_cells_with_tensors) > 1 and (
            len(_cells_with_tensors) > _MAX_CELLS_WITH_TENSORS or size > _MAX_BYTES
        ):
            _, _, evicted = _cells_with_tensors.pop(next(iter(_cells_with_tensors)))
            size -= sum(tensor.nbytes for tensor in evicted)
    return result


def _snapshot(tensor: Tensor) -> object:
    """Return an object that is equal to an earlier one only if the tensor hasn't changed in between."""
    content = memory_of(tensor)
    if content is None and tensor.is_inference():
        return object()  # nothing records its changes
    return content, tensor.shape, tensor.stride(), -1 if tensor.is_inference() else tensor._version


def _changed_constants(cell: Cell, constants: dict[str, Tensor]) -> str:
    """Return a digest of the tensor attributes that are constants of a graph. Empty if they are the same."""
    current = {name: getattr(cell.innermost, name) for name in constants}
    if all(_content(current[name]) == _content(value) for name, value in constants.items()):
        return ""
    contents = {name: _content(value) for name, value in current.items()}
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def _content(value: object) -> object:
    """Return the content of a tensor attribute in a form that compares by value."""
    if not isinstance(value, Tensor):
        return value
    return value.dtype, tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()


@renew_after_fork
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()

"""The native engine: a step, captured as torch sees it, becomes a compiled loop over time.

``graph`` captures and splits the step, ``emit`` writes C++, ``build`` has it compiled (``compiler``), kept
(``cache``) or taken from a folder that was compiled ahead of time (``ahead``, ``shipped``). ``loop`` calls
it, ``step`` ties a cell's loops together, ``autograd`` makes them differentiable, ``lanes`` takes a call.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import threading

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.cells.base import Cell
from unrolled.engines.compiler.checks import own_values
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.native import matmul
from unrolled.engines.native.compiled_cell import CompiledCell
from unrolled.engines.native.prepacked import Weights
from unrolled.engines.native.toolchain.compiler import NoCompilerError

_known: dict[object, CompiledCell | Exception] = {}
_variants: dict[
    object, tuple[CompiledCell, list[int], list[Tensor]]
] = {}  # and versions of tensors, and those
_MOST_VARIANTS, _MOST_BYTES = 1000, 2**26
_lock = threading.Lock()


def compiled(cell: Cell, dtype: torch.dtype) -> CompiledCell:
    """The compiled step of a cell with these sizes and options, made at its first use.

    Raises:
        UnsupportedError: the step holds what the compiler can't take.
        NoCompilerError: there is no C++ compiler.
    """
    dtype = torch.float32 if dtype is torch.bfloat16 else dtype  # what it is computed in
    key = (cell.identity(), cell.training, torch.get_default_dtype(), dtype)
    found = _known.get(key)
    if found is None:
        with _lock:
            if key not in _known:
                matmul.start(dtype)  # while the step is captured
                try:
                    with torch.device("cpu"):  # whatever the default device is
                        made = _known[key] = CompiledCell(cell, dtype)
                    if made.captured.any_mode:
                        _known[key[0], not cell.training, *key[2:]] = made
                except (UnsupportedError, NoCompilerError) as error:
                    _known[key] = type(error)(*error.args)  # not its frames, which hold what was computed
            found = _known[key]
    if isinstance(found, Exception):
        raise type(found)(*found.args)
    return _with_own_tensors(found, cell, key) if found.captured.own else found


def _with_own_tensors(step: CompiledCell, cell: Cell, key: object) -> CompiledCell:
    """A compiled step with what the cell's own tensors hold now, which later changes leave alone."""
    tensors = own_values(cell, step.captured.own)
    versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    place = (key, *map(id, tensors))
    with _lock:
        before = _variants.get(place)
        if before is not None and before[1] == versions and -1 not in versions:
            return before[0]
        values = [tensor.detach().clone().contiguous() for tensor in tensors]
        constants = {**step.captured.constants, **dict(zip(step.captured.own.values(), values, strict=True))}
        made = copy.copy(step if before is None else before[0])
        made.captured = dataclasses.replace(step.captured, constants=constants)
        _variants[place] = made, versions, tensors
        size = sum(tensor.nbytes for _, _, held in _variants.values() for tensor in held)
        while len(_variants) > 1 and (len(_variants) > _MOST_VARIANTS or size > _MOST_BYTES):
            _, _, held = _variants.pop(next(iter(_variants)))
            size -= sum(tensor.nbytes for tensor in held)
    return made


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that the child doesn't have may hold the other one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def weights(cell: Cell) -> Weights | None:
    """The weights of a bound cell, to be packed once; None where its loop can't be called so."""
    params = [cell.__dict__[name] for name in cell.shapes()]
    if not params or any(type(param) not in (Tensor, Parameter) or not param.is_cpu for param in params):
        return None
    dtype = params[0].dtype
    if dtype not in (torch.float32, torch.float64) or any(param.dtype != dtype for param in params):
        return None
    try:
        step = compiled(cell, dtype)
        plain = step.plain  # its loop is compiled here
    except (UnsupportedError, NoCompilerError):
        return None
    if plain is None:
        return None
    return Weights(step, [param.detach().contiguous() for param in params])  # which keep their memory alive

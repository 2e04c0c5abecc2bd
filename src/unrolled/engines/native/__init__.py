"""The native engine: a step, captured as torch sees it, becomes a compiled loop over time.

``graph`` captures and splits the step, ``emit`` writes C++, ``build`` compiles and caches it, ``run``
calls it.
"""

from __future__ import annotations

import copy
import dataclasses
import threading

import torch
from torch import Tensor

from unrolled.cell import Cell
from unrolled.engines.native.build import NoCompilerError
from unrolled.engines.native.program import UnsupportedError
from unrolled.engines.native.run import DTYPES, Compiled, run
from unrolled.engines.native.trial import own_values

__all__ = ["DTYPES", "Compiled", "NoCompilerError", "UnsupportedError", "compiled", "run"]

_known: dict[object, Compiled | Exception] = {}
_variants: dict[object, tuple[Compiled, list[int], list[Tensor]]] = {}  # and versions of tensors, and those
_MOST_VARIANTS = 1000
_lock = threading.Lock()


def compiled(cell: Cell, dtype: torch.dtype) -> Compiled:
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
                try:
                    made = _known[key] = Compiled(cell, dtype)
                    if made.captured.any_mode:
                        _known[key[0], not cell.training, *key[2:]] = made
                except (UnsupportedError, NoCompilerError) as error:
                    _known[key] = error
            found = _known[key]
    if isinstance(found, Exception):
        raise found
    return _with_own_tensors(found, cell, key) if found.captured.own else found


def _with_own_tensors(step: Compiled, cell: Cell, key: object) -> Compiled:
    """A compiled step with what the cell's own tensors hold now, which later changes leave alone."""
    tensors = own_values(cell, step.captured.own)
    versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    place = (key, *map(id, tensors))
    with _lock:
        before = _variants.get(place)
        if before is not None and before[1] == versions and -1 not in versions:
            return before[0]
        if len(_variants) > _MOST_VARIANTS:
            _variants.clear()
        values = [tensor.detach().clone() for tensor in tensors]
        constants = {**step.captured.constants, **dict(zip(step.captured.own.values(), values, strict=True))}
        made = copy.copy(step if before is None else before[0])
        made.captured = dataclasses.replace(step.captured, constants=constants)
        _variants[place] = made, versions, tensors
    return made

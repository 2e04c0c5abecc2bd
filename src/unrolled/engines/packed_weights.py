"""The weights of a cell, packed for its inference kernel."""

from __future__ import annotations

import torch

from unrolled.cells.base import Cell
from unrolled.engines import registry
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.errors import UnavailableError
from unrolled.engines.native.backend import BACKEND, NativeCell
from unrolled.engines.native.prepacked import Weights


def packed_weights(cell: Cell) -> Weights | None:
    """Return the weights of a bound cell for prepacked kernels, or None if its loop can't use them."""
    params = [cell.__dict__[name] for name in cell.shapes()]
    dtype = params[0].dtype if params else None
    if dtype not in (torch.float32, torch.float64) or BACKEND.supports(params, dtype) is not None:
        return None
    try:
        compiled_cell = registry.compiled(cell, dtype)
        if not isinstance(compiled_cell, NativeCell):
            return None
        direct_inputs = compiled_cell.direct_inputs  # compiles the inference loop
    except (UnsupportedError, UnavailableError):
        return None
    if direct_inputs is None or compiled_cell.dtype is not dtype:
        return None
    captured, own = compiled_cell.captured, vars(cell.innermost)
    if not own.keys().isdisjoint({**captured.tensor_attributes, **captured.constant_attributes}):
        return None  # nothing would notice a change of their values
    return Weights(compiled_cell, [param.detach().contiguous() for param in params])

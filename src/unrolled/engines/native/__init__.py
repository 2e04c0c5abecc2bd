"""The native engine: a step, captured as torch sees it, becomes a compiled loop over time.

``graph`` captures and splits the step, ``emit`` writes C++, ``build`` has it compiled (``compiler``), kept
(``cache``) or taken from a folder that was compiled ahead of time (``ahead``, ``shipped``). ``loop`` calls
it, ``step`` ties a cell's loops together, ``autograd`` makes them differentiable, ``lanes`` takes a call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.cell import Cell
from unrolled.engines.native import lanes, products
from unrolled.engines.native.build import NoCompilerError
from unrolled.engines.native.program import UnsupportedError
from unrolled.engines.native.route import Weights
from unrolled.engines.native.step import DTYPES, Compiled

__all__ = ["DTYPES", "Compiled", "NoCompilerError", "UnsupportedError", "compiled", "run"]

_known: dict[object, Compiled | Exception] = {}
_lock = threading.Lock()


def compiled(cell: Cell, dtype: torch.dtype) -> Compiled:
    """The compiled step of a cell with these sizes and options, made at its first use.

    Raises:
        UnsupportedError: the step holds what the compiler can't take.
        NoCompilerError: there is no C++ compiler.
    """
    dtype = torch.float32 if dtype is torch.bfloat16 else dtype  # what it is computed in
    key = (cell.identity(), dtype)
    found = _known.get(key)
    if found is None:
        with _lock:
            if key not in _known:
                products.start(dtype)  # while the step is captured
                try:
                    _known[key] = Compiled(cell, dtype)
                except (UnsupportedError, NoCompilerError) as error:
                    _known[key] = error
            found = _known[key]
    if isinstance(found, Exception):
        raise found
    return found


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that the child doesn't have may hold the other one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[tuple[Tensor, ...] | None],
    sizes: list[int] | None,
    checkpoint: int | None = None,
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Run bound cells over a sequence, the first one forward, a second one back; see :func:`engines.run`.

    Raises:
        UnsupportedError: a step holds what the compiler can't take.
        NoCompilerError: there is no C++ compiler.
    """
    given = []
    for cell, state, back in zip(cells, states, (False, True), strict=False):
        held = cell.__dict__
        params = [held[name] for name in cell.shapes()]
        params = [param if param.is_contiguous() else param.contiguous() for param in params]
        given.append(lanes.Lane(compiled(cell, x.dtype), cell, params, state, back))
    return lanes.run(given, x, sizes, checkpoint)


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
    except (UnsupportedError, NoCompilerError):
        return None
    return Weights(step, [param.contiguous() for param in params]) if step.plain is not None else None

"""The native engine: a step, captured as torch sees it, becomes a compiled loop over time.

``graph`` captures and splits the step, ``emit`` writes C++, ``build`` has it compiled (``compiler``), kept
(``cache``) or taken from a folder that was compiled ahead of time (``ahead``, ``shipped``), ``run`` calls it.
"""

from __future__ import annotations

import os
import threading

import torch

from unrolled.cell import Cell
from unrolled.engines.native import products
from unrolled.engines.native.build import NoCompilerError
from unrolled.engines.native.program import UnsupportedError
from unrolled.engines.native.run import DTYPES, Compiled, run

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

"""What each stage of the compiler does, told on stderr: ``UNROLLED_LOG=graph,emit,build,engine``, or ``all``.

* ``graph``: the captured step and its backward, split around their loops;
* ``emit``: the C++ of each loop;
* ``build``: the compile command, hits and misses of the cache, and the time they take;
* ``engine``: which engine takes a call, and why.

Each stage is a logger of the standard library, ``unrolled.graph`` to ``unrolled.engine``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import torch

STAGES = ("graph", "emit", "build", "engine")
graph, emit, build, engine = (logging.getLogger(f"unrolled.{stage}") for stage in STAGES)

_announced: set[str] = set()
_INSIDE = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def announce(message: str) -> None:
    """Warn once in a process, of the line outside this package and torch that led here."""
    if message in _announced:
        return
    _announced.add(message)
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def listen(names: str) -> None:
    """Print these stages on stderr.

    Args:
        names: stages with commas between them, or ``all``; others get one warning.
    """
    chosen = {name.strip() for name in names.split(",")} - {""}
    unknown = sorted(chosen - {*STAGES, "all"})
    if unknown:
        known = ", ".join(STAGES)
        announce(f"UNROLLED_LOG should name {known} or all, got {', '.join(map(repr, unknown))}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for stage in STAGES:
        if chosen & {stage, "all"}:
            logger = logging.getLogger(f"unrolled.{stage}")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False  # a handler of the program's own would print it again


listen(os.environ.get("UNROLLED_LOG", ""))

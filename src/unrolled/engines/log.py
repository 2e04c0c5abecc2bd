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
import warnings

STAGES = ("graph", "emit", "build", "engine")
graph, emit, build, engine = (logging.getLogger(f"unrolled.{stage}") for stage in STAGES)

_announced: set[str] = set()


def announce(message: str, stacklevel: int = 2) -> None:
    """Warn once in a process."""
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, stacklevel=stacklevel + 1)


def listen(names: str) -> None:
    """Print these stages on stderr.

    Args:
        names: stages with commas between them, or ``all``; others get one warning.
    """
    chosen = {name.strip() for name in names.split(",")} - {""}
    unknown = sorted(chosen - {*STAGES, "all"})
    if unknown:
        known = ", ".join(STAGES)
        announce(f"UNROLLED_LOG should name {known} or all, got {', '.join(map(repr, unknown))}", 3)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for stage in STAGES:
        if chosen & {stage, "all"}:
            logger = logging.getLogger(f"unrolled.{stage}")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False  # a handler of the program's own would print it again


listen(os.environ.get("UNROLLED_LOG", ""))

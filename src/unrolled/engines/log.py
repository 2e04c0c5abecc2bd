"""Logging of the compiler's stages to stderr, for ``UNROLLED_LOG=graph,kernel``, for example, or ``all``.

Each stage is a logger of the standard library, ``unrolled.graph`` to ``unrolled.engine``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import torch

STAGES = {  # what each stage prints; docs/deploy.md has the same table
    "graph": "the captured step and its backward pass, split into before, in and after the loop",
    "saved": "the states and other values that a training call stores for the backward pass, and their bytes",
    "kernel": "the kernel IR of each loop: what it computes, before C++",
    "emit": "the C++ of each loop, or its Triton on a GPU",
    "build": "the compile command, cache hits and misses, and timings",
    "engine": "which engine runs each call and, on a GPU, which kernel strategy, and why",
}
graph, saved, kernel, emit, build, engine = (logging.getLogger(f"unrolled.{stage}") for stage in STAGES)

_announced: dict[str, object] = {}  # a dict, because setdefault is atomic: threads may announce the same
_INTERNAL_PATHS = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def announce(message: str) -> None:
    """Warn with a message once per process, at the calling line outside this package and torch."""
    token = object()
    if _announced.setdefault(message, token) is not token:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL_PATHS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def listen(names: str) -> None:
    """Print some stages to stderr.

    Args:
        names: Stages, separated by commas, or ``all``. Unknown names give one warning.
    """
    selected = {name.strip() for name in names.split(",")} - {""}
    unknown = sorted(selected - {*STAGES, "all"})
    if unknown:
        known = ", ".join(STAGES)
        announce(f"UNROLLED_LOG should name {known} or all, got {', '.join(map(repr, unknown))}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for stage in STAGES:
        if selected & {stage, "all"}:
            logger = logging.getLogger(f"unrolled.{stage}")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False  # otherwise a handler of the program prints each line again


listen(os.environ.get("UNROLLED_LOG", ""))

"""Compile the kernels of a process into a folder to ship: for a machine that has no compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unrolled.engines.native.toolchain import build, cache, prebuilt


def save(sources: Iterable[str], folder: Path, archs: Iterable[str]) -> list[Path]:
    """Put the libraries of sources into a folder, for each of some instruction sets, and the probe's.

    Args:
        sources: C++.
        folder: made where it isn't there; other libraries in it stay.
        archs: names of instruction sets, ``"native"`` for this machine's own.

    Returns:
        The libraries.

    Raises:
        NoCompilerError: there is no compiler, or it can't build one of them.
        OSError: the folder can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(order: tuple[str, str]) -> Path:
        source, arch = order
        library, note = build.obtain(source, arch, _as_it_is)
        place = folder / f"{prebuilt.name_of(source)}.{arch}.so"
        with cache.building(folder) as work:
            copy = work / "loop.so"
            shutil.copyfile(library, copy)
            cache.publish(copy, note, place, mode=0o644)
        return place

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        orders = [(source, arch) for arch in archs for source in (*sources, build.PROBE)]
        return list(threads.map(one, orders))


def _as_it_is(library: Path, note: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    return library, note

"""Compilation of kernels into a folder that can be copied to machines without a compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unrolled.engines.native.toolchain import build, cache, cpp_files, kept_files, prebuilt
from unrolled.engines.threads import core_limit


def save(sources: Iterable[str], folder: Path, archs: Iterable[str]) -> list[Path]:
    """Compile sources for some instruction sets into a folder, with the probe library and that of call plans.

    The captured steps that this process has used are copied to the folder, too.

    Args:
        sources: C++.
        folder: Created if it doesn't exist. Other libraries in it are kept.
        archs: Names of instruction sets, ``"native"`` for that of this machine.

    Returns:
        The paths of the libraries.

    Raises:
        NoCompilerError: If there is no compiler, or it can't compile one of them.
        OSError: If the folder can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save_library(task: tuple[str, str]) -> Path:
        source, arch = task
        library, metadata = build.find_or_compile(source, arch, _return_both)
        target = folder / f"{prebuilt.name_of(source)}.{arch}{cache.SUFFIX}"
        with cache.build_folder(folder) as temporary:
            copy = temporary / f"loop{cache.SUFFIX}"
            shutil.copyfile(library, copy)
            cache.publish(copy, metadata, target, mode=0o644)
        return target

    with ThreadPoolExecutor(core_limit() or os.cpu_count()) as threads:
        every = dict.fromkeys((*sources, cpp_files.read("call_plan.cpp"), build.PROBE))
        tasks = [(source, arch) for arch in archs for source in every]
        libraries = list(threads.map(save_library, tasks))
    kept_files.copy_used(folder)
    return libraries


def _return_both(library: Path, metadata: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    return library, metadata

"""Environments of processes whose kernels are compiled with a sanitizer."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from unrolled.engines.native.toolchain import build


@dataclass(frozen=True)
class Sanitizer:
    """A sanitizer.

    Attributes:
        flags: Compiler flags.
        runtime: Library that must be loaded before Python.
        options: Environment variable with the options of the runtime, and its value.
    """

    flags: str
    runtime: str
    options: tuple[str, str]


MEMORY = Sanitizer(
    "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "libasan.so",
    ("ASAN_OPTIONS", "detect_leaks=0"),  # Python itself doesn't free all memory
)
# torch isn't instrumented, so reports about it are suppressed. The sanitizer doesn't see how OpenMP's threads
# synchronize either, and would report false races on our data. So the thread pool uses its own threads.
THREADS = Sanitizer(
    "-fsanitize=thread",
    "libtsan.so",
    ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66:die_after_fork=0"),
)


class UnavailableError(Exception):
    """A sanitizer can't be used here. The message is the reason."""


def find_library(library: str) -> str:
    """Return the path of one of the compiler's libraries, or only its name if there is none."""
    line = ["c++", f"-print-file-name={library}"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def runtime(sanitizer: Sanitizer) -> str:
    """Return the path of a sanitizer's runtime.

    Raises:
        UnavailableError: If there is none that works.
    """
    version = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    if "clang" in version:
        raise UnavailableError("the sanitizers need GCC, and c++ is clang")
    library = find_library(sanitizer.runtime)
    if not Path(library).is_absolute():
        raise UnavailableError(f"the compiler has no {sanitizer.runtime}")
    starts = subprocess.run(["true"], capture_output=True, text=True, env={"LD_PRELOAD": library})
    if starts.returncode != 0:  # for example, TSan doesn't support every address space layout
        raise UnavailableError(f"no program runs with {sanitizer.runtime}: {starts.stderr.strip()[:200]}")
    return library


def archs() -> list[str]:
    """Return this machine's own instruction set, and one without masked loads and stores.

    AddressSanitizer doesn't check those of AVX-512.
    """
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx2_supported()
    return ["native", "x86-64-v3"] if x86 else ["native"]


def environment(sanitizer: Sanitizer, cache: Path, arch: str) -> dict[str, str]:
    """Return the environment of a process that compiles kernels with a sanitizer.

    Args:
        sanitizer: The sanitizer.
        cache: Folder for the kernels.
        arch: Instruction set of the kernels.

    Raises:
        UnavailableError: If the sanitizer can't be used here.
    """
    name, options = sanitizer.options
    result = {
        **os.environ,
        "CXX": f"{shutil.which('c++')} {sanitizer.flags}",
        # libstdc++ must be loaded first, or AddressSanitizer aborts at the first exception that torch throws
        "LD_PRELOAD": f"{runtime(sanitizer)} {find_library('libstdc++.so.6')}",
        name: options,
        "UNROLLED_CACHE": str(cache),
        build.ARCH: arch,
    }
    result.pop("UNROLLED_KERNELS", None)
    return result

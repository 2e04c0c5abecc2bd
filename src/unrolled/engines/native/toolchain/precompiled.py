"""Precompiled headers for g++: all headers that a loop includes, parsed once and stored in a file.

Parsing the headers takes about half of the time in which g++ compiles a loop. The precompiled header takes
about 50 MB, and writing it takes as long as compiling two loops. So only processes that compile several loops
write one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections import Counter
from pathlib import Path

from unrolled.engines import log
from unrolled.engines.fork_safety import renew_after_fork
from unrolled.engines.native.toolchain import cache, cpp_files, cpu, eviction
from unrolled.engines.native.toolchain.compiler import Compiler, NoCompilerError

SUFFIX = eviction.PRECOMPILED_SUFFIX

_PREAMBLE = re.compile(r'using T = \w+;\n#include "loop\.h"\n')
_LOOPS_BEFORE = 3  # loops that a process compiles before it writes a precompiled header
_MIN_CACHE_SIZE = 2**29  # bytes; in a smaller cache, the file would displace many kernels

_loops: Counter[Path] = Counter()  # that this process has compiled without a precompiled header
_lock = threading.Lock()


def find(compiler: Compiler, source: str, arch: str, folder: Path) -> Path | None:
    """Return the precompiled header for a source, or None if there is none.

    After a few sources, a thread starts to precompile their header, for later sources.

    Args:
        compiler: The compiler.
        source: C++.
        arch: The instruction set.
        folder: The folder of the kernels.
    """
    preamble = _PREAMBLE.match(source)
    # A package in an archive has no folder of headers.
    if preamble is None or not compiler.is_gcc or not isinstance(cpp_files.INCLUDE, Path):
        return None
    parts = (preamble[0], cpp_files.digest(), compiler.identity(arch), cpu.identity())
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
    header = folder / f"{digest}.h"
    precompiled = header.with_suffix(SUFFIX)
    try:
        cache.check_private(precompiled)
    except OSError:
        with _lock:
            _loops[header] += 1
            is_time = _loops[header] == _LOOPS_BEFORE + 1
        if is_time and not 0 < eviction.size_limit() < _MIN_CACHE_SIZE:
            arguments = (compiler, preamble[0], arch, header)
            with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter is shutting down
                threading.Thread(target=_precompile, args=arguments, name="unrolled-build").start()
        return None
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(precompiled)
    return header


def remove(header: Path) -> None:
    """Delete a precompiled header that the compiler can't use."""
    with contextlib.suppress(OSError):
        header.with_suffix(SUFFIX).unlink()


def _precompile(compiler: Compiler, text: str, arch: str, header: Path) -> None:
    """Precompile a header for later sources, unless another process does so."""
    precompiled = header.with_suffix(SUFFIX)
    try:
        with cache.compile_lock(header), cache.build_folder(header.parent) as folder:
            if precompiled.exists():
                return
            built = compiler.precompile(text, arch, folder / header.name)
            for source, target in ((folder / header.name, header), (built, precompiled)):
                source.chmod(0o600)
                source.replace(target)
        log.build.info("precompiled: %s", precompiled)
        eviction.enforce_limit(header.parent, keep=precompiled)
    except (OSError, NoCompilerError) as error:
        log.build.info("%s can't be precompiled (%s)", header, error)


@renew_after_fork
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()

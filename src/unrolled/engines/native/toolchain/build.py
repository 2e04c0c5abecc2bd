"""The kernel libraries of this process: prebuilt, from the cache, or compiled."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from unrolled.engines import log
from unrolled.engines.fork_safety import renew_after_fork
from unrolled.engines.native.toolchain import cache, cpp_files, cpu, eviction, prebuilt, precompiled
from unrolled.engines.native.toolchain.compiler import (
    NATIVE,
    Compiler,
    NoCompilerError,
    announce_replacement,
    compilers,
)

ARCH = "UNROLLED_ARCH"
PROBE = 'using T = float;\n#include "vectors.h"\nEXPORT int lanes() { return L; }\n'
"""The smallest library. Its function returns the number of float32 values in a vector."""

_Result = TypeVar("_Result")
_libraries: dict[str, Future[ctypes.CDLL]] = {}  # by source
_lock = threading.Lock()
_ATTEMPTS = 3
_vector_extensions: dict[str, tuple[str, ...]] = {}  # "first": those of the first library


def load(source: str) -> ctypes.CDLL:
    """Return the library of a source: loaded before, prebuilt, from the cache, or compiled now.

    Raises:
        NoCompilerError: If the library must be compiled and can't be, or this processor can't run it.
    """
    future, is_new = _future_library(source)
    if is_new:
        _set_result(future, source)
    error = future.exception()
    if isinstance(error, NoCompilerError):
        # Raise a copy: the stored exception would collect the frames of every caller.
        raise NoCompilerError(*error.args)
    return future.result()


def load_if_ready(source: str) -> ctypes.CDLL | None:
    """Return the library of a source, or None if it isn't loaded yet. The first call starts compiling it.

    Raises:
        NoCompilerError: As :func:`load`.
    """
    with _lock:
        future = _libraries.get(source)
    if future is None:
        start(source)
        return None
    return load(source) if future.done() else None


def start(*sources: str) -> None:
    """Start compiling libraries in background threads; :func:`load` then waits for them."""
    for source in sources:
        future, is_new = _future_library(source)
        if is_new:
            thread = threading.Thread(target=_set_result, args=(future, source), name="unrolled-build")
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                _set_result(future, source)


def requested_sources() -> list[str]:
    """Return the sources of all libraries that this process has loaded or started to compile."""
    with _lock:
        return list(_libraries)


@functools.cache
def arch() -> str:
    """Return the instruction set of this process: UNROLLED_ARCH, else that of prebuilt kernels, else native.

    Raises:
        NoCompilerError: If UNROLLED_ARCH can't be the name of an instruction set.
    """
    configured = os.environ.get(ARCH, "").strip()
    if configured:
        return check_arch(configured, ARCH)
    folder = prebuilt.find_folder(None)
    return folder.arch if folder is not None and folder.arch else NATIVE


def check_arch(name: str, option: str) -> str:
    """Return the name of an instruction set if it is well-formed.

    Args:
        name: The name, which is passed to the compiler.
        option: The variable or option that it comes from, for the message.

    Raises:
        NoCompilerError: If it is not well-formed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise NoCompilerError(f"{option} should name an instruction set, such as x86-64-v3, got {name!r}")
    return name


def find_or_compile(source: str, arch: str, use: Callable[[Path, dict[str, Any]], _Result]) -> _Result:
    """Find a library in the cache or compile it, and use it.

    Args:
        source: C++.
        arch: The instruction set.
        use: Called with the path of the library and its metadata. If it raises OSError, the next folder is
            tried.

    Returns:
        The result of ``use``.

    Raises:
        NoCompilerError: If there is no compiler, it can't compile the source, or no folder can be used.
    """
    first_error: NoCompilerError | None = None
    failures: dict[tuple[str, ...], str] = {}
    for compiler in compilers():
        name = _library_name(compiler, source, arch)
        problems: list[str] = []
        try:
            for folder in _folders(problems):
                library = folder / f"{name}{cache.SUFFIX}"
                try:
                    result = _use(compiler, source, arch, library, use)
                    announce_replacement(failures, compiler.command)
                    return result
                except OSError as error:
                    problems.append(f"{folder}: {error.strerror or error}")
                    cache.report_failure(folder, error)
        except NoCompilerError as error:
            log.build.info("%s", error)
            first_error = first_error or error
            failures[compiler.command] = str(error)
            continue
        raise NoCompilerError(
            f"no folder can be used for compiled kernels ({'; '.join(problems)}): "
            f"set {cache.VARIABLE} to a writable folder"
        )
    assert first_error is not None
    raise first_error


def _use(
    compiler: Compiler,
    source: str,
    arch: str,
    library: Path,
    use: Callable[[Path, dict[str, Any]], _Result],
) -> _Result:
    """Use a library, after compiling it if it is not in the cache."""
    for attempt in range(_ATTEMPTS):
        metadata = _ensure_compiled(compiler, source, arch, library)
        try:
            return use(library, metadata)
        except OSError as error:
            if attempt < _ATTEMPTS - 1 and not library.exists():
                continue  # another process has deleted it, to keep the cache below its size limit
            raise cache.loading_failed(library, error) from None
    raise AssertionError


def _future_library(source: str) -> tuple[Future[ctypes.CDLL], bool]:
    """Return the future of a library, and whether it is new, so that the caller must set its result."""
    with _lock:
        future = _libraries.get(source)
        if future is None:
            return _libraries.setdefault(source, Future()), True
        return future, False


def _set_result(future: Future[ctypes.CDLL], source: str) -> None:
    """Load a library and set its future to the result or to the error."""
    try:
        future.set_result(_load(source))
    except NoCompilerError as error:
        future.set_exception(NoCompilerError(*error.args))
    except BaseException as error:  # an interrupt, or a warning turned into an error: the next call retries
        with _lock:
            _libraries.pop(source, None)
        future.set_exception(error)


def _load(source: str) -> ctypes.CDLL:
    selected_arch = arch()
    folder = prebuilt.find_folder(selected_arch)
    library = folder.find(source) if folder is not None else None
    if library is not None:
        try:
            return _open(*library)
        except OSError as error:  # for example, it needs a newer C library
            log.announce(f"The prebuilt kernel {library[0]} can't be loaded: {error}")
    try:
        return find_or_compile(source, selected_arch, _open)
    except NoCompilerError as error:
        if folder is None:
            raise
        raise NoCompilerError(f"{error}. {folder.why_missing()}") from None


def _open(library: Path, metadata: dict[str, Any]) -> ctypes.CDLL:
    _check_processor(metadata)
    return ctypes.CDLL(str(library))


def _check_processor(metadata: dict[str, Any]) -> None:
    """Check that this processor and the libraries loaded so far can work with a library.

    Raises:
        NoCompilerError: If the processor lacks instructions, or the libraries use vectors of other widths.
    """
    missing = cpu.missing(metadata["requires"])
    if missing:
        raise NoCompilerError(
            f"kernels for {metadata['arch']} use {', '.join(missing)}, which this processor doesn't have"
        )
    extensions = cpu.vector_extensions(metadata["requires"])
    with _lock:
        first = _vector_extensions.setdefault("first", extensions)
    if extensions != first:
        raise NoCompilerError(
            f"kernels with {first[-1] if first else 'the smallest'} vectors are already loaded, and can't be "
            f"combined with {extensions[-1] if extensions else 'the smallest'} vectors: "
            f"set {ARCH} to one instruction set for all kernels"
        )


def _ensure_compiled(compiler: Compiler, source: str, arch: str, library: Path) -> dict[str, Any]:
    """Return the metadata of an intact library, after compiling it if it is not in the cache."""
    began = time.perf_counter()
    metadata = cache.read_metadata(library)
    if metadata is not None:
        log.build.info("hit: %s (%.1f ms)", library, 1e3 * (time.perf_counter() - began))
        eviction.record_use(library)
        return metadata
    with cache.compile_lock(library):
        metadata = cache.read_metadata(library)  # another process may have compiled it meanwhile
        if metadata is not None:
            waited = time.perf_counter() - began
            log.build.info("hit: %s, compiled by another process meanwhile (%.2f s)", library, waited)
            return metadata
        log.build.info("miss: %s%s", library, " (damaged)" if library.exists() else "")
        with cache.build_folder(library.parent) as folder:
            metadata = prebuilt.library_metadata(compiler, arch, compiler.requires(arch, folder))
            try:
                cache.publish(_compile(compiler, source, arch, folder), metadata, library)
            except PermissionError:
                # On Windows, a library that another process has loaded can't be replaced.
                published = cache.read_metadata(library)
                if published is None:
                    raise
                return published
        log.build.info("compiled: %s (%.2f s)", library, time.perf_counter() - began)
        eviction.enforce_limit(library.parent, keep=library)
        return metadata


def _compile(compiler: Compiler, source: str, arch: str, folder: Path) -> Path:
    """Compile a source in an empty folder, with a precompiled header if there is one."""
    header = precompiled.find(compiler, source, arch, folder.parent)
    if header is not None:
        try:
            return compiler.build(source, arch, folder, header)
        except NoCompilerError as error:
            log.build.info("%s; compiling it without the precompiled header", error)
            precompiled.remove(header)
    return compiler.build(source, arch, folder)


def _folders(problems: list[str]) -> Iterator[Path]:
    """Yield the folders of :func:`cache.folders`; if a temporary folder can't be created, add a problem."""
    try:
        yield from cache.folders()
    except OSError as error:
        problems.append(str(error))


def _library_name(compiler: Compiler, source: str, arch: str) -> str:
    """Return a file name that hashes everything that affects the library."""
    parts = (source, cpp_files.digest(), compiler.identity(arch), cpu.identity())
    # Environment variables may hold bytes that aren't UTF-8.
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]


@renew_after_fork
def _forget_unfinished() -> None:
    """In a forked child, renew the lock and drop unfinished libraries: the compiling threads are gone."""
    global _lock
    _lock = threading.Lock()
    for source in [source for source, future in _libraries.items() if not future.done()]:
        del _libraries[source]

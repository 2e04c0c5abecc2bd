"""The kernel libraries of this process: taken from a shipped folder or the cache, else compiled."""

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
from unrolled.engines.native.toolchain import cache, cpu, prebuilt
from unrolled.engines.native.toolchain.compiler import (
    NATIVE,
    Compiler,
    NoCompilerError,
    compilers,
    headers,
)

ARCH = "UNROLLED_ARCH"
PROBE = 'using T = float;\n#include "vectors.h"\nextern "C" int lanes() { return L; }\n'
"""The smallest library: it tells how many float32 a vector holds."""

_Used = TypeVar("_Used")
_libraries: dict[str, Future[ctypes.CDLL]] = {}
_lock = threading.Lock()
_vectors: dict[str, tuple[str, ...]] = {}  # of the first library


def load(source: str) -> ctypes.CDLL:
    """The library of a source, compiled at its first use and taken from the cache from then on.

    Raises:
        NoCompilerError: it is not in the cache and can't be compiled, or it can't be run here.
    """
    future, mine = _claim(source)
    if mine:
        _fulfil(future, source)
    error = future.exception()
    if isinstance(error, NoCompilerError):
        raise NoCompilerError(
            *error.args
        )  # another each time: what is kept would keep the frames it goes through
    return future.result()


def start(*sources: str) -> None:
    """Begin to compile in the background what :func:`load` will be asked for, all at once."""
    for source in sources:
        future, mine = _claim(source)
        if mine:
            thread = threading.Thread(target=_fulfil, args=(future, source), name="unrolled-build")
            try:
                thread.start()
            except RuntimeError:  # the system gives no more threads, or Python ends
                _fulfil(future, source)


def asked() -> list[str]:
    """The sources of all libraries that this process has asked for."""
    with _lock:
        return list(_libraries)


@functools.cache
def arch() -> str:
    """The instruction set of this process: UNROLLED_ARCH, else that of shipped kernels, else the machine's.

    Raises:
        NoCompilerError: UNROLLED_ARCH is no name of an instruction set.
    """
    given = os.environ.get(ARCH, "").strip()
    if given:
        return check_arch(given, ARCH)
    folder = prebuilt.folder(None)
    return folder.arch if folder is not None and folder.arch else NATIVE


def check_arch(name: str, where: str) -> str:
    """The name of an instruction set, if it can be one.

    Raises:
        NoCompilerError: it can't.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise NoCompilerError(f"{where} should name an instruction set, such as x86-64-v3, got {name!r}")
    return name


def obtain(source: str, arch: str, use: Callable[[Path, dict[str, Any]], _Used]) -> _Used:
    """Find or compile a library, and use it.

    Args:
        source: C++.
        arch: the instruction set.
        use: takes the library and the note on it; where it raises OSError another folder is tried.

    Raises:
        NoCompilerError: there is no compiler, or it can't build this, or no folder can be used.
    """
    refused: NoCompilerError | None = None
    for compiler in compilers():
        name = _key(compiler, source, arch)
        troubles: list[str] = []
        try:
            for folder in _folders(troubles):
                library = folder / f"{name}.so"
                try:
                    return use(library, _whole(compiler, source, arch, library))
                except OSError as error:
                    troubles.append(f"{folder}: {error.strerror or error}")
                    cache.unusable(folder, error)
        except NoCompilerError as error:
            log.build.info("%s", error)
            refused = refused or error
            continue
        raise NoCompilerError(
            f"no folder for compiled kernels can be used ({'; '.join(troubles)}): set {cache.VARIABLE} to one"
        )
    assert refused is not None
    raise refused


def _claim(source: str) -> tuple[Future[ctypes.CDLL], bool]:
    """The library of a source, now or later, and whether the caller is to make it."""
    with _lock:
        found = _libraries.get(source)
        if found is None:
            return _libraries.setdefault(source, Future()), True
        return found, False


def _fulfil(future: Future[ctypes.CDLL], source: str) -> None:
    try:
        future.set_result(_load(source))
    except NoCompilerError as error:
        future.set_exception(NoCompilerError(*error.args))
    except BaseException as error:  # an interrupt, or a warning made an error: the next call tries again
        with _lock:
            _libraries.pop(source, None)
        future.set_exception(error)


def _load(source: str) -> ctypes.CDLL:
    chosen = arch()
    folder = prebuilt.folder(chosen)
    found = folder.find(source) if folder is not None else None
    if found is not None:
        try:
            return _open(*found)
        except OSError as error:  # such as for a newer C library than there is here
            log.announce(f"{found[0]} can't be loaded: {error}")
    try:
        return obtain(source, chosen, _open)
    except NoCompilerError as error:
        if folder is None:
            raise
        raise NoCompilerError(f"{error}; and {folder.lack()}") from None


def _open(library: Path, note: dict[str, Any]) -> ctypes.CDLL:
    _check(note)
    return ctypes.CDLL(str(library))


def _check(note: dict[str, Any]) -> None:
    """Raise where this processor lacks what a library uses, or the libraries before it don't fit to it."""
    lacking = cpu.lacking(note["requires"])
    if lacking:
        raise NoCompilerError(
            f"kernels for {note['arch']} use {', '.join(lacking)}, which this processor doesn't have"
        )
    vectors = cpu.vectors(note["requires"])
    with _lock:
        first = _vectors.setdefault("first", vectors)
    if vectors != first:
        raise NoCompilerError(
            f"kernels with {first[-1] if first else 'the smallest'} vectors are in use already, and one with "
            f"{vectors[-1] if vectors else 'the smallest'} vectors can't work with them: {ARCH} sets all"
        )


def _whole(compiler: Compiler, source: str, arch: str, library: Path) -> dict[str, Any]:
    """The note on a library that is there, whole: from the cache, or compiled now."""
    began = time.perf_counter()
    note = cache.read(library)
    if note is not None:
        log.build.info("hit: %s (%.1f ms)", library, 1e3 * (time.perf_counter() - began))
        return note
    with cache.alone(library):
        note = cache.read(library)  # another process may have made it
        if note is not None:
            waited = time.perf_counter() - began
            log.build.info("hit: %s, once another process had compiled it (%.2f s)", library, waited)
            return note
        damaged = " (it is damaged)" if library.exists() else ""
        log.build.info("miss: %s%s", library, damaged)
        with cache.building(library.parent) as folder:
            note = prebuilt.note(compiler, arch, compiler.requires(arch, folder))
            cache.publish(compiler.build(source, arch, folder), note, library)
        log.build.info("compiled: %s (%.2f s)", library, time.perf_counter() - began)
        return note


def _folders(troubles: list[str]) -> Iterator[Path]:
    try:
        yield from cache.folders()
    except OSError as error:  # not even a temporary one
        troubles.append(str(error))


def _key(compiler: Compiler, source: str, arch: str) -> str:
    """The name of a library: of all that can change what is in it."""
    parts = (source, headers(), compiler.identity(arch), cpu.identity())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _after_fork() -> None:
    """A forked child has none of the threads that were compiling: what they owe is asked for anew."""
    global _lock
    _lock = threading.Lock()
    for source in [source for source, future in _libraries.items() if not future.done()]:
        del _libraries[source]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

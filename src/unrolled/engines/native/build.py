"""Compile generated C++ on the user's machine and keep the library in a private cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs

INCLUDE = Path(__file__).parent / "include"
FLAGS = ["-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno"]


class NoCompilerError(Exception):
    """There is no C++ compiler, or it can't build what it is given."""


def load(source: str) -> ctypes.CDLL:
    """The library of a source, compiled at its first use and taken from the cache from then on.

    Raises:
        NoCompilerError: it is not in the cache and can't be compiled.
    """
    command, version = compiler()
    headers = [path.read_text() for path in sorted(INCLUDE.glob("*.h"))]
    key = hashlib.sha256()
    for part in (source, *headers, version, " ".join([*command, *FLAGS]), _processor()):
        key.update(part.encode() + b"\0")
    name = key.hexdigest()[:32]
    for folder in _folders():
        library = folder / f"{name}.so"
        try:
            if not _whole(library):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _compile(command, source, library)
            return ctypes.CDLL(str(library))
        except OSError:  # a folder that can't be written to, or a library that can't be loaded
            continue
    raise NoCompilerError("no folder for compiled kernels can be written to: set UNROLLED_CACHE to one")


@functools.cache
def compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler, and what it says of its version.

    Raises:
        NoCompilerError: there is none; the message says how to get one.
    """
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else []
    candidates += [[name] for name in ("c++", "g++", "clang++")]
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append([sys.executable, "-m", "ziglang", "c++"])
    for command in candidates:
        if shutil.which(command[0]):
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return command, done.stdout
    raise NoCompilerError("there is no C++ compiler: install one, or the ziglang package, which holds one")


def _compile(command: list[str], source: str, library: Path) -> None:
    """Compile beside the library's place, then put library and digest in their places, each in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        code, built = Path(folder, "loop.cpp"), Path(folder, "loop.so")
        code.write_text(source)
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        line = [*command, *FLAGS, native, "-I", str(INCLUDE), str(code), "-o", str(built)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            first = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr[:200])
            raise NoCompilerError(f"{command[0]} can't compile a loop: {first}")
        digest = Path(folder, "digest")
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        digest.replace(library.with_suffix(".sha256"))
        built.replace(library)


def _whole(library: Path) -> bool:
    try:
        expected = library.with_suffix(".sha256").read_text()
        return hashlib.sha256(library.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _folders() -> list[Path]:
    chosen = os.environ.get("UNROLLED_CACHE")
    first = Path(chosen) if chosen else Path(platformdirs.user_cache_dir("unrolled"), "kernels")
    return [first, Path(_temporary())]


@functools.cache
def _temporary() -> str:
    return tempfile.mkdtemp(prefix="unrolled-")


@functools.cache
def _processor() -> str:
    """What the machine's own instruction set depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = {line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))}
    return platform.machine() + "\n".join(sorted(lines))

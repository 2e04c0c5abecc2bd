"""The C++ compilers of this machine and their command lines."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unrolled._version import __version__
from unrolled.engines import log
from unrolled.engines.native.toolchain import cpu

INCLUDE = Path(__file__).parents[1] / "include"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno")
NATIVE = "native"

_COMPILE_TIMEOUT = 900  # seconds; zig takes about a minute for its first C++ library
_ZIG = "ziglang"
# Environment variables that change the output of these compilers.
_VARIABLES = (
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX",
    "CCC_OVERRIDE_OPTIONS", "SDKROOT", "MACOSX_DEPLOYMENT_TARGET", "NIX_CFLAGS_COMPILE", "NIX_LDFLAGS",
    "ZIG_LIB_DIR",
)  # fmt: skip
_CPP_RUNTIME = (b"_ZNSt3__1", b"_Znw", b"__gxx_personality", b"__cxa_thread_atexit")
_DISK_FULL_PATTERNS = {errno.ENOSPC: r"No space left|NoSpaceLeft", errno.EDQUOT: r"quota exceeded|DiskQuota"}

_required: dict[tuple[Compiler, str], list[str]] = {}


class NoCompilerError(Exception):
    """There is no C++ compiler, or it can't compile a source."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: The command that runs it, as a list of arguments.
        version: The output of its version option.
    """

    command: tuple[str, ...]
    version: str

    @property
    def is_zig(self) -> bool:
        """Whether it is zig, which has its own names of instruction sets and its own cache."""
        return _is_zig(self.command)

    @property
    def title(self) -> str:
        """The first line of its version."""
        return self.version.splitlines()[0]

    def arch_flag(self, arch: str) -> str:
        """Return the argument that selects an instruction set."""
        if self.is_zig:
            return f"-mcpu={arch.replace('-', '_')}"
        arm = platform.machine() in ("aarch64", "arm64")
        return f"-mcpu={arch}" if arm and not arch.startswith("armv") else f"-march={arch}"

    def identity(self, arch: str) -> str:
        """Return a text with everything but the source that affects the compiled library."""
        variables = "\n".join(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES)
        executable = os.path.realpath(shutil.which(self.command[0]) or self.command[0])
        flags = " ".join([executable, *self.command[1:], *FLAGS, self.arch_flag(arch)])
        return f"{flags}\n{self.version}\n{variables}"

    def requires(self, arch: str, folder: Path) -> list[str]:
        """Return the instruction set extensions that its code for an instruction set may use.

        Args:
            arch: The instruction set.
            folder: A folder for temporary files.

        Raises:
            NoCompilerError: If the compiler doesn't know the instruction set.
        """
        if (self, arch) not in _required:
            line = [*self.command, self.arch_flag(arch), "-dM", "-E", "-x", "c++", os.devnull]
            _required[self, arch] = cpu.required(_run(line, folder, arch))
        return _required[self, arch]

    def build(self, source: str, arch: str, folder: Path) -> Path:
        """Compile a source to a shared library.

        Args:
            source: C++.
            arch: The instruction set, ``"native"`` for that of this machine.
            folder: An empty folder for the library and temporary files.

        Returns:
            The path of the library.

        Raises:
            NoCompilerError: If compiling fails. The message holds the compiler's first error.
            OSError: If the folder can't be written to, or the disk is full.
        """
        code, library = folder / "loop.cpp", folder / "loop.so"
        code.write_text(source)
        line = [*self.command, *FLAGS, self.arch_flag(arch), "-I", str(INCLUDE), str(code)]
        if not self.is_zig:
            _run([*line, "-shared", "-o", str(library)], folder, arch)
            return library
        # Linking as C++ makes zig build a C++ runtime for the first library, which takes about a minute.
        # Linking as C with the standard library builds another runtime. Most kernels need neither, so they
        # are linked with -nostdlib; the process provides the rest.
        object_file = folder / "loop.o"
        _run([*line, "-g0", "-c", "-o", str(object_file)], folder, arch)
        content = object_file.read_bytes()
        if any(name in content for name in _CPP_RUNTIME):
            log.announce("zig builds its C++ runtime. This takes about a minute and happens only once.")
            _run([*self.command, "-shared", "-pthread", str(object_file), "-o", str(library)], folder, arch)
        else:
            link = [*self.command[:-1], "cc", "-shared", "-nostdlib", str(object_file), "-o", str(library)]
            _run(link, folder, arch)
        return library


def compilers() -> Iterator[Compiler]:
    """Yield the C++ compilers of this machine: the system's, then that of the ziglang package.

    If the environment variable CXX is set, yield only that compiler.

    Raises:
        NoCompilerError: If there is none. The message says how to get one.
    """
    configured = os.environ.get("CXX", "").strip()
    if configured:
        compiler = _find(*shlex.split(configured))
        if compiler is None:
            raise NoCompilerError(f"CXX is {configured!r}, which can't be run")
        yield compiler
        return
    system = next(filter(None, (_find(name) for name in ("c++", "g++", "clang++"))), None)
    if system is not None:
        yield system
    zig = _find(sys.executable, "-m", _ZIG, "c++") if importlib.util.find_spec(_ZIG) else None
    if zig is not None:
        yield zig
    if system is None and zig is None:
        raise NoCompilerError(
            "no C++ compiler was found. Install one, or the ziglang package, which contains one "
            "(pip install ziglang)"
        )


@functools.cache
def _find(*command: str) -> Compiler | None:
    """Return a compiler with its version, or None if it can't be run."""
    if not command or not shutil.which(command[0]):
        return None
    zig = _is_zig(command)  # zig c++ --version needs a cache, zig version doesn't
    line = [*command[:-1], "version"] if zig else [*command, "--version"]
    try:
        process = subprocess.run(line, capture_output=True, text=True, check=False, env=_environment())
    except OSError:
        return None
    if process.returncode != 0 or not process.stdout.strip():
        return None
    return Compiler(command, ("zig " if zig else "") + process.stdout.strip())


def _is_zig(command: tuple[str, ...]) -> bool:
    return _ZIG in command or Path(command[0]).stem == "zig"


def _run(line: list[str], folder: Path, arch: str) -> str:
    """Run a compiler and return its standard output.

    Raises:
        NoCompilerError: If it fails or takes too long.
        OSError: If the disk is full.
    """
    log.build.info("%s", shlex.join(line))
    try:
        process = subprocess.run(
            line,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=_environment(folder),
            timeout=_COMPILE_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise NoCompilerError(
            f"{line[0]} did not finish compiling a kernel within {_COMPILE_TIMEOUT} s"
        ) from None
    if process.returncode == 0:
        return process.stdout
    for number, pattern in _DISK_FULL_PATTERNS.items():
        if re.search(pattern, process.stderr):
            raise OSError(number, os.strerror(number), str(folder))
    lines = process.stderr.strip().splitlines() or [f"it ended with exit code {process.returncode}"]
    first_error = next((text for text in lines if re.search(r"\berror\b|unknown", text)), lines[0])
    raise NoCompilerError(f"{line[0]} can't compile a kernel for {arch}: {first_error[:200]}")


def _environment(folder: Path | None = None) -> dict[str, str]:
    """Return the environment for a compiler: messages in English, temporary files in a folder."""
    environment = {**os.environ, "LC_ALL": "C"}
    if folder is not None:
        environment["TMPDIR"] = str(folder)
        # Kept between builds: zig compiles later libraries in a tenth of the time of the first.
        zig_cache = str(folder.parent / "zig")
        for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
            environment.setdefault(name, zig_cache)
    return environment


@functools.cache
def headers() -> str:
    """Return a digest of the package version and of all header files that a source may include."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(INCLUDE.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

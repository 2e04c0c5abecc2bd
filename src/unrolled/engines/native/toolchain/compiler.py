"""The C++ compilers of this machine: which there are, and how each is called."""

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

_PATIENCE = 900  # seconds; the first C++ library of the ziglang package takes it about a minute
_ZIG = "ziglang"
# What these compilers read beside their arguments, and what changes the result.
_VARIABLES = (
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX",
    "CCC_OVERRIDE_OPTIONS", "SDKROOT", "MACOSX_DEPLOYMENT_TARGET", "NIX_CFLAGS_COMPILE", "NIX_LDFLAGS",
    "ZIG_LIB_DIR",
)  # fmt: skip
_CPP_RUNTIME = (b"_ZNSt3__1", b"_Znw", b"__gxx_personality", b"__cxa_thread_atexit")
_FULL = {errno.ENOSPC: r"No space left|NoSpaceLeft", errno.EDQUOT: r"quota exceeded|DiskQuota"}

_required: dict[tuple[Compiler, str], list[str]] = {}


class NoCompilerError(Exception):
    """There is no C++ compiler, or it can't build what it is given."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: what starts it.
        version: what it says of itself.
    """

    command: tuple[str, ...]
    version: str

    @property
    def is_zig(self) -> bool:
        """Whether it is zig, which has its own names and its own cache."""
        return _is_zig(self.command)

    @property
    def title(self) -> str:
        """Its version in one line."""
        return self.version.splitlines()[0]

    def arch_flag(self, arch: str) -> str:
        """The argument that chooses the instruction set."""
        if self.is_zig:
            return f"-mcpu={arch.replace('-', '_')}"
        arm = platform.machine() in ("aarch64", "arm64")
        return f"-mcpu={arch}" if arm and not arch.startswith("armv") else f"-march={arch}"

    def identity(self, arch: str) -> str:
        """All that the result depends on beside the source."""
        variables = "\n".join(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES)
        where = os.path.realpath(shutil.which(self.command[0]) or self.command[0])
        flags = " ".join([where, *self.command[1:], *FLAGS, self.arch_flag(arch)])
        return f"{flags}\n{self.version}\n{variables}"

    def requires(self, arch: str, folder: Path) -> list[str]:
        """The instructions that its code for an instruction set may use.

        Args:
            arch: the instruction set.
            folder: for what is needed on the way.

        Raises:
            NoCompilerError: it doesn't know the instruction set.
        """
        if (self, arch) not in _required:
            line = [*self.command, self.arch_flag(arch), "-dM", "-E", "-x", "c++", os.devnull]
            _required[self, arch] = cpu.required(_run(line, folder, arch))
        return _required[self, arch]

    def build(self, source: str, arch: str, folder: Path) -> Path:
        """Compile a source to a library.

        Args:
            source: C++.
            arch: the instruction set, ``"native"`` for this machine's own.
            folder: an empty one, for the result and what is needed on the way.

        Raises:
            NoCompilerError: the compiler refuses the source or the instruction set; its first words.
            OSError: the folder can't be written to, or is full.
        """
        code, built = folder / "loop.cpp", folder / "loop.so"
        code.write_text(source)
        line = [*self.command, *FLAGS, self.arch_flag(arch), "-I", str(INCLUDE), str(code)]
        if not self.is_zig:
            _run([*line, "-shared", "-o", str(built)], folder, arch)
            return built
        # Linked as C++, the first library would have zig build a C++ runtime, for about a minute, and
        # linked as C another one for a while. What needs neither finds the rest in the process.
        part = folder / "loop.o"
        _run([*line, "-g0", "-c", "-o", str(part)], folder, arch)
        content = part.read_bytes()
        if any(name in content for name in _CPP_RUNTIME):
            log.announce("zig builds its C++ runtime, which takes about a minute, once")
            _run([*self.command, "-shared", "-pthread", str(part), "-o", str(built)], folder, arch)
        else:
            link = [*self.command[:-1], "cc", "-shared", "-nostdlib", str(part), "-o", str(built)]
            _run(link, folder, arch)
        return built


def compilers() -> Iterator[Compiler]:
    """The C++ compilers of this machine: the system's, then that of ziglang; CXX alone where it is set.

    Raises:
        NoCompilerError: there is none; the message says how to get one.
    """
    given = os.environ.get("CXX", "").strip()
    if given:
        chosen = _checked(*shlex.split(given))
        if chosen is None:
            raise NoCompilerError(f"CXX is {given!r}, which can't be run")
        yield chosen
        return
    found = next(filter(None, (_checked(name) for name in ("c++", "g++", "clang++"))), None)
    if found is not None:
        yield found
    packaged = _checked(sys.executable, "-m", _ZIG, "c++") if importlib.util.find_spec(_ZIG) else None
    if packaged is not None:
        yield packaged
    if found is None and packaged is None:
        raise NoCompilerError(
            "there is no C++ compiler: install one, or the ziglang package, which holds one "
            "(pip install ziglang)"
        )


@functools.cache
def _checked(*command: str) -> Compiler | None:
    """A compiler that can be run; None where it can't."""
    if not command or not shutil.which(command[0]):
        return None
    zig = _is_zig(command)  # whose C++ compiler tells nothing before it has a cache
    line = [*command[:-1], "version"] if zig else [*command, "--version"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=_environment())
    except OSError:
        return None
    if done.returncode != 0 or not done.stdout.strip():
        return None
    return Compiler(command, ("zig " if zig else "") + done.stdout.strip())


def _is_zig(command: tuple[str, ...]) -> bool:
    return _ZIG in command or Path(command[0]).stem == "zig"


def _run(line: list[str], folder: Path, arch: str) -> str:
    """Run a compiler; its output."""
    log.build.info("%s", shlex.join(line))
    try:
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=_environment(folder),
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise NoCompilerError(f"{line[0]} is not done with a loop after {_PATIENCE} s") from None
    if done.returncode == 0:
        return done.stdout
    for number, words in _FULL.items():
        if re.search(words, done.stderr):
            raise OSError(number, os.strerror(number), str(folder))
    lines = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
    first = next((text for text in lines if re.search(r"\berror\b|unknown", text)), lines[0])
    raise NoCompilerError(f"{line[0]} can't compile a loop for {arch}: {first[:200]}")


def _environment(folder: Path | None = None) -> dict[str, str]:
    """The environment of a compiler: messages in English, and nothing written outside the folder."""
    found = {**os.environ, "LC_ALL": "C"}
    if folder is not None:
        found["TMPDIR"] = str(folder)
        cache = str(folder.parent / "zig")  # kept: its next library takes a tenth of the first one's time
        for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
            found.setdefault(name, cache)
    return found


@functools.cache
def headers() -> str:
    """A digest of what every source includes, and of what else the package decides."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(INCLUDE.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

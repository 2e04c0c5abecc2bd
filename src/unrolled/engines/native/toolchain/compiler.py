"""The C++ compilers of this machine and their command lines."""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from unrolled.engines import log
from unrolled.engines.errors import UnavailableError
from unrolled.engines.native.toolchain import cpp_files, cpu, subprocesses

FLAGS = (
    "-std=c++17", "-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-pthread",
)  # fmt: skip
NATIVE = "native"

_COMPILE_TIMEOUT = 900  # seconds; zig takes about a minute for its first C++ library
_PROBE_TIMEOUT = 20  # seconds, to print a version
_MACROS_TIMEOUT = 120  # seconds, to print predefined macros
_OLDEST = {"g++": 12, "clang": 13}  # major versions; include/platform.h checks them, too
_ZIG = "ziglang"
_WINDOWS = "win32"
_NOT_ON_WINDOWS = ("-fPIC", "-pthread")
# Some of GCC's stack slots for vectors aren't aligned on Windows (GCC bug 54412).
_GCC_ON_WINDOWS = ("-static", "-Wa,-muse-unaligned-vector-move")
# Environment variables that change the output of these compilers.
_VARIABLES = (
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX",
    "CCC_OVERRIDE_OPTIONS", "SDKROOT", "MACOSX_DEPLOYMENT_TARGET", "NIX_CFLAGS_COMPILE", "NIX_LDFLAGS",
    "ZIG_LIB_DIR",
)  # fmt: skip
_CPP_RUNTIME = (b"_ZNSt3__1", b"_Znw", b"__gxx_personality", b"__cxa_thread_atexit", b"__cxa_guard")
_DISK_FULL_PATTERNS = {errno.ENOSPC: r"No space left|NoSpaceLeft", errno.EDQUOT: r"quota exceeded|DiskQuota"}

_required: dict[tuple[Compiler, str], list[str]] = {}
_broken: dict[tuple[str, ...], str] = {}  # commands that crashed or did not end, and what happened
_replaced: dict[tuple[str, ...], object] = {}  # commands that another one has replaced, with a warning


class NoCompilerError(UnavailableError):
    """There is no C++ compiler, or it can't compile a source."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: The command that runs it, as a list of arguments.
        version: The output of its version option.
        system: The system that it compiles for, by the name of ``sys.platform``.
    """

    command: tuple[str, ...]
    version: str
    system: str = sys.platform

    @property
    def is_zig(self) -> bool:
        """Whether it is zig, which has its own names of instruction sets and its own cache."""
        return _is_zig(self.command)

    @property
    def is_gcc(self) -> bool:
        """Whether the compiler is g++."""
        return _is_gcc(self.version)

    @property
    def title(self) -> str:
        """The first line of its version."""
        return self.version.splitlines()[0]

    @property
    def flags(self) -> tuple[str, ...]:
        """The arguments for every source."""
        if self.system != _WINDOWS:
            return FLAGS
        flags = tuple(flag for flag in FLAGS if flag not in _NOT_ON_WINDOWS)
        return (*flags, *_GCC_ON_WINDOWS) if self.is_gcc else flags

    def arch_flag(self, arch: str) -> str:
        """Return the argument that selects an instruction set."""
        if self.is_zig:
            return f"-mcpu={arch.replace('-', '_')}"
        arm = platform.machine().lower() in ("aarch64", "arm64")
        return f"-mcpu={arch}" if arm and not arch.startswith("armv") else f"-march={arch}"

    def identity(self, arch: str) -> str:
        """Return a text with everything but the source that affects the compiled library."""
        variables = "\n".join(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES)
        executable = os.path.realpath(shutil.which(self.command[0]) or self.command[0])
        flags = " ".join([executable, *self.command[1:], *self.flags, self.arch_flag(arch)])
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
            empty = folder / "empty.cpp"
            empty.write_text("")
            line = ["-dM", "-E", str(empty)]
            _required[self, arch] = cpu.required(self._run(line, folder, arch, _MACROS_TIMEOUT))
        return _required[self, arch]

    def precompile(self, text: str, arch: str, header: Path) -> Path:
        """Precompile a header with g++.

        Args:
            text: The text of the header.
            arch: The instruction set.
            header: Where to write the text, in an empty folder.

        Returns:
            The path of the precompiled header.

        Raises:
            NoCompilerError: If compiling fails.
            OSError: If the folder can't be written to, or the disk is full.
        """
        header.write_text(text, encoding="utf-8")
        precompiled = header.with_suffix(".h.gch")
        include = ["-I", str(cpp_files.include_folder(header.parent))]
        line = [*self.flags, *include, "-x", "c++-header", str(header), "-o", str(precompiled)]
        self._run(line, header.parent, arch)
        return precompiled

    def build(self, source: str, arch: str, folder: Path, header: Path | None = None) -> Path:
        """Compile a source to a shared library.

        Args:
            source: C++.
            arch: The instruction set, ``"native"`` for that of this machine.
            folder: An empty folder for the library and temporary files.
            header: A precompiled header with what the source begins with.

        Returns:
            The path of the library.

        Raises:
            NoCompilerError: If compiling fails. The message holds the compiler's first error.
            OSError: If the folder can't be written to, or the disk is full.
        """
        code = folder / "loop.cpp"
        library = folder / ("loop.dll" if self.system == _WINDOWS else "loop.so")
        code.write_text(source, encoding="utf-8")
        arguments = [*self.flags, "-I", str(cpp_files.include_folder(folder)), str(code)]
        if header is not None:
            arguments = ["-include", str(header), *arguments]
        if not self.is_zig:
            self._run([*arguments, "-shared", "-o", str(library)], folder, arch)
            return library
        # Linking as C++ makes zig build a C++ runtime for the first library, which takes about a minute.
        # Linking as C with the standard library builds another runtime. Most kernels need neither, so they
        # are linked with -nostdlib; the process provides the rest. On Windows, it provides nothing.
        object_file = folder / "loop.o"
        self._run([*arguments, "-g0", "-c", "-o", str(object_file)], folder, arch)
        content = object_file.read_bytes()
        link = ["-shared", str(object_file), "-o", str(library)]
        if any(name in content for name in _CPP_RUNTIME):
            log.announce("zig builds its C++ runtime. This takes about a minute and happens only once.")
            self._run(["-pthread", *link], folder, arch)
        else:
            as_c = tuple("cc" if word == "c++" else word for word in self.command)
            minimal = [] if self.system == _WINDOWS else ["-nostdlib"]
            dataclasses.replace(self, command=as_c)._run([*minimal, *link], folder, arch)
        return library

    def _run(self, arguments: list[str], folder: Path, arch: str, timeout: float | None = None) -> str:
        """Run the compiler for an instruction set and return its standard output.

        Raises:
            NoCompilerError: If it can't be started, fails or takes too long.
            OSError: If the disk is full.
        """
        line, timeout = [*self.command, self.arch_flag(arch), *arguments], timeout or _COMPILE_TIMEOUT
        log.build.info("%s", shlex.join(line))
        try:
            done = subprocesses.run(line, _environment(folder), timeout)
        except OSError as error:
            raise NoCompilerError(f"{line[0]} can't be started ({error.strerror})") from None
        except subprocess.TimeoutExpired:
            _broken[self.command] = f"{line[0]} did not finish compiling a kernel within {timeout:.0f} s"
            raise NoCompilerError(_broken[self.command]) from None
        if done.returncode == 0:
            return done.stdout
        for number, pattern in _DISK_FULL_PATTERNS.items():
            if re.search(pattern, done.stderr):
                raise OSError(number, os.strerror(number), str(folder))
        lines = done.stderr.strip().splitlines() or [subprocesses.describe_exit(done)]
        first_error = next((text for text in lines if re.search(r"\berror\b|unknown", text)), lines[0])
        first_error = first_error.replace(f"{folder}{os.sep}", "")[:200]
        message = f"{line[0]} can't compile a kernel for {arch}: {first_error}"
        if done.returncode < 0:  # a signal: the next kernel would fare no better
            message = _broken[self.command] = f"{line[0]} {subprocesses.describe_exit(done)}"
        raise NoCompilerError(message)


def compilers() -> Iterator[Compiler]:
    """Yield the C++ compilers of this machine: c++, g++, clang++ and zig, as far as they work.

    If the environment variable CXX is set, yield only that compiler. If a compiler is found but can't be
    used, warn once.

    Raises:
        NoCompilerError: If there is none. The message says why, or how to get one.
    """
    configured = os.environ.get("CXX", "").strip()
    if configured:
        compiler = _probe(*_split(configured))
        if isinstance(compiler, str):
            raise NoCompilerError(f"CXX is {configured!r}, which can't be run: {compiler}")
        if compiler.command in _broken:
            raise NoCompilerError(f"CXX is {configured!r}, which can't be used: {_broken[compiler.command]}")
        yield compiler
        return
    executables: set[str] = set()  # c++ is often another name of g++ or clang++
    found, problems = False, dict[tuple[str, ...], str]()
    for command in (("c++",), ("g++",), ("clang++",), ("zig", "c++"), *_packaged_zig()):
        path = shutil.which(command[0])
        if path is None or os.path.realpath(path) in executables:
            continue
        executables.add(os.path.realpath(path))
        compiler = _broken.get(command) or _probe(*command)
        if isinstance(compiler, str):
            problems[command] = f"{command[0]} can't be used: {compiler}"
            continue
        if not found:
            announce_replacement(problems, command)
        found = True
        yield compiler
    if not found:
        reason = "; ".join(problems.values()) or "no C++ compiler was found"
        needed = f"g++ {_OLDEST['g++']}, clang {_OLDEST['clang']} or newer" if problems else "one"
        raise NoCompilerError(
            f"{reason}. Install {needed}, or the ziglang package, which contains one (pip install ziglang)"
        )


def announce_replacement(problems: Mapping[tuple[str, ...], str], command: tuple[str, ...]) -> None:
    """Warn that a command replaces others. Of each of them, only the first problem is reported.

    Args:
        problems: The commands that can't be used, and why.
        command: The command that is used instead.
    """
    token = object()
    new = [text for other, text in problems.items() if _replaced.setdefault(other, token) is token]
    if new:
        log.announce(f"{'; '.join(new)}. Kernels are compiled with {shlex.join(command)} instead")


def _split(command: str) -> tuple[str, ...]:
    """Split a command into its arguments. It may also be a path with spaces or quotation marks."""
    if shutil.which(command):
        return (command,)
    try:
        if sys.platform != _WINDOWS:
            return tuple(shlex.split(command))
        return tuple(word.strip("\"'") for word in shlex.split(command, posix=False))  # keeps backslashes
    except ValueError:
        raise NoCompilerError(f"CXX is {command!r}, which has an unbalanced quotation mark") from None


def _packaged_zig() -> list[tuple[str, str]]:
    """Return the command of the ziglang package, if it is installed as files."""
    package = importlib.util.find_spec(_ZIG)
    if package is None or not package.submodule_search_locations:
        return []
    return [(str(Path(folder, "zig")), "c++") for folder in package.submodule_search_locations]


@functools.cache
def _probe(*command: str) -> Compiler | str:
    """Return a compiler with its version, or why it can't be used."""
    if not command or not shutil.which(command[0]):
        return "it isn't executable" if command and os.path.exists(command[0]) else "it wasn't found"
    zig = _is_zig(command)  # zig c++ --version needs a cache, zig version doesn't
    if zig and "c++" not in command:
        command = (*command, "c++")
    line = [*command[: command.index("c++")], "version"] if zig else [*command, "--version"]
    try:
        done = subprocesses.run(line, _environment(), _PROBE_TIMEOUT)
    except OSError as error:
        return f"it can't be started ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"it did not print its version within {_PROBE_TIMEOUT} s"
    version = done.stdout.strip()
    if done.returncode != 0:
        return f"{line[-1]} {subprocesses.describe_exit(done)}"
    if not version:
        return f"{line[-1]} printed nothing"
    return _why_too_old(version) or Compiler(command, f"{'zig ' if zig else ''}{version}")


def _is_zig(command: tuple[str, ...]) -> bool:
    return _ZIG in command or Path(command[0]).stem == "zig"


def _is_gcc(version: str) -> bool:
    return re.match(r"\S*(g\+\+|gcc|c\+\+)", version) is not None and "clang version" not in version


def _why_too_old(version: str) -> str:
    """Return why a version is too old; empty if it isn't, or is of an unknown kind."""
    clang = re.search(r"\bclang version (\d+)", version)
    # For example "g++-11 (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0"
    gcc = re.match(r"\S+ (?:\(.*\) )?(\d+)\.\d", version) if _is_gcc(version) else None
    for name, match in (("clang", clang), ("g++", gcc)):
        if match and int(match[1]) < _OLDEST[name]:
            return f"it is {name} {match[1]}, but unrolled needs {name} {_OLDEST[name]} or newer"
    return ""


def _environment(folder: Path | None = None) -> dict[str, str]:
    """Return the environment for a compiler: messages in English, temporary files in a folder."""
    environment = {**os.environ, "LC_ALL": "C"}
    if folder is not None:
        environment |= dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(folder))  # the latter two on Windows
        # Kept between builds: zig compiles later libraries in a tenth of the time of the first.
        zig_cache = str(folder.parent / "zig")
        for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
            environment.setdefault(name, zig_cache)
    return environment

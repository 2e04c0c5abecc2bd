"""Compile the kernels of many steps as one library, so that a thousand random steps take about a minute.

The engine compiles each kernel separately with -O3, which takes about a second. Inside
``with BatchCompiler() as batch``, kernel sources are collected unchanged and compiled together with -O0: each
kernel in its own namespace, hundreds per library, two compilers at a time. So the C++ is what users run, only
less optimized.

A kernel's function is available at once. It forwards calls to the kernel once that is compiled, and does
nothing before. So a program can run once to collect the kernels that it needs.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import unrolled as ur
from unrolled.engines import registry
from unrolled.engines.native.toolchain import build
from unrolled.engines.native.toolchain.compiler import FLAGS, compilers
from unrolled.engines.native.toolchain.cpp_files import INCLUDE

PROCESSES = 2
_EXPORTED = re.compile(r"^EXPORT [\w ]+?[ *](\w+)\(", re.M)
_HEAD = re.compile(r'using T = (\w+);\n#include "loop.h"\n')


def compile_cpp(source: str, library: Path, optimize: str) -> subprocess.Popen[str]:
    """Start to compile a library, and return the compiler's process."""
    compiler = next(compilers())
    code = library.with_suffix(".cpp")
    code.write_text(source)
    flags = [*FLAGS, optimize, compiler.arch_flag(build.arch()), "-shared", "-I", str(INCLUDE)]
    command = [*compiler.command, *flags, str(code), "-o", str(library)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


class BatchCompiler:
    """Collect the kernels that are loaded inside a ``with`` block, and compile them together.

    Args:
        optimize: Optimization flag of the compiler.
        max_kernels: Maximum number of kernels.

    Attributes:
        sources: Number of each kernel, by its source.
    """

    def __init__(self, optimize: str = "-O0", max_kernels: int = 2000) -> None:
        self.sources: dict[str, int] = {}
        self._optimize, self._max_kernels = optimize, max_kernels
        self._finished = False
        self._collected: list[str] = []
        self._running: list[tuple[list[str], Path, subprocess.Popen[str]]] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> BatchCompiler:
        self._folder = Path(tempfile.mkdtemp(prefix="unrolled-batch-"))
        self._load = build.load
        count = self._max_kernels
        jumps = "".join(
            f"long jump_{k}(long a, long b, long c, long d) {{ return to[{k}](a, b, c, d); }}\n"
            for k in range(count)
        )
        nothing = "long nothing(long, long, long, long) { return 1; }\n"
        targets = f"long (*to[{count}])(long, long, long, long) = {{{'nothing, ' * count}}};\n"
        source = f'extern "C" {{\n{nothing}{targets}{jumps}}}\n'
        self._jumps = self._wait(compile_cpp(source, self._folder / "jumps.so", "-O0"), "jumps.so")
        self._targets = (ctypes.c_void_p * count).in_dll(self._jumps, "to")
        self._patch.setattr(build, "load", self.load)
        self._patch.setattr(build, "start", lambda *sources: None, raising=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        registry._cells.clear()
        for _, _, process in self._running:
            process.communicate()
        shutil.rmtree(self._folder)

    def prepare(self, cell: ur.Cell, dtype: torch.dtype) -> None:
        """Collect all kernels of a cell: inference, forward and backward."""
        compiled = registry.compiled(cell, dtype)
        compiled.prepare_training()
        compiled.inference  # noqa: B018

    def load(self, source: str) -> Any:
        """Replace ``build.load``: return a kernel that is compiled later. Other libraries load as usual."""
        if not _HEAD.match(source):
            return self._load(source)
        if source not in self.sources:
            self.sources[source] = len(self.sources)
            self._collected.append(source)
            if self._finished:
                self.finish()
        [name] = _EXPORTED.findall(source)
        return SimpleNamespace(**{name: getattr(self._jumps, f"jump_{self.sources[source]}")})

    def start(self) -> None:
        """Start to compile the kernels collected so far."""
        while len(self._running) >= PROCESSES:
            self._finish_library(*self._running.pop(0))
        for scalar in ("float", "double"):
            sources = [source for source in self._collected if source.startswith(f"using T = {scalar};")]
            if sources:
                library = self._folder / f"{self.sources[sources[0]]}.so"
                process = compile_cpp(self._concatenate(sources, scalar), library, self._optimize)
                self._running.append((sources, library, process))
        self._collected.clear()

    def finish(self) -> None:
        """Compile all collected kernels. From now on, each new kernel is compiled immediately."""
        self._finished = True
        self.start()
        while self._running:
            self._finish_library(*self._running.pop(0))

    def _concatenate(self, sources: list[str], scalar: str) -> str:
        """Return one source with each kernel in its own namespace."""
        parts = [f'using T = {scalar};\n#include "loop.h"\n']
        for source in sources:
            number = self.sources[source]
            [name] = _EXPORTED.findall(source)
            parts.append(
                f"#define {name} loop_{number}\nnamespace in_{number} {{\n{source}\n}}\n#undef {name}\n"
            )
        return "".join(parts)

    def _finish_library(self, sources: list[str], library: Path, process: subprocess.Popen[str]) -> None:
        """Wait for a library, and let the functions of its kernels call it."""
        loaded = self._wait(process, library.name)
        for source in sources:
            number = self.sources[source]
            self._targets[number] = ctypes.cast(getattr(loaded, f"loop_{number}"), ctypes.c_void_p).value

    def _wait(self, process: subprocess.Popen[str], name: str) -> ctypes.CDLL:
        """Wait for a compiler, and load its library."""
        _, errors = process.communicate()
        assert process.returncode == 0, errors[:3000]
        return ctypes.CDLL(str(self._folder / name))

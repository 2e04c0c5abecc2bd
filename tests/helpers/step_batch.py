"""The loops of many steps compiled as one library: how a thousand random steps are tested in a minute.

The engine compiles each loop by itself with -O3, which takes about a second. Inside ``with Batch() as batch``
its sources are collected instead, each as it is, and compiled together with -O0: a loop in a namespace of its
own, some hundreds in a library, two compilers at a time. The C++ is what users run; only the compiler's
effort is less. What a loop is called by is ready at once: a function that jumps to the loop once it is there,
and until then does nothing, so that a program can be gone through once to see which loops it needs.
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
from unrolled.engines.native import registry
from unrolled.engines.native.toolchain import build
from unrolled.engines.native.toolchain.compiler import FLAGS, INCLUDE, compilers

PROCESSES = 2
_EXPORTED = re.compile(r'extern "C" [\w ]+?[ *](\w+)\(')
_HEAD = re.compile(r'using T = (\w+);\n#include "loop.h"\n')


def compile_cpp(source: str, library: Path, optimize: str) -> subprocess.Popen[str]:
    """Begin to compile a library."""
    compiler = next(compilers())
    code = library.with_suffix(".cpp")
    code.write_text(source)
    flags = [*FLAGS, optimize, compiler.arch_flag(build.arch()), "-shared", "-I", str(INCLUDE)]
    command = [*compiler.command, *flags, str(code), "-o", str(library)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


class Batch:
    """Collects the loops that are made inside a ``with`` block, and compiles them together.

    Args:
        optimize: the compiler's effort.
        most: how many loops.
    """

    def __init__(self, optimize: str = "-O0", most: int = 2000) -> None:
        self.sources: dict[str, int] = {}
        self._optimize, self._most = optimize, most
        self._finished = False
        self._waiting: list[str] = []
        self._running: list[tuple[list[str], Path, subprocess.Popen[str]]] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Batch:
        self._folder = Path(tempfile.mkdtemp(prefix="unrolled-batch-"))
        self._load = build.load
        jumps = "".join(
            f"long jump_{k}(long a, long b, long c, long d) {{ return to[{k}](a, b, c, d); }}\n"
            for k in range(self._most)
        )
        nothing = "long nothing(long, long, long, long) { return 1; }\n"
        to = f"long (*to[{self._most}])(long, long, long, long) = {{{'nothing, ' * self._most}}};\n"
        source = f'extern "C" {{\n{nothing}{to}{jumps}}}\n'
        self._jumps = self._built(compile_cpp(source, self._folder / "jumps.so", "-O0"), "jumps.so")
        self._to = (ctypes.c_void_p * self._most).in_dll(self._jumps, "to")
        self._patch.setattr(build, "load", self.load)
        self._patch.setattr(build, "start", lambda *sources: None, raising=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        registry._known.clear()
        for _, _, process in self._running:
            process.communicate()
        shutil.rmtree(self._folder)

    def prepare(self, cell: ur.Cell, dtype: torch.dtype) -> None:
        """Make all loops of a cell: of inference, of training, and back."""
        made = registry.compiled(cell, dtype)
        made.prepare_training()
        made.inference  # noqa: B018

    def load(self, source: str) -> Any:
        """In the place of ``build.load``: a loop that is compiled later; other libraries as they are."""
        if not _HEAD.match(source):
            return self._load(source)
        if source not in self.sources:
            self.sources[source] = len(self.sources)
            self._waiting.append(source)
            if self._finished:
                self.finish()
        [name] = _EXPORTED.findall(source)
        return SimpleNamespace(**{name: getattr(self._jumps, f"jump_{self.sources[source]}")})

    def start(self) -> None:
        """Begin to compile what has been collected."""
        while len(self._running) >= PROCESSES:
            self._finish(self._running.pop(0))
        for scalar in ("float", "double"):
            part = [source for source in self._waiting if source.startswith(f"using T = {scalar};")]
            if part:
                library = self._folder / f"{self.sources[part[0]]}.so"
                process = compile_cpp(self._joined(part, scalar), library, self._optimize)
                self._running.append((part, library, process))
        self._waiting.clear()

    def finish(self) -> None:
        """Have all that has been collected ready to run, and from now on each loop as soon as it is made."""
        self._finished = True
        self.start()
        while self._running:
            self._finish(self._running.pop(0))

    def _joined(self, sources: list[str], scalar: str) -> str:
        text = [f'using T = {scalar};\n#include "loop.h"\n']
        for source in sources:
            number = self.sources[source]
            [name] = _EXPORTED.findall(source)
            text.append(
                f"#define {name} loop_{number}\nnamespace in_{number} {{\n{source}\n}}\n#undef {name}\n"
            )
        return "".join(text)

    def _finish(self, running: tuple[list[str], Path, subprocess.Popen[str]]) -> None:
        sources, library, process = running
        loaded = self._built(process, library.name)
        for source in sources:
            number = self.sources[source]
            self._to[number] = ctypes.cast(getattr(loaded, f"loop_{number}"), ctypes.c_void_p).value

    def _built(self, process: subprocess.Popen[str], name: str) -> ctypes.CDLL:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[:3000]
        return ctypes.CDLL(str(self._folder / name))

"""Exported C, compiled and called."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from unrolled.engines.native.toolchain import build

CC = shutil.which(os.environ.get("CC", "cc"))
NEEDS_CC = pytest.mark.skipif(CC is None, reason="needs a C compiler: cc")
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-ffp-contract=off")
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def native_flags() -> tuple[str, ...]:
    """Return the flags for the instruction set of the native engine."""
    return (f"-march={build.arch()}",) if IS_X86 else (f"-mcpu={build.arch()}",)


def compile_c(*arguments: object, flags: tuple[str, ...] | None = None) -> None:
    """Run the C compiler."""
    chosen = native_flags() if flags is None else flags
    done = subprocess.run([str(CC), *WARNINGS, *chosen, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Exported:
    """A module, exported, compiled as a shared library and loaded.

    Args:
        module: The module.
        folder: An empty folder.
        flags: Flags for the compiler. By default those of the native engine's instruction set.
        weights: As in ``ur.export.c``.
    """

    def __init__(
        self, module: nn.Module, folder: Path, flags: tuple[str, ...] | None = None, weights: str = "array"
    ) -> None:
        self.files = ur.export.c(module, folder, name="m", weights=weights)  # type: ignore[arg-type]
        library = folder / "m.so"
        compile_c("-O2", "-shared", "-fPIC", folder / "m.c", "-o", library, flags=flags)
        self.c = ctypes.CDLL(str(library))
        self.state = ctypes.create_string_buffer(self.files.state_bytes)
        arguments: list[object] = []
        if weights == "file":
            content = (folder / "m_weights.bin").read_bytes()
            self.content = ctypes.create_string_buffer(content, len(content))
            arguments = [self.content, ctypes.c_size_t(len(content))]
        assert self.c.m_init(self.state, *arguments) == 0

    def run(self, x: Tensor) -> Tensor:
        """Run a sequence ``(time, input)`` from the current state, and return ``(time, output)``."""
        y = torch.full((len(x), self.files.output), float("nan"))
        x = (x if x.is_floating_point() else x.to(torch.int32)).contiguous()
        work = torch.empty(10_000)
        pointers = [ctypes.c_void_p(one.data_ptr()) for one in (x, y, work)]
        extra = pointers[2:] if self.files.bidirectional else []
        self.c.m_run(self.state, *pointers[:2], ctypes.c_size_t(len(x)), *extra)
        return y

    def step(self, x: Tensor) -> Tensor:
        """Run one time step ``(input,)``."""
        y = torch.full((self.files.output,), float("nan"))
        x = x.contiguous()
        self.c.m_step(self.state, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
        return y

    def reset(self) -> None:
        self.c.m_reset(self.state)

    def selftest(self) -> tuple[int, float]:
        """Run the self-test; return its result and the largest difference."""
        difference = ctypes.c_float()
        return self.c.m_selftest(self.state, ctypes.byref(difference)), difference.value


def streamed(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of a stream of one row, ``(time, output)``."""
    stream = ur.Stream(layer)
    return torch.cat([stream(row[None, None]) for row in x]).flatten(0, 1)

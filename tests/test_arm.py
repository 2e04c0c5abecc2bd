"""The same sources for arm64: compiled by the zig of this machine, and run where qemu is at hand."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled as ur
from test_functions import ONE, PROGRAM, TWO
from test_new_cell import MGU
from unrolled.engines.native.compiler import FLAGS, INCLUDE
from unrolled.engines.native.emit import emit
from unrolled.engines.native.products import _source, _team_source
from unrolled.engines.native.step import Compiled

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
TARGET = ("-target", "aarch64-linux-musl", "-mcpu=generic")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function")  # GCC's unroll
CELLS: dict[str, Any] = {
    "rnn-tanh": lambda: ur.cells.RNN(5, 12),
    "rnn-relu": lambda: ur.cells.RNN(5, 12, nonlinearity="relu"),
    "lstm": lambda: ur.cells.LSTM(5, 12),
    "lstm-proj": lambda: ur.cells.LSTM(5, 12, proj_size=3),
    "gru": lambda: ur.cells.GRU(5, 12),
    "mgu": lambda: MGU(5, 12),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None,
    reason="the ziglang package, which compiles for arm64, is not here",
)


@pytest.fixture(scope="module")
def zig(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("zig")
    caches = {f"ZIG_{name}_CACHE_DIR": str(folder / "cache") for name in ("GLOBAL", "LOCAL")}

    def compiled(*arguments: object) -> None:
        line = [
            sys.executable,
            "-m",
            "ziglang",
            "c++",
            *TARGET,
            *FLAGS,
            "-I",
            str(INCLUDE),
            *map(str, arguments),
        ]
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **caches})
        assert done.returncode == 0, done.stderr

    return compiled


@functools.cache
def sources(kind: str, dtype: torch.dtype) -> list[str]:
    """The loops of a cell: for inference, for training and back."""
    step = Compiled(CELLS[kind](), dtype)
    forward = emit(step._forward, dtype, whole=step._read_back)
    back = emit(step._backward, dtype, shifted=step.captured.states)
    return [step._emitted.source, forward.source, back.source]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", CELLS)
def test_every_loop_compiles_without_a_warning(
    kind: str, dtype: torch.dtype, zig: Any, tmp_path: Path
) -> None:
    for number, source in enumerate(sources(kind, dtype)):
        file = tmp_path / f"{number}.cpp"
        file.write_text(source)
        zig(*WARNINGS, "-c", file, "-o", file.with_suffix(".o"))


def test_products_and_team_compile_without_a_warning(zig: Any, tmp_path: Path) -> None:
    for name, source in {
        "float": _source(torch.float32), "double": _source(torch.float64), "team": _team_source()
    }.items():  # fmt: skip
        file = tmp_path / f"{name}.cpp"
        file.write_text(source)
        zig(*WARNINGS, "-c", file, "-o", file.with_suffix(".o"))


@pytest.mark.exhaustive
@pytest.mark.skipif(QEMU is None, reason="there is no qemu-aarch64, which runs programs for arm64")
def test_the_functions_are_within_two_units(zig: Any, tmp_path: Path) -> None:
    """In float32. The C library's acosh, that ours is compared with here, is wrong below -2^21."""
    kernel, program = tmp_path / "kernel.o", tmp_path / "program"
    zig("-DKERNEL=arm64", PROGRAM, "-c", "-o", kernel)
    zig("-DKERNELS=X(arm64)", PROGRAM, kernel, "-static", "-o", program)
    for function in (*ONE, *TWO):
        line = [str(QEMU), str(program), function, "0", "1", "4001", "100000"]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        _, _, error, _, _, wrong, _, _, moved = done.stdout.split()
        assert float(error) <= 2, (function, error)
        assert int(moved) == 0, function
        assert int(wrong) == 0 or function == "acosh", function

"""The same sources for arm64: compiled by the zig of this machine, and run where qemu is at hand."""

from __future__ import annotations

import bisect
import ctypes
import functools
import gc
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vector_math import ONE, PROGRAM, TWO

import unrolled as ur
from helpers.layer_pairs import TOLERANCE, assert_close, team
from helpers.user_cell import MGU
from unrolled.engines import autograd, run_compiled
from unrolled.engines.native import kernel
from unrolled.engines.native.codegen import emit
from unrolled.engines.native.compiled_cell import CompiledCell
from unrolled.engines.native.kernel import KernelCall, launch
from unrolled.engines.native.matmul import _source, _team_source
from unrolled.engines.native.toolchain.compiler import FLAGS, INCLUDE

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
RUN = Path(__file__).with_name("arm64.cpp")
NEEDS_QEMU = pytest.mark.skipif(
    QEMU is None, reason="there is no qemu-aarch64, which runs programs for arm64"
)
TARGET = ("-target", "aarch64-linux-musl", "-mcpu=generic")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function")  # GCC's unroll
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rnn-tanh": (ur.cells.RNN, {}),
    "rnn-relu": (ur.cells.RNN, {"nonlinearity": "relu"}),
    "lstm": (ur.cells.LSTM, {}),
    "lstm-proj": (ur.cells.LSTM, {"proj_size": 3}),
    "gru": (ur.cells.GRU, {}),
    "mgu": (MGU, {}),
    "layer-norm": (ur.cells.LayerNormLSTM, {}),
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
    made, options = CELLS[kind]
    step = CompiledCell(made(5, 12, **options), dtype)
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
@NEEDS_QEMU
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


def memory(block: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(block.data_ptr(), block.nbytes())


class Call:
    """A call of a loop, made here: its source, and all memory that it reads and writes, before and after."""

    def __init__(self, job: KernelCall) -> None:
        loops = {one._address: one for one in gc.get_objects() if type(one) is Kernel}
        self.source = loops[job.run].emitted.source
        tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
        storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in tensors)}
        starts = sorted(storages)
        numbers: dict[int, int] = {}
        places = []
        for pointer in job.pointers:
            start = starts[bisect.bisect_right(starts, pointer) - 1] if pointer else 0
            places += [numbers.setdefault(start, len(numbers)), pointer - start] if pointer else [-1, 0]
        blocks = [storages[start] for start in numbers]
        parts = [list(job.sizes), places, [block.nbytes() for block in blocks]]
        self.content = b"".join(
            [struct.pack(f"<{1 + len(part)}q", len(part), *part) for part in parts]
            + list(map(memory, blocks))
        )
        launch([job])
        self.after = torch.frombuffer(bytearray(b"".join(map(memory, blocks))), dtype=torch.float32)


@pytest.mark.exhaustive
@NEEDS_QEMU
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_gives_the_numbers_that_it_gives_here(
    kind: str, threads: int, zig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward for inference, forward for training and back, in float32."""
    calls: list[Call] = []
    for module in (run_compiled, autograd):
        monkeypatch.setattr(module, "launch", lambda jobs: calls.extend(map(Call, jobs)))
    monkeypatch.setattr(kernel, "_WORTH", 0)
    made, options = CELLS[kind]
    layer, x = ur.Recurrent(made, 5, 12, **options), torch.randn(7, 3, 5, requires_grad=True)
    with team(threads), ur.engine("native"):
        with torch.no_grad():
            layer(x)
        layer(x)[0].square().sum().backward()
    assert len(calls) == 3
    shared = [tmp_path / f"{name}.o" for name in ("products", "team")]
    for object_file, source in zip(shared, (_source(torch.float32), _team_source()), strict=True):
        file = object_file.with_suffix(".cpp")
        file.write_text(source)
        zig("-c", file, "-o", object_file)
    for number, call in enumerate(calls):
        file, program, before, after = (tmp_path / f"{number}.{end}" for end in ("cpp", "out", "in", "after"))
        file.write_text(call.source)
        before.write_bytes(call.content)
        zig(RUN, file, *shared, "-static", "-o", program)
        subprocess.run([str(QEMU), str(program), str(before), str(after)], check=True)
        found = torch.frombuffer(bytearray(after.read_bytes()), dtype=torch.float32)
        assert_close(found, call.after, TOLERANCE[torch.float32], f"call {number}")

"""The generated C++ on arm64: compiled with the ziglang package, and run with qemu, if they are installed."""

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
from test_vector_math import BINARY, MACROS, PROGRAM, UNARY

import unrolled as ur
from helpers.layer_pairs import TOLERANCE, assert_close, use_threads
from helpers.user_cell import MGU
from unrolled.engines.native.backend import BACKEND
from unrolled.engines.native.call_arguments import CallArguments
from unrolled.engines.native.kernel import Kernel, KernelCall, launch
from unrolled.engines.native.matmul import _source, _thread_pool_source
from unrolled.engines.native.toolchain.compiler import FLAGS
from unrolled.engines.native.toolchain.cpp_files import INCLUDE
from unrolled.engines.native.tuning import constants

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
RUN_CALL = Path(__file__).with_name("arm64.cpp")
NEEDS_QEMU = pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64, to run programs for arm64")
TARGET = ("-target", "aarch64-linux-musl", "-mcpu=generic")
# The last three: clang doesn't know GCC's unroll pragma, each loop uses only some functions of the headers,
# and all loops have functions with the same arguments.
WARNINGS = (
    "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-parameter",
)  # fmt: skip
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
    reason="needs the ziglang package, to compile for arm64",
)


@pytest.fixture(scope="module")
def zig(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("zig")
    caches = {f"ZIG_{name}_CACHE_DIR": str(folder / "cache") for name in ("GLOBAL", "LOCAL")}

    def compile_cpp(*arguments: object) -> None:
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

    return compile_cpp


@functools.cache
def sources(kind: str, dtype: torch.dtype) -> list[str]:
    """Return the source of a cell's loops: for inference, and forward and backward for training."""
    cell, options = CELLS[kind]
    compiled = BACKEND.compile(cell(5, 12, **options), dtype)
    return [loop.spec.source for loop in (compiled._generated_for_inference, *compiled._training_loops)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", CELLS)
def test_every_loop_compiles_without_a_warning(
    kind: str, dtype: torch.dtype, zig: Any, tmp_path: Path
) -> None:
    for number, source in enumerate(sources(kind, dtype)):
        file = tmp_path / f"{number}.cpp"
        file.write_text(source)
        zig(*WARNINGS, "-c", file, "-o", file.with_suffix(".o"))


@pytest.mark.slow
def test_products_and_thread_pool_compile_without_a_warning(zig: Any, tmp_path: Path) -> None:
    for name, source in {
        "float": _source(torch.float32), "double": _source(torch.float64), "pool": _thread_pool_source()
    }.items():  # fmt: skip
        file = tmp_path / f"{name}.cpp"
        file.write_text(source)
        zig(*WARNINGS, "-c", file, "-o", file.with_suffix(".o"))


@pytest.mark.exhaustive
@NEEDS_QEMU
def test_functions_are_within_two_units(zig: Any, tmp_path: Path) -> None:
    """In float32. The C library's acosh, which is the reference here, is wrong below -2^21."""
    kernel, program = tmp_path / "kernel.o", tmp_path / "program"
    zig(*MACROS, "-DKERNEL=arm64", PROGRAM, "-c", "-o", kernel)
    zig(*MACROS, "-DKERNELS=X(arm64)", PROGRAM, kernel, "-static", "-o", program)
    for function in (*UNARY, *BINARY):
        line = [str(QEMU), str(program), function, "0", "1", "4001", "100000"]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        _, _, error, _, _, wrong, _, _, lane_dependent = done.stdout.split()
        assert float(error) <= 2, (function, error)
        assert int(lane_dependent) == 0, function
        assert int(wrong) == 0 or function == "acosh", function


def read_memory(block: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(block.data_ptr(), block.nbytes())


class RecordedCall:
    """A call of a loop on this machine, recorded.

    Attributes:
        source: Source of the loop.
        content: Its arguments and all memory that it reads or writes, before the call.
        after: The same memory after the call.
    """

    def __init__(self, call: KernelCall) -> None:
        kernels = {value._address: value for value in gc.get_objects() if type(value) is Kernel}
        self.source = kernels[call.run].spec.source
        tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
        storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in tensors)}
        starts = sorted(storages)
        block_numbers: dict[int, int] = {}
        places = []  # for each pointer its block and the offset in it
        for pointer in call.pointers:
            start = starts[bisect.bisect_right(starts, pointer) - 1] if pointer else 0
            number = block_numbers.setdefault(start, len(block_numbers)) if pointer else -1
            places += [number, pointer - start] if pointer else [-1, 0]
        blocks = [storages[start] for start in block_numbers]
        numbers = [getattr(call.arguments, name) or 0 for name, _ in CallArguments._fields_]
        sizes = kernels[call.run]._sizes
        parts = [numbers, list(sizes), places, [block.nbytes() for block in blocks]]
        self.content = b"".join(
            [struct.pack(f"<{1 + len(part)}q", len(part), *part) for part in parts]
            + list(map(read_memory, blocks))
        )
        launch([call])
        self.after = torch.frombuffer(bytearray(b"".join(map(read_memory, blocks))), dtype=torch.float32)


def record_calls(kind: str, threads: int, patch: pytest.MonkeyPatch) -> list[RecordedCall]:
    """Run a layer on this machine, for inference and for training, and return the calls of its loops."""
    calls: list[RecordedCall] = []
    patch.setattr(BACKEND, "launch", lambda new: calls.extend(map(RecordedCall, new)))
    patch.setitem(constants(), "STEP_WORK_FOR_TWO_THREADS", 1)
    cell, options = CELLS[kind]
    layer, x = ur.Recurrent(cell, 5, 12, **options), torch.randn(7, 3, 5, requires_grad=True)
    with use_threads(threads), ur.engine("native"):
        with torch.no_grad():
            layer(x)
        layer(x)[0].square().sum().backward()
    assert len(calls) == 3
    return calls


@pytest.mark.exhaustive
@NEEDS_QEMU
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", CELLS)
def test_loops_give_the_same_numbers_as_on_this_machine(
    kind: str, threads: int, zig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward for inference, and forward and backward for training, in float32."""
    calls = record_calls(kind, threads, monkeypatch)
    shared = [tmp_path / f"{name}.o" for name in ("products", "pool")]
    for object_file, source in zip(shared, (_source(torch.float32), _thread_pool_source()), strict=True):
        file = object_file.with_suffix(".cpp")
        file.write_text(source)
        zig("-c", file, "-o", object_file)
    for number, call in enumerate(calls):
        file, program, before, after = (tmp_path / f"{number}.{end}" for end in ("cpp", "out", "in", "after"))
        file.write_text(call.source)
        before.write_bytes(call.content)
        zig(RUN_CALL, file, *shared, "-static", "-o", program)
        subprocess.run([str(QEMU), str(program), str(before), str(after)], check=True)
        result = torch.frombuffer(bytearray(after.read_bytes()), dtype=torch.float32)
        assert_close(result, call.after, TOLERANCE[torch.float32], f"call {number}")

"""Kernels for Windows, macOS and Linux on arm64, compiled on this machine with the ziglang package."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_arm64 import CELLS as ARM64_CELLS
from test_arm64 import RUN_CALL, record_calls

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, TOLERANCE, assert_close
from unrolled.engines.native.backend import BACKEND
from unrolled.engines.native.matmul import _source, _thread_pool_source
from unrolled.engines.native.toolchain import build, cache
from unrolled.engines.native.toolchain.compiler import Compiler, _packaged_zig
from unrolled.engines.native.toolchain.cpp_files import INCLUDE

TARGETS = {  # zig's name of the target: the system by the name of sys.platform, and the processor
    "x86_64-windows-gnu": ("win32", "x86-64-v3"),
    "aarch64-macos": ("darwin", "apple_m1"),
    "aarch64-linux-gnu": ("linux", "generic"),
}
WINE = shutil.which("wine64") or shutil.which("wine")
SAMPLE = ("LSTM", "GRU", "LayerNormLSTM")
CELLS = sorted(name for name in ur.cells.__all__ if issubclass(getattr(ur.cells, name), ur.Cell))
MAGIC = {"win32": b"MZ", "darwin": b"\xcf\xfa\xed\xfe", "linux": b"\x7fELF"}

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang package"),
]


@pytest.fixture(autouse=True)
def keep_zig_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep zig's runtimes for the targets, which take minutes to build."""
    folder = cache.user_folder()
    assert folder is not None
    for name in ("GLOBAL", "LOCAL"):
        monkeypatch.setenv(f"ZIG_{name}_CACHE_DIR", str(folder / "zig"))


def cross_compiler(target: str) -> Compiler:
    ((zig, mode),) = _packaged_zig()
    return Compiler((zig, mode, "-target", target), "zig", system=TARGETS[target][0])


@functools.cache
def loops(name: str) -> list[str]:
    """Return the sources of a cell's loops: for inference, and forward and backward for training."""
    compiled = BACKEND.compile(getattr(ur.cells, name)(8, 4), torch.float32)
    return [loop.spec.source for loop in (compiled._generated_for_inference, *compiled._training_loops)]


def build_library(source: str, target: str, folder: Path) -> bytes:
    """Compile a source as the toolchain does on another system, and return the content of the library."""
    folder.mkdir()
    library = cross_compiler(target).build(source, TARGETS[target][1], folder)
    assert library.suffix == (".dll" if TARGETS[target][0] == "win32" else ".so")
    return library.read_bytes()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive) for name in CELLS]
)
def test_every_loop_compiles_for_other_systems(name: str, target: str, tmp_path: Path) -> None:
    for number, source in enumerate(loops(name)):
        content = build_library(source, target, tmp_path / str(number))
        assert content.startswith(MAGIC[TARGETS[target][0]])
        assert b"run" in content


@pytest.mark.parametrize("target", TARGETS)
def test_products_and_thread_pool_compile_for_other_systems(target: str, tmp_path: Path) -> None:
    sources = {
        "run_bulk": _source(torch.float32),
        "products": _source(torch.float64),
        "thread_pool_run": _thread_pool_source(),
        "lanes": build.PROBE,
    }
    for name, source in sources.items():
        content = build_library(source, target, tmp_path / name)
        assert content.startswith(MAGIC[TARGETS[target][0]])
        assert name.encode() in content  # exported


@pytest.mark.exhaustive
@pytest.mark.skipif(WINE is None, reason="needs wine, to run programs for Windows")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ARM64_CELLS)
def test_loops_give_the_same_numbers_on_windows(
    kind: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward for inference, and forward and backward for training, on the thread pool's own threads."""
    target = "x86_64-windows-gnu"
    compiler = cross_compiler(target)

    def compile_cpp(*arguments: object) -> None:
        line = [*compiler.command, *compiler.flags, compiler.arch_flag("x86-64-v3"), "-I", str(INCLUDE)]
        done = subprocess.run([*line, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    calls = record_calls(kind, threads, monkeypatch)
    shared = [tmp_path / "products.cpp", tmp_path / "pool.cpp"]
    for file, source in zip(shared, (_source(torch.float32), _thread_pool_source()), strict=True):
        file.write_text(source)
    for number, call in enumerate(calls):
        file, program, before, after = (tmp_path / f"{number}.{end}" for end in ("cpp", "exe", "in", "after"))
        file.write_text(call.source)
        before.write_bytes(call.content)
        compile_cpp(RUN_CALL, file, *shared, "-o", program)
        subprocess.run([str(WINE), program, before, after], check=True)
        result = torch.frombuffer(bytearray(after.read_bytes()), dtype=torch.float32)
        assert_close(result, call.after, TOLERANCE[torch.float32], f"call {number}")


def test_the_flags_of_gcc_and_clang_for_windows() -> None:
    gcc = Compiler(("g++",), "g++ (MinGW-W64 x86_64-ucrt-posix-seh) 13.2.0", system="win32")
    clang = Compiler(("clang++",), "clang version 18.1.8", system="win32")
    for windows in (gcc, clang):
        assert not {"-fPIC", "-pthread"} & {*windows.flags}
        assert "-ffp-contract=off" in windows.flags
    assert "-static" in gcc.flags
    assert "-static" not in clang.flags

"""Exported C for other systems, compiled with the ziglang package, and run where an emulator is found."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import unrolled as ur
from helpers.c_library import streamed
from unrolled.engines.native.toolchain import cache

TARGETS = {  # zig's name of the target: flags, and the first bytes of an object file
    "x86_64-linux-musl": (("-mcpu=x86_64_v3",), b"\x7fELF"),
    "x86_64-linux-musl AVX-VNNI": (("-mcpu=alderlake",), b"\x7fELF"),
    "aarch64-linux-musl": ((), b"\x7fELF"),
    "aarch64-linux-musl dot products": (("-mcpu=generic+dotprod",), b"\x7fELF"),
    "x86_64-windows-gnu": (("-mcpu=x86_64_v3",), b"d\x86"),
    "aarch64-macos": ((), b"\xcf\xfa\xed\xfe"),
    "wasm32-freestanding": ((), b"\0asm"),
    "wasm32-freestanding simd": (("-mcpu=generic+simd128",), b"\0asm"),
    "thumb-freestanding-eabihf": (("-mcpu=cortex_m4+vfp4d16sp",), b"\x7fELF"),
    "thumb-freestanding-eabihf M7": (("-mcpu=cortex_m7+fp_armv8d16sp",), b"\x7fELF"),
}
EMULATORS = {  # programs that run a target's programs, by target
    "x86_64-linux-musl": "env" if sys.platform == "linux" and os.uname().machine == "x86_64" else "none",
    "aarch64-linux-musl": "qemu-aarch64",
    "aarch64-linux-musl dot products": "qemu-aarch64",
    "x86_64-windows-gnu": "wine64",
}
# What a compiler may call: copies of memory, and arithmetic in double on processors that have none.
ALLOWED = re.compile(r"memcpy|memset|__aeabi_(mem(cpy|set|clr)\d?|unwind_cpp_pr\d|d\w+|f2d|d2\w+|[iu]l?2d)")

pytestmark = [
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


def zig(command: str, *arguments: object) -> str:
    line = [sys.executable, "-m", "ziglang", command, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_for(target: str, *arguments: object) -> None:
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-pass-failed", "-ffp-contract=off")
    zig("cc", "-target", target.split()[0], *TARGETS[target][0], *flags, *arguments)


LAYERS: dict[str, Callable[[], ur.Recurrent]] = {
    "LSTM": lambda: ur.LSTM(1, 32),
    "LayerNormGRU": lambda: ur.Recurrent(ur.cells.LayerNormGRU, 1, 32),
    "int8": lambda: ur.quantize(ur.LSTM(1, 32).eval()),
    "float16": lambda: ur.quantize(ur.LSTM(1, 32).eval(), "float16"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_compiles(name: str, target: str, tmp_path: Path, record_property: Any) -> None:
    ur.export.c(LAYERS[name](), tmp_path, name="m")
    for level in ("-Os", "-O3"):
        compile_for(target, level, "-c", tmp_path / "m.c", "-o", tmp_path / "m.o")
        content = (tmp_path / "m.o").read_bytes()
        assert content.startswith(TARGETS[target][1])
        record_property(f"bytes with {level}", len(content))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("target", ["aarch64-linux-musl", "thumb-freestanding-eabihf"])
def test_it_calls_nothing(target: str, tmp_path: Path) -> None:
    ur.export.c(ur.Recurrent(ur.cells.LayerNormLSTM, 3, 21), tmp_path, name="m")
    compile_for(target, "-O2", "-c", tmp_path / "m.c", "-o", tmp_path / "m.o")
    done = subprocess.run(["nm", "-u", tmp_path / "m.o"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this nm can't read files of other processors")
    assert all(ALLOWED.fullmatch(line.split()[-1]) for line in done.stdout.splitlines()), done.stdout


def find_emulator(name: str) -> str:
    """Return the path of an emulator; skip the test if there is none. Debian's wine64 isn't on the PATH."""
    path = shutil.which(name) or shutil.which(name, path="/usr/lib/wine")
    if path is None:
        pytest.skip(f"needs {name}")
    return path


@pytest.mark.parametrize("target", EMULATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_runs(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = find_emulator(EMULATORS[target])
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    monkeypatch.setenv("WINEDEBUG", "-all")
    layer = LAYERS[name]()
    ur.export.c(layer, tmp_path, name="m")
    program = tmp_path / "example.exe"
    compile_for(target, "-O2", tmp_path / "example.c", tmp_path / "m.c", "-o", program)
    done = subprocess.run([emulator, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # it runs the self-test first
    result = torch.tensor([float(line) for line in done.stdout.split()])
    expected = streamed(layer, ramp(100))[-1]
    if name != "LayerNormGRU":  # no columns are summed up
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def ramp(steps: int) -> torch.Tensor:
    """Return the input of the example."""
    return ((torch.arange(steps) % 10).float() / 10).unsqueeze(1)


def bytes_in_flash(program: Path) -> int:
    """Return how many bytes of an ELF file for 32 bits are loaded into memory."""
    content = program.read_bytes()
    offset, size, count = (*struct.unpack_from("<I", content, 28), *struct.unpack_from("<HH", content, 42))
    headers = [struct.unpack_from("<8I", content, offset + k * size) for k in range(count)]
    return sum(in_file for kind, _, _, _, in_file, *_ in headers if kind == 1)


@pytest.mark.parametrize(
    ("target", "board"),
    [("thumb-freestanding-eabihf", "mps2-an386"), ("thumb-freestanding-eabihf M7", "mps2-an500")],
)
@pytest.mark.parametrize(("name", "flash_limit"), [("LSTM", 24), ("int8", 12), ("float16", 16)])
def test_it_runs_on_a_microcontroller(
    name: str, flash_limit: int, target: str, board: str, tmp_path: Path, record_property: Any
) -> None:
    """With the bits of a stream, in ``flash_limit`` KB of flash and about 1 KB of memory."""
    layer = LAYERS[name]()
    exported = ur.export.c(layer, tmp_path, name="m")
    for name in ("cortex_m.c", "cortex_m.ld"):
        shutil.copy(Path(__file__).parents[1] / "helpers" / name, tmp_path)
    (tmp_path / "memory.c").write_text(WITHOUT_LIBRARY)
    sources = [tmp_path / name for name in ("cortex_m.c", "m.c", "memory.c")]
    script = ("-nostdlib", "-Wl,--gc-sections", f"-Wl,-T,{tmp_path / 'cortex_m.ld'}")
    compile_for(target, "-Os", *script, *sources, "-o", tmp_path / "m.elf")
    flash = bytes_in_flash(tmp_path / "m.elf")
    record_property("bytes of flash", flash)
    assert flash <= flash_limit * 1024
    command = ["-M", board, "-nographic", "-semihosting", "-kernel", tmp_path / "m.elf"]
    emulator = find_emulator("qemu-system-arm")
    done = subprocess.run([emulator, *command], capture_output=True, text=True, timeout=60)
    failed, stack, *bits = [int(line, 16) for line in (done.stderr + done.stdout).split()]
    assert not failed
    record_property("bytes of memory", exported.state_bytes + stack)
    assert exported.state_bytes + stack <= (1280 if name == "int8" else 1024)
    outputs = numpy.array(bits, numpy.uint32).view(numpy.float32).reshape(20, 32)
    assert torch.equal(torch.from_numpy(outputs), streamed(layer, ramp(20)))


RUN_IN_NODE = """
const fs = require("fs");
WebAssembly.instantiate(fs.readFileSync(process.argv[2]), {}).then(({ instance }) => {
  const c = instance.exports, memory = new DataView(c.memory.buffer), state = c.__heap_base.value;
  c.m_init(state);
  const result = c.m_selftest(state, 0);
  console.log(result);
});
"""
WITHOUT_LIBRARY = """
#include <stddef.h>
void *memset(void *to, int c, size_t n) {
  for (size_t k = 0; k < n; k++) ((volatile char *)to)[k] = (char)c;
  return to;
}
void *memcpy(void *to, const void *from, size_t n) {
  for (size_t k = 0; k < n; k++) ((volatile char *)to)[k] = ((const char *)from)[k];
  return to;
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("target", ["wasm32-freestanding", "wasm32-freestanding simd"])
@pytest.mark.parametrize("name", ["LSTM", "int8", "float16"])
def test_webassembly_runs_in_node(name: str, target: str, tmp_path: Path) -> None:
    ur.export.c(LAYERS[name](), tmp_path, name="m")
    (tmp_path / "run.js").write_text(RUN_IN_NODE)
    (tmp_path / "memory.c").write_text(WITHOUT_LIBRARY)
    exports = [f"-Wl,--export={name}" for name in ("m_init", "m_step", "m_selftest", "__heap_base")]
    linked = ("-nostdlib", "-Wl,--no-entry", *exports, tmp_path / "m.c", tmp_path / "memory.c")
    compile_for(target, "-O2", *linked, "-o", tmp_path / "m.wasm")
    done = subprocess.run(["node", tmp_path / "run.js", tmp_path / "m.wasm"], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr

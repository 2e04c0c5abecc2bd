"""Quantized products on other instruction sets: a C++ program compares them with plain loops."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_COMPILER
from helpers.toolchain import X86_ONLY
from unrolled.engines.native.toolchain import cpu
from unrolled.engines.native.toolchain.compiler import FLAGS, compilers
from unrolled.engines.native.toolchain.cpp_files import INCLUDE

PROGRAM = Path(__file__).with_name("products.cpp")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ARM = ("-target", "aarch64-linux-musl", "-Wno-unknown-pragmas")
# Instruction sets, and the features of processors that run them, by Linux's names.
X86 = {
    "x86-64": (),
    "x86-64-v3": ("avx2", "fma"),
    "skylake-avx512": ("avx512bw", "avx512vl"),
    "icelake-server": ("avx512_vnni",),
    "alderlake": ("avx_vnni", "gfni"),
}
FORMATS = {"int8": 1, "bfloat16": 2, "float16": 3}

pytestmark = [pytest.mark.slow]


def compile_program(command: list[str], target: list[str], number: int, output: Path) -> None:
    flags = [*FLAGS, *target, f"-DFORMAT={number}", "-I", str(INCLUDE)]
    done = subprocess.run([*command, *flags, str(PROGRAM), "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@X86_ONLY
@NEEDS_COMPILER
@pytest.mark.parametrize("arch", X86)
@pytest.mark.parametrize("weights", FORMATS)
def test_x86(weights: str, arch: str, tmp_path: Path) -> None:
    """Also compiles for processors with instructions that this one doesn't have."""
    command = list(next(compilers()).command)
    compile_program(command, [f"-march={arch}"], FORMATS[weights], tmp_path / "program")
    if cpu.missing(X86[arch]):
        return
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert done.stdout.endswith(" 0 wrong\n"), done.stdout


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang package")
@pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64, to run programs for arm64")
@pytest.mark.exhaustive  # zig builds a C library first, which takes minutes
@pytest.mark.parametrize("arch", ["generic", "generic+dotprod"])
@pytest.mark.parametrize("weights", FORMATS)
def test_arm64(weights: str, arch: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ziglang", "c++"]
    compile_program(command, [*ARM, f"-mcpu={arch}"], FORMATS[weights], tmp_path / "program")
    done = subprocess.run([str(QEMU), "-cpu", "max", tmp_path / "program"], capture_output=True, text=True)
    assert done.stdout.endswith(" 0 wrong\n"), done.stdout + done.stderr

"""What Python and the C++ headers share: the arguments of a kernel, and the tuning constants."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines.native.call_arguments import CallArguments, Strategy
from unrolled.engines.native.toolchain.compiler import compilers
from unrolled.engines.native.toolchain.cpp_files import INCLUDE, read
from unrolled.engines.native.tuning import constants

pytestmark = NEEDS_COMPILER


def run_program(header: str, statements: list[str], folder: Path) -> list[str]:
    """Compile a program that includes a header, run it, and return the lines that it prints."""
    source, program = folder / "program.cpp", folder / "program"
    includes = "".join(f"#include {name}\n" for name in ("<cstddef>", "<cstdio>", f'"{header}"'))
    source.write_text("\n".join([f"{includes}int main() {{", *statements, "}\n"]))
    command = next(compilers()).command
    subprocess.run([*command, "-std=c++17", "-I", str(INCLUDE), str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_arguments_have_the_same_layout_in_cpp_and_in_python(tmp_path: Path) -> None:
    fields = re.findall(
        r"^  [^;]*\W(\w+);", read("call.h").partition("struct CallArguments")[2], re.MULTILINE
    )
    assert fields == [name for name, _ in CallArguments._fields_]
    pairs = [
        ("sizeof(C)", "alignof(C)"),
        *((f"offsetof(C, {name})", f"sizeof(C::{name})") for name in fields),
    ]
    statements = [f'std::printf("%zu %zu\\n", {first}, {second});' for first, second in pairs]
    size, *printed = run_program("call.h", ["using C = CallArguments;", *statements], tmp_path)
    assert size == f"{ctypes.sizeof(CallArguments)} {ctypes.alignment(CallArguments)}"
    descriptors = [getattr(CallArguments, name) for name in fields]
    assert printed == [f"{field.offset} {field.size}" for field in descriptors]


def test_the_strategies_have_the_same_numbers_in_cpp_and_in_python(tmp_path: Path) -> None:
    statements = [f'std::printf("%d\\n", (int){strategy.name});' for strategy in Strategy]
    assert run_program("call.h", statements, tmp_path) == [str(strategy.value) for strategy in Strategy]
    assert re.findall(r"^  ([A-Z_]+),", read("call.h"), re.MULTILINE) == [one.name for one in Strategy]


def test_python_reads_all_tuning_constants(tmp_path: Path) -> None:
    names = re.findall(r"^constexpr .*?(\w+) =", read("tuning.h"), re.MULTILINE)
    printed = run_program("tuning.h", [f'std::printf("%lld\\n", (long long){n});' for n in names], tmp_path)
    assert constants() == dict(zip(names, map(int, printed), strict=True))

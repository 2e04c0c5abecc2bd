"""The arguments of a kernel: the struct in C++ and the one in Python agree."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.engines.native.call_arguments import CallArguments
from unrolled.engines.native.toolchain.compiler import compilers
from unrolled.engines.native.toolchain.cpp_files import INCLUDE, read

pytestmark = NEEDS_COMPILER


def test_the_struct_has_the_same_layout_in_cpp_and_in_python(tmp_path: Path) -> None:
    fields = re.findall(r"^  [^;]*\W(\w+);", read("call.h"), re.MULTILINE)
    assert fields == [name for name, _ in CallArguments._fields_]
    lines = [f'std::printf("%zu %zu\\n", offsetof(C, {name}), sizeof(C::{name}));' for name in fields]
    code = "\n".join(
        [
            "#include <cstddef>",
            "#include <cstdio>",
            '#include "call.h"',
            "using C = CallArguments;",
            "int main() {",
            'std::printf("%zu %zu\\n", sizeof(C), alignof(C));',
            *lines,
            "}",
        ]
    )
    source, program = tmp_path / "layout.cpp", tmp_path / "layout"
    source.write_text(code)
    command = next(compilers()).command
    subprocess.run([*command, "-std=c++17", "-I", str(INCLUDE), str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    size, *printed = done.stdout.splitlines()
    assert size == f"{ctypes.sizeof(CallArguments)} {ctypes.alignment(CallArguments)}"
    descriptors = [getattr(CallArguments, name) for name in fields]
    assert printed == [f"{field.offset} {field.size}" for field in descriptors]

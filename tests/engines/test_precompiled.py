"""Precompiled headers of g++: later loops are compiled with them, to the same bytes."""

from __future__ import annotations

import ctypes
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from unrolled.engines.native.toolchain import build, cpp_files, precompiled
from unrolled.engines.native.toolchain.compiler import Compiler, compilers

pytestmark = NEEDS_SYSTEM_COMPILER


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the compiler, which uses an empty cache."""
    lines: list[list[str]] = []
    run = Compiler._run

    def record(self: Compiler, arguments: list[str], *rest: Any) -> str:
        if "-dM" not in arguments:
            lines.append(arguments)
        return run(self, arguments, *rest)

    monkeypatch.setattr(Compiler, "_run", record)
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "kernels"))
    if not next(compilers()).is_gcc:
        pytest.skip("only g++ precompiles headers")
    return lines


def source(number: int, scalar: str = "float") -> str:
    function = f"EXPORT double answer() {{ return {number} + sizeof(T); }}"
    return f'using T = {scalar};\n#include "loop.h"\n{function}\n'


_numbers = itertools.count()


def compile_and_run(scalar: str = "float") -> None:
    """Compile a new source and check the result of its function."""
    number = next(_numbers)
    library = build.load(source(number, scalar))
    library.answer.restype = ctypes.c_double
    assert library.answer() == number + {"float": 4, "double": 8}[scalar]


def wait_for_builds() -> None:
    for thread in threading.enumerate():
        if thread.name == "unrolled-build":
            thread.join()


def precompile(tmp_path: Path, scalar: str = "float") -> Path:
    """Compile as many loops as it takes, and return the precompiled header."""
    for _ in range(4):
        compile_and_run(scalar)
    wait_for_builds()
    [path] = (tmp_path / "kernels").glob(f"*{precompiled.SUFFIX}")
    return path


def uses_header(line: list[str]) -> bool:
    return "-include" in line


@pytest.mark.slow
def test_later_loops_use_a_precompiled_header(tmp_path: Path, lines: list[list[str]]) -> None:
    path = precompile(tmp_path)
    assert not any(map(uses_header, lines))
    assert path.stat().st_mode & 0o077 == 0
    lines.clear()
    compile_and_run()
    assert [uses_header(line) for line in lines] == [True]
    compile_and_run("double")  # has another header
    assert not uses_header(lines[-1])
    assert not list((tmp_path / "kernels").glob("build-*"))
    compiler, text = next(compilers()), source(0)
    folders = [tmp_path / name for name in ("with", "without")]
    for folder in folders:
        folder.mkdir()
    with_header = compiler.build(text, build.arch(), folders[0], path.with_suffix(""))
    assert with_header.read_bytes() == compiler.build(text, build.arch(), folders[1]).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_header_is_replaced(content: bytes | None, tmp_path: Path, lines: list[list[str]]) -> None:
    path = precompile(tmp_path, "double")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    compile_and_run("double")


@pytest.mark.slow
def test_a_header_of_another_user_is_not_used(tmp_path: Path, lines: list[list[str]]) -> None:
    path = precompile(tmp_path)
    path.chmod(0o666)
    compile_and_run()
    assert not uses_header(lines[-1])


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["100M", "0"])
def test_a_small_cache_has_no_precompiled_headers(
    limit: str, tmp_path: Path, lines: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNROLLED_CACHE_SIZE", limit)
    for _ in range(4):
        compile_and_run()
    wait_for_builds()
    assert len(list((tmp_path / "kernels").glob(f"*{precompiled.SUFFIX}"))) == (limit == "0")


@pytest.mark.slow
def test_the_limit_counts_precompiled_headers(
    tmp_path: Path, lines: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = precompile(tmp_path)
    monkeypatch.setenv("UNROLLED_CACHE_SIZE", "1M")
    compile_and_run()
    assert not path.exists()
    assert not path.with_suffix("").exists()


def test_sources_of_other_kinds_have_none(tmp_path: Path) -> None:
    compiler = Compiler(("g++",), "g++ (GCC) 12.2.0")
    for name in ("products.cpp", "thread_pool.cpp"):
        assert precompiled.find(compiler, cpp_files.read(name), "native", tmp_path) is None
    clang = Compiler(("clang++",), "Debian clang version 16.0.6")
    assert precompiled.find(clang, source(0), "native", tmp_path) is None
    assert not precompiled._loops.keys() & {tmp_path}

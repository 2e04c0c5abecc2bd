"""Compilers and instruction sets: selection, fallbacks and errors."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.sampling import sample
from helpers.toolchain import (
    NO_COMPILER,
    OTHER_SOURCE,
    PRINT_ANSWER,
    PRINT_LANES,
    SOURCE,
    X86_ONLY,
    call_library,
    compare_engines,
    fake_compiler,
    library_path,
    run_python,
)
from unrolled.engines.native.toolchain import build, cache, compiler, cpu

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.mark.slow
def test_without_a_compiler_layers_fall_back_to_the_reference_engine() -> None:
    layers = "ur.LSTM(5, 19), ur.GRU(3, 8, 2, bidirectional=True)"
    done = run_python(compare_engines("auto", layers), **NO_COMPILER)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1, done.stderr
    assert "Recurrent layers run on the reference engine, which is slower: no C++ compiler" in done.stderr
    assert "Install one, or the ziglang package, which contains one (pip install ziglang)" in done.stderr


@pytest.mark.slow
def test_a_failed_compilation_keeps_no_tensors_of_a_call_alive() -> None:
    """The error is cached, but not its traceback, whose frames refer to tensors."""
    code = """
    import gc, weakref, torch, unrolled as ur
    gc.disable()
    class Branching(ur.Cell):
        state = ("h",)
        def step(self, x, h):
            return h + x if h.sum() > -1 else x
    for layer in (ur.GRU(4, 4), ur.Recurrent(Branching, 4, 4)):
        for training in (False, True):
            for _ in range(3):
                x = torch.randn(2, 3, 4, requires_grad=training)
                output = layer(x)[0]
                references = weakref.ref(x), weakref.ref(output)
                del x, output
                print([reference() is None for reference in references])
    """
    for variables in (NO_COMPILER, {}):
        done = run_python(code, PYTHONWARNINGS="ignore", **variables)
        assert done.stdout == "[True, True]\n" * 12, done.stderr


@pytest.mark.slow
def test_without_a_compiler_frozen_layers_fall_back_to_the_reference_engine() -> None:
    code = """
    import torch, unrolled as ur
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad(), ur.engine("auto"), ur.frozen(layer):
        output, _ = layer(x)
    print(torch.equal(output, layer(x)[0]))
    """
    done = run_python(code, **NO_COMPILER)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert done.stderr.count("UserWarning:") == 1


def test_an_unusable_cxx_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no-such-compiler", "/dev/null"):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(build.NoCompilerError, match=f"CXX is '{name}', which can't be run"):
            call_library()


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("'g++", 'CXX is "\'g\\+\\+", which has an unbalanced quotation mark'),
        ('g++ "-O2', "which has an unbalanced quotation mark"),
        ("no-such-compiler -O2", "can't be run: it wasn't found"),
        ("/", "can't be run: it isn't executable"),
        ("''", "can't be run: it wasn't found"),
    ],
)
def test_an_invalid_cxx_is_named_in_the_error(cxx: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(build.NoCompilerError, match=reason):
        call_library()


BROKEN = {
    "old g++": (
        "echo 'c++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0'", "", "it is g++ 11, but unrolled needs g++ 12",
    ),
    "old g++, without a package": ("echo 'g++ 9.3.0'", "", "it is g++ 9, but unrolled needs g++ 12 or newer"),
    "old g++ of Red Hat": (
        "echo 'c++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-18)'", "", "it is g++ 8, but unrolled needs g++ 12",
    ),
    "old clang": ("echo 'Debian clang version 11.0.1-2'", "", "it is clang 11, but unrolled needs clang 13"),
    "waits for input": ("read line && echo c++ 99.0", "", "ended with exit code 1"),
    "prints nothing": ("cat", "", "printed nothing"),
    "crashes": ("kill -SEGV $$", "", "was ended by SIGSEGV"),
    "prints Latin-1": (
        r"printf 'caf\351 1.0\n'", r"printf 'fatal error: caf\351\n' >&2; exit 1", "fatal error: caf",
    ),
    "crashes when it compiles": ("echo c++ 99.0", "kill -ABRT $$", "was ended by SIGABRT"),
    "fails without a message": ("echo c++ 99.0", "exit 3", "ended with exit code 3"),
}  # fmt: skip


@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("kind", sample(BROKEN, ["prints Latin-1"]))
def test_a_broken_compiler_gives_one_warning_and_the_next_is_used(tmp_path: Path, kind: str) -> None:
    version, compiling, reason = BROKEN[kind]
    fake_compiler(tmp_path, version, compiling)
    code = f"{PRINT_ANSWER.format(source=SOURCE)}\n{PRINT_ANSWER.format(source=OTHER_SOURCE)}"
    done = run_python(code, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout == "42\n43\n", done.stderr
    assert done.stderr.count("UserWarning:") == 1, done.stderr
    assert "c++ " in done.stderr
    assert reason in done.stderr
    assert "Kernels are compiled with g++ instead" in done.stderr


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("kind", ["old g++", "waits for input", "prints Latin-1", "crashes when it compiles"])
def test_a_broken_cxx_is_named_in_one_warning(tmp_path: Path, kind: str) -> None:
    """It isn't replaced by another compiler, because the user has selected it."""
    version, compiling, reason = BROKEN[kind]
    script = fake_compiler(tmp_path, version, compiling)
    layers = "ur.LSTM(5, 19), ur.GRU(3, 8)"
    done = run_python(compare_engines("auto", layers), CXX=str(script))
    assert done.stdout == "True\nTrue\n", done.stderr
    assert done.stderr.count("UserWarning:") == 1, done.stderr
    assert str(script) in done.stderr
    assert reason in done.stderr


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("when", ["version", "compiling"])
def test_a_compiler_that_does_not_end_is_killed(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = f"sleep 300 & echo $! > {tmp_path}/child; wait"
    script = fake_compiler(tmp_path, hangs if when == "version" else "echo c++ 99.0", hangs)
    monkeypatch.setenv("CXX", str(script))
    for name in ("_PROBE_TIMEOUT", "_MACROS_TIMEOUT", "_COMPILE_TIMEOUT"):
        monkeypatch.setattr(compiler, name, 1)
    start = time.monotonic()
    for _ in range(2):  # the second time, it isn't tried again
        with pytest.raises(build.NoCompilerError, match=f"{script}.*did not .* within 1 s"):
            call_library()
    assert time.monotonic() - start < 60
    status = Path("/proc", (tmp_path / "child").read_text().strip(), "status")
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() - start < 60
        time.sleep(0.01)


@NEEDS_SYSTEM_COMPILER
def test_a_compiler_that_can_not_be_started_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "c++").write_bytes(b"\x7fELF is not all of a program")
    (tmp_path / "c++").chmod(0o755)
    done = run_python(PRINT_ANSWER.format(source=SOURCE), PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout == "42\n", done.stderr
    assert "c++ can't be used: it can't be started (Exec format error)" in done.stderr


@NEEDS_SYSTEM_COMPILER
def test_cxx_can_be_a_path_with_spaces_and_quotation_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fake_compiler(tmp_path, "exec g++ --version", 'exec g++ "$@"', name="it's a c++")
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("CPATH", "/caf\udce9")  # a byte that isn't UTF-8
    assert call_library() == 42


@NEEDS_SYSTEM_COMPILER
def test_headers_refuse_old_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For compilers whose version isn't recognized."""
    monkeypatch.setenv("CXX", "c++ -w -U__GNUC__ -D__GNUC__=11")
    with pytest.raises(build.NoCompilerError, match=r"#error .unrolled needs g\+\+ 12 or newer"):
        call_library('#include "platform.h"\n')


@NEEDS_SYSTEM_COMPILER
def test_fast_math_of_cxx_does_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" int answer() { volatile double x = 0; const double y = x / x; return y != y; }\n'
    monkeypatch.setenv("CXX", "c++ -ffast-math")
    assert call_library(source) == 1


@NEEDS_SYSTEM_COMPILER
def test_the_compilers_first_error_is_in_the_message(cache_folder: Path) -> None:
    with pytest.raises(build.NoCompilerError, match="can't compile a kernel for native: .*error: .*nonsense"):
        call_library("nonsense;\n")
    assert not list(cache_folder.glob("*.so"))
    assert not list(cache_folder.glob("build-*"))


@NEEDS_SYSTEM_COMPILER
@pytest.mark.slow
def test_the_next_compiler_is_tried_if_the_first_one_fails(tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "error: no headers" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    done = run_python(PRINT_ANSWER.format(source=SOURCE), PATH=str(tmp_path), UNROLLED_LOG="build")
    assert done.stdout == "42\n", done.stderr
    assert "can't compile a kernel for native: error: no headers" in done.stderr
    assert "ziglang" in done.stderr


@NEEDS_SYSTEM_COMPILER
@pytest.mark.slow
def test_the_compiler_of_the_ziglang_package(cache_folder: Path) -> None:
    """It works without a home directory and without PATH, and writes only to the cache."""
    pytest.importorskip("ziglang")
    native = run_python(PRINT_LANES, UNROLLED_CACHE=str(cache_folder.with_name("system")))
    zig = run_python(PRINT_LANES, PATH="", HOME="", UNROLLED_LOG="build")
    assert zig.stdout == native.stdout, zig.stderr
    assert "ziglang/zig c++" in zig.stderr
    assert (cache_folder / "zig").is_dir()
    wide = run_python(PRINT_LANES, PATH="", UNROLLED_ARCH="x86-64-v3")
    assert wide.stdout == "8\n" or "x86" not in cpu.system(), wide.stderr


@pytest.mark.slow
@X86_ONLY
@pytest.mark.parametrize(
    ("arch", "lanes"),
    [
        ("x86-64", 4),
        pytest.param("x86-64-v2", 4, marks=pytest.mark.exhaustive),
        ("x86-64-v3", 8),
        ("x86-64-v4", 16),
    ],
)
@NEEDS_SYSTEM_COMPILER
def test_an_instruction_set_can_be_selected(cache_folder: Path, arch: str, lanes: int) -> None:
    done = run_python(compare_engines("native") + PRINT_LANES, UNROLLED_ARCH=arch)
    if lanes == 16 and "avx512f" not in (cpu.features() or ()):
        assert "use avx512bw" in done.stderr
        assert "which this processor doesn't have" in done.stderr
        return
    assert (done.returncode, done.stdout) == (0, f"True\n{lanes}\n"), done.stderr
    all_metadata = [json.loads(file.read_text()) for file in cache_folder.glob("*.json")]
    assert {metadata["arch"] for metadata in all_metadata} == {arch}


@pytest.mark.slow
@X86_ONLY
@NEEDS_SYSTEM_COMPILER
def test_kernels_for_another_processor_are_refused() -> None:
    """They are refused before they are loaded, not by an illegal instruction."""
    arch = next(
        (name for name, feature in (("sapphirerapids", "amx_tile"), ("bdver2", "fma4"))
         if feature not in (cpu.features() or ())),
        None,
    )  # fmt: skip
    assert arch is not None  # no processor has both
    done = run_python(PRINT_ANSWER.format(source=SOURCE), UNROLLED_ARCH=arch)
    assert "refused: kernels for" in done.stdout
    assert "which this processor doesn't have" in done.stdout
    again = run_python(PRINT_ANSWER.format(source=SOURCE), UNROLLED_ARCH=arch, UNROLLED_LOG="build")
    assert again.stdout == done.stdout
    assert "hit: " in again.stderr


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("no-such-set", "refused: c++ can't compile a kernel for no-such-set"),
        ("native -o /tmp/x", "refused: UNROLLED_ARCH should name an instruction set, such as x86-64-v3, got"),
    ],
)
@NEEDS_SYSTEM_COMPILER
def test_an_unknown_instruction_set_is_refused(arch: str, message: str) -> None:
    assert message in run_python(PRINT_ANSWER.format(source=SOURCE), UNROLLED_ARCH=arch).stdout


@NEEDS_SYSTEM_COMPILER
def test_required_features_have_the_names_that_linux_uses(cache_folder: Path) -> None:
    macros = (
        "#define __AVX2__ 1\n#define __BMI__ 1\n#define __LZCNT__ 1\n#define __AVX512F 1\n#define __SHA__ 1\n"
    )
    assert cpu.required(macros) == ["abm", "avx2", "bmi1"]
    assert cpu.vector_extensions(["avx", "avx2", "fma"]) == ("avx",)
    if cpu.features() is not None:
        assert cpu.missing(["no_such_feature", *sorted(cpu.usable_features())]) == ["no_such_feature"]
        required = next(compiler.compilers()).requires("native", cache_folder.parent)
        assert cpu.missing(required) == []
        assert required


@NEEDS_SYSTEM_COMPILER
def test_libraries_with_different_vector_widths_are_not_combined() -> None:
    """A loop and the matrix products that it calls pass vectors to each other."""
    if cpu.vector_extensions(cpu.usable_features()) == ():
        pytest.skip("this processor has only one vector width")
    first, code = library_path(SOURCE), PRINT_ANSWER.format(source=OTHER_SOURCE)
    metadata = json.loads(cache.metadata_path(first).read_text())
    metadata["requires"] = []
    cache.metadata_path(first).write_text(json.dumps(metadata))
    done = run_python(f"from unrolled.engines.native.toolchain import build\nbuild.load({SOURCE!r})\n{code}")
    assert "refused: kernels with the smallest vectors are already loaded" in done.stdout, done.stderr
    assert "set UNROLLED_ARCH to one instruction set for all kernels" in done.stdout

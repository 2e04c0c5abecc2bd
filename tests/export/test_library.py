"""The exported folder: its files, its interface, what builds it, and that a step does nothing but compute."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled as ur
from helpers.c_library import CC, IS_X86, NEEDS_CC, WARNINGS, Exported, compile_c
from unrolled.cli.main import main
from unrolled.export import library


def run(*command: object, **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def last_outputs(layer: ur.Recurrent) -> list[float]:
    """Return what the example prints: the last output for a ramp of 100 steps."""
    x = (torch.arange(100) % 10 / 10).view(100, 1).expand(100, layer.input_size)
    return layer(x)[0][-1].tolist()


@NEEDS_CC
@pytest.mark.parametrize("weights", ["file", pytest.param("array", marks=pytest.mark.slow)])
def test_the_example_builds_and_runs(weights: Any, tmp_path: Path) -> None:
    layer = ur.GRU(2, 5)
    ur.export.c(layer, tmp_path, name="tone", weights=weights)
    run(CC, *WARNINGS, "-O1", "example.c", "tone.c", "-o", "example", cwd=tmp_path)
    printed = [float(line) for line in run("./example", cwd=tmp_path).split()]
    torch.testing.assert_close(printed, last_outputs(layer), atol=1e-6, rtol=0)
    assert len((tmp_path / "example.c").read_text().splitlines()) <= 28


@pytest.mark.slow
@NEEDS_CC
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_code_needs_no_library(tmp_path: Path) -> None:
    """Except memcpy and memset. So a step allocates nothing, takes no lock and makes no system call."""
    ur.export.c(ur.Recurrent(ur.cells.LayerNormLSTM, 3, 21), tmp_path, name="m")
    for level in ("-O0", "-O2", "-Os"):
        compile_c(level, "-c", tmp_path / "m.c", "-o", tmp_path / "m.o")
        undefined = {line.split()[-1] for line in run("nm", "-u", tmp_path / "m.o").splitlines()}
        assert undefined <= {"memcpy", "memset"}, level
        writable = run("nm", tmp_path / "m.o")
        assert not {" D ", " B ", " d "} & {line[16:19] for line in writable.splitlines()}


@NEEDS_CC
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_steps_make_no_system_calls(tmp_path: Path) -> None:
    ur.export.c(ur.LSTM(1, 16), tmp_path, name="m")
    counts = []
    for steps in (1, 20_000):
        (tmp_path / "main.c").write_text(
            '#include "m.h"\nint main(void) { static m_state s; float x[1] = {1}, y[16]; m_init(&s);'
            f" for (int t = 0; t < {steps}; t++) m_step(&s, x, y); return 0; }}"
        )
        compile_c("-O2", tmp_path / "main.c", tmp_path / "m.c", "-o", tmp_path / "main")
        done = subprocess.run(["strace", "-f", tmp_path / "main"], capture_output=True, text=True)
        if "ptrace" in done.stderr.partition("\n")[0]:
            pytest.skip("strace may not trace processes here")
        counts.append(len(done.stderr.splitlines()))
    assert counts[0] == counts[1]


@pytest.mark.slow
@NEEDS_CC
@pytest.mark.skipif(not IS_X86, reason="names x86 instruction sets")
def test_the_instruction_set_is_chosen_at_run_time(tmp_path: Path) -> None:
    layer = ur.GRU(2, 5)
    ur.export.c(layer, tmp_path, name="m")
    for level in ("v1", "v3", "v4"):
        flags = (f"-DM_SUFFIX=_{level}", *(() if level == "v1" else (f"-march=x86-64-{level}",)))
        compile_c("-O1", "-c", tmp_path / "m.c", "-o", tmp_path / f"{level}.o", flags=flags)
    objects = [tmp_path / f"{level}.o" for level in ("v1", "v3", "v4")]
    sources = [tmp_path / "example.c", tmp_path / "m_dispatch.c", *objects]
    compile_c(*sources, "-o", tmp_path / "example", flags=())
    printed = [float(line) for line in run(tmp_path / "example").split()]
    torch.testing.assert_close(printed, last_outputs(layer), atol=1e-6, rtol=0)


@NEEDS_CC
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("weights", ["array", "file"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cmake_builds_tests_and_installs_it(bidirectional: bool, weights: Any, tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    ur.export.c(ur.LSTM(2, 5, bidirectional=bidirectional), source, name="tone", weights=weights)
    run("cmake", "-S", source, "-B", tmp_path / "build", f"-DCMAKE_INSTALL_PREFIX={installed}")
    run("cmake", "--build", tmp_path / "build")
    assert "100% tests passed" in run("ctest", cwd=tmp_path / "build")
    run("cmake", "--install", tmp_path / "build")
    assert (installed / "include" / "tone.h").exists()
    [package] = installed.rglob("tone.pc")
    if shutil.which("pkg-config"):
        environment = {**os.environ, "PKG_CONFIG_PATH": str(package.parent)}
        flags = run("pkg-config", "--cflags", "--libs", "tone", env=environment).split()
        program = tmp_path / "program"
        run(CC, source / "example.c", *flags, "-o", program)
        run(program, cwd=source)


@pytest.mark.slow
@NEEDS_CC
def test_the_weights_file_is_checked(tmp_path: Path) -> None:
    layer = ur.LSTM(2, 5)
    exported = Exported(layer, tmp_path, weights="file")
    content = exported.content.raw
    for wrong in (b"", content[:-1], content + b"0", b"x" + content[1:], content[:4] + b"\x09" + content[5:]):
        buffer = ctypes.create_string_buffer(wrong, max(1, len(wrong)))
        assert exported.c.m_init(exported.state, buffer, ctypes.c_size_t(len(wrong))) != 0
    assert exported.c.m_init(exported.state, None, ctypes.c_size_t(0)) != 0
    assert exported.c.m_init(exported.state, exported.content, ctypes.c_size_t(len(content))) == 0
    assert exported.selftest()[0] == 0
    damaged = bytearray(content)
    damaged[64 + 3] ^= 0x40  # the exponent of the first weight
    buffer = ctypes.create_string_buffer(bytes(damaged), len(damaged))
    exported.c.m_init(exported.state, buffer, ctypes.c_size_t(len(damaged)))
    assert exported.selftest()[0] != 0


@NEEDS_CC
def test_states_are_independent_and_can_be_copied(tmp_path: Path) -> None:
    exported, x = Exported(ur.LSTM(2, 5), tmp_path), torch.randn(9, 2)
    whole = exported.run(x)
    exported.reset()
    exported.run(x[:4])
    kept = exported.state.raw
    exported.run(x)  # something else
    exported.state.raw = kept
    assert torch.equal(exported.run(x[4:]), whole[4:])
    assert exported.files.state_bytes == len(kept)


def test_the_header_says_the_sizes(tmp_path: Path) -> None:
    result = ur.export.c(ur.GRU(2, 5), tmp_path / "new" / "folder", name="tone")
    header = (tmp_path / "new" / "folder" / "tone.h").read_text()
    for line in ("TONE_INPUT 2 ", "TONE_OUTPUT 5 ", "TONE_FORMAT 1 ", f'TONE_VERSION "{ur.__version__}"'):
        assert f"#define {line}" in header
    assert {path.name for path in result.files} == {
        *("tone.h", "tone.c", "tone_dispatch.c", "tone.pc.in", "CMakeLists.txt", "example.c")
    }
    assert all(path.exists() for path in result.files)
    assert (result.input, result.output, result.bidirectional) == (2, 5, False)
    assert result.weights_bytes >= 4 * sum(p.numel() for p in ur.GRU(2, 5).parameters())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    ur.export.c(ur.GRU(2, 5), tmp_path, name="m")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="contains no recurrent layer"):
        ur.export.c(torch.nn.Linear(2, 3), tmp_path, name="m")
    monkeypatch.setattr(library, "project_files", lambda code: {"bad": 3})  # fails while files are written
    with pytest.raises(TypeError):
        ur.export.c(ur.GRU(2, 6), tmp_path, name="m")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert stat.S_IMODE((tmp_path / "m.c").stat().st_mode) & 0o400


@pytest.mark.parametrize("name", ["", "1x", "a-b", "int", "é", "a b", "example", 3])
def test_names_must_be_identifiers(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name should be a C identifier"):
        ur.export.c(ur.GRU(2, 5), tmp_path / "out", name=name)


def test_other_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights should be 'array' or 'file', got 'zip'"):
        ur.export.c(ur.GRU(2, 5), tmp_path / "out", weights="zip")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not a folder"):
        ur.export.c(ur.GRU(2, 5), tmp_path / "file")


MODEL = """
import torch, unrolled as ur
def build(): return ur.GRU(1, 4)
def pair(): return ur.LSTM(2, 3, bidirectional=True), torch.ones(4, 1, 2)
def wrong(): return 3
def attention(): return torch.nn.MultiheadAttention(4, 2)
"""


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("filter.py").write_text(MODEL)
    assert main(["export", "filter.py:build", "--out", "c", "--name", "tone"]) == 0
    printed = capsys.readouterr().out
    assert "Wrote GRU to c: input size 1, output size 4" in printed
    assert "tone.h declares step and run" in printed
    assert Path("c", "tone.c").exists()
    assert main(["export", "filter.py:pair", "--out", "d", "--weights", "file"]) == 0
    assert "model.h declares run." in capsys.readouterr().out
    for arguments, message in {
        ("filter.py",): "expected FILE.py:FUNCTION",
        ("filter.py:nothing",): "has no function named 'nothing'",
        ("filter.py:wrong",): "should return a model, got int",
        ("filter.py:attention",): "MultiheadAttention",
        ("filter.py:build", "--name", "a-b"): "name should be a C identifier",
    }.items():
        assert main(["export", *arguments, "--out", "none"]) == 2
        assert message in capsys.readouterr().err
    assert not Path("none").exists()

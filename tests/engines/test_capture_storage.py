"""Captured steps in the kernel cache: shared by processes, prebuilt, read-only, and within the size limit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helpers import processes
from helpers.kept_captures import PRINT_DIGESTS, Plain, compile_cell, run_cells, stored
from helpers.layer_pairs import NEEDS_COMPILER, NEEDS_SYSTEM_COMPILER
from helpers.toolchain import NO_COMPILER, mount_namespace, run_python
from unrolled.engines.native.toolchain import cache, eviction, kept_files

pytestmark = NEEDS_COMPILER


@pytest.mark.slow
def test_processes_that_start_at_once(capture_folder: Path) -> None:
    code = PRINT_DIGESTS.format(folder=str(capture_folder), names=["MGU"])
    running = [processes.start("-c", code) for _ in range(2)]
    outputs = [process.communicate() for process in running]
    assert len({out.splitlines()[0] for out, _ in outputs}) == 1
    assert [err for _, err in outputs] == ["", ""]
    assert len([*capture_folder.iterdir()]) == 2
    [line], [captured, _] = run_cells(("MGU",), capture_folder, warm=False)
    assert line == outputs[0][0].splitlines()[0]
    assert captured == []


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
@pytest.mark.parametrize("damage", [False, True])
def test_prebuilt_kernels_come_with_captures(tmp_path: Path, damage: bool) -> None:
    weights, kernels = tmp_path / "weights.safetensors", tmp_path / "kernels"
    safetensors.torch.save_file(torch.nn.GRU(5, 7).state_dict(), weights)
    environment = {**os.environ, kept_files.VARIABLE: "1", cache.VARIABLE: str(tmp_path / "cache")}
    done = processes.run("-m", "unrolled", "build", weights, "--out", kernels, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    files = stored(kernels)
    assert len(files) == 3  # the captured step, and its random numbers in both modes
    for file in files if damage else ():
        file.write_text("damaged")
    variables = {
        "UNROLLED_KERNELS": str(kernels),
        cache.VARIABLE: "/dev/null/nowhere",
        kept_files.VARIABLE: "1",
    }
    code = PRINT_DIGESTS.replace("kept_files._folder = ", "_ = ").format(folder="", names=["GRU"])
    for program in (code, code.replace("    x =", "    layer.eval()\n    x =")):
        done = run_python(program, **{**NO_COMPILER, **variables})
        assert json.loads(done.stdout.splitlines()[-1])[0] == ["GRU"] * damage, done.stderr


@pytest.mark.slow
def test_a_read_only_cache(capture_folder: Path) -> None:
    bind = f"mount --bind {capture_folder} {capture_folder}"
    read_only = mount_namespace(f"{bind} && mount -o remount,ro,bind {capture_folder}")
    code = PRINT_DIGESTS.format(folder=str(capture_folder), names=["MGU"])
    lines = []
    for count in (1, 1, 0):
        done = run_python(code, prefix=() if len(lines) == 1 else read_only)
        line, about = done.stdout.splitlines()
        lines.append(line)
        assert (len(json.loads(about)[0]), done.stderr) == (count, "")
    assert len(set(lines)) == 1


def test_the_size_limit_includes_captures(
    capture_folder: Path, captured_cells: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (3, 4):
        compile_cell(Plain(2, size))
    total = sum(file.stat().st_size for file in stored(capture_folder))
    compile_cell(Plain(2, 3))  # now the other one was unused for longer
    monkeypatch.setenv(eviction.VARIABLE, str(total + 100))
    compile_cell(Plain(2, 5))
    assert len(stored(capture_folder)) == 2
    assert captured_cells == ["Plain"] * 3
    compile_cell(Plain(2, 3))
    assert captured_cells == ["Plain"] * 3
    compile_cell(Plain(2, 4))
    assert captured_cells == ["Plain"] * 4
    assert cache.size(capture_folder)[0] == 0

"""Prebuilt kernels: ``unrolled build``, and the folder that UNROLLED_KERNELS names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers import processes
from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import NO_COMPILER, SOURCE, X86_ONLY, compare_engines, run_python
from unrolled.cli import main
from unrolled.engines.native.toolchain import build, cache, cpu, prebuilt

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ``unrolled build`` for a file with an LSTM and a GRU, for two instruction sets."""
    folder = tmp_path_factory.mktemp("prebuilt")
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.GRU(4, 5, 2, bidirectional=True)})
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    archs = ["--arch", "x86-64,x86-64-v3"] if "x86" in cpu.system() else []
    command = ["-m", "unrolled", "build", folder / "weights.safetensors", "--out", folder / "kernels", *archs]
    done = processes.run(*command, env={**os.environ, cache.VARIABLE: str(folder / "cache")})
    assert (done.returncode, done.stderr) == (0, "")
    assert "a: LSTM(2, 3), float32: inference and training\n" in done.stdout
    assert "b: GRU(10, 5), float32: inference and training\n" in done.stdout
    assert f"UNROLLED_KERNELS={folder / 'kernels'}" in done.stdout
    return folder / "kernels"


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_prebuilt_kernels_work_without_a_compiler(cache_folder: Path, kernel_folder: Path) -> None:
    code = compare_engines("native", "ur.LSTM(5, 19), ur.GRU(3, 8, 2, bidirectional=True)")
    without_kernels = run_python(code, **NO_COMPILER)
    assert "can't run on the native engine: no C++ compiler was found" in without_kernels.stderr
    modified = {file: file.stat().st_mtime_ns for file in kernel_folder.iterdir()}
    done = run_python(
        code, **NO_COMPILER, UNROLLED_KERNELS=str(kernel_folder), UNROLLED_CACHE="/dev/null/nowhere"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")
    assert {file: file.stat().st_mtime_ns for file in kernel_folder.iterdir()} == modified
    assert not cache_folder.exists()


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_build_compiles_the_kernels_that_a_program_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    program = tmp_path / "score.py"
    program.write_text(
        "import sys, torch, unrolled as ur\n"
        "assert sys.argv[1:] == ['--rows', 'of one']\n"
        "layer, x = ur.LSTM(2, 3, zoneout=0.1).eval(), torch.randn(4, 1, 2)\n"
        "with ur.engine('native'), torch.no_grad():\n"
        "    layer(x, resets=torch.rand(4, 1) < 0.5, all_states=True)\n"
    )
    arguments = ["--rows", "of one"]
    command = ["-m", "unrolled", "build", "--program", f"{program} --rows 'of one'", "--out"]
    done = processes.run(*command, tmp_path / "kernels")
    assert done.returncode == 0, done.stderr
    assert f"{program}: all kernels that it uses\n" in done.stdout
    environment = {**os.environ, **NO_COMPILER, "UNROLLED_CACHE": "/dev/null/nowhere"}
    assert processes.run(program, *arguments, env=environment).returncode == 1
    environment["UNROLLED_KERNELS"] = str(tmp_path / "kernels")
    done = processes.run(program, *arguments, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    program.write_text("pass")
    monkeypatch.setattr(build, "requested_sources", list)
    assert main.main(["build", "--program", str(program), "--out", str(tmp_path / "other")]) == 2
    assert "score.py used no kernel" in capsys.readouterr().err


@pytest.mark.slow
@X86_ONLY
@NEEDS_SYSTEM_COMPILER
def test_the_best_supported_instruction_set_of_a_folder_is_used(kernel_folder: Path) -> None:
    code = (
        "from unrolled.engines.native.toolchain import build\n"
        "print(build.arch(), build.load(build.PROBE).lanes())"
    )
    best = "x86-64-v3 8\n" if "avx2" in cpu.usable_features() else "x86-64 4\n"
    assert run_python(code, **NO_COMPILER, UNROLLED_KERNELS=str(kernel_folder)).stdout == best
    configured = run_python(code, **NO_COMPILER, UNROLLED_KERNELS=str(kernel_folder), UNROLLED_ARCH="x86-64")
    assert configured.stdout == "x86-64 4\n"


@pytest.mark.slow
@X86_ONLY
@NEEDS_SYSTEM_COMPILER
def test_missing_kernels_are_compiled_for_the_instruction_set_of_the_folder(
    cache_folder: Path, kernel_folder: Path
) -> None:
    code = compare_engines("native", "ur.LSTM(5, 19), ur.RNN(3, 8)")
    done = run_python(code, UNROLLED_KERNELS=str(kernel_folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")
    all_metadata = [json.loads(file.read_text()) for file in cache_folder.glob("*.json")]
    assert len(all_metadata) == 2  # the loops of the RNN, forward and backward
    arch = "x86-64-v3" if "avx2" in cpu.usable_features() else "x86-64"
    assert {metadata["arch"] for metadata in all_metadata} == {arch}


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_an_unusable_folder_gives_a_warning_with_the_reason(
    kernel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_kernels(name: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(kernel_folder, tmp_path / name))
        for file in folder.glob("*.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    writable = copy_kernels("writable")
    writable.chmod(0o777)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "none", "none can't be read (No such file or directory)"),
        (tmp_path / "file", "file is not a folder"),
        (tmp_path / "empty", "empty contains no kernels. Create them with unrolled build"),
        (copy_kernels("other system", system="vms alpha"), "other system are for vms alpha, but this is"),
        (copy_kernels("too new", requires=["amx_of_tomorrow"]), "needs amx_of_tomorrow"),
        (writable, "all users can write to"),
    ):
        monkeypatch.setenv(prebuilt.VARIABLE, str(path))
        with pytest.warns(UserWarning, match=f"UNROLLED_KERNELS: .*{re.escape(reason)}"):
            folder = prebuilt.find_folder(None)
        assert folder is not None
        assert folder.arch is None
        assert folder.find(SOURCE) is None
        assert reason in folder.why_missing()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["damaged", "other version", "other C library"])
@NEEDS_SYSTEM_COMPILER
def test_unusable_kernels_give_a_warning_with_the_reason(
    kernel_folder: Path, tmp_path: Path, state: str
) -> None:
    folder = Path(shutil.copytree(kernel_folder, tmp_path / "copy"))
    for file in folder.iterdir():
        metadata = cache.metadata_path(file) if file.suffix == ".so" else None
        if state == "damaged" and metadata:
            file.write_bytes(b"not a library")
        elif state == "other C library" and metadata:
            file.write_bytes(b"not a library that this system can load")
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "sha256": digest}))
        elif state == "other version":
            if not metadata:
                changes = {"unrolled": "0.0.9", "torch": "2.0.0"}
                file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
            file.rename(file.with_name(f"x{file.name[1:]}"))
    code = "import torch, unrolled as ur; ur.engine('auto'); ur.LSTM(2, 3)(torch.zeros(1, 2))"
    done = run_python(code, **NO_COMPILER, UNROLLED_KERNELS=str(folder))
    assert done.returncode == 0
    assert "layers run on the reference engine, which is slower: no C++ compiler was found" in done.stderr
    reasons = {
        "damaged": "is damaged. Run unrolled build again.",
        "other version": "it was built with unrolled 0.0.9 and torch 2.0.0, but this is unrolled",
        "other C library": "can't be loaded: ",
    }
    assert reasons[state] in done.stderr
    assert "UNROLLED_KERNELS" in done.stderr


@NEEDS_SYSTEM_COMPILER
@pytest.mark.exhaustive
def test_build_compiles_a_custom_cell(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "my_cells.py").write_text(
        textwrap.dedent("""
        import torch, unrolled as ur
        class Leaky(ur.Cell):
            weight = ur.Param("hidden", "input")
            rate: float = 0.5
            def step(self, x, h):
                new = torch.tanh(torch.nn.functional.linear(x, self.weight))
                return (1 - self.rate) * h + self.rate * new
        class Bessel(ur.Cell):
            def step(self, x, h):
                return torch.special.i0(h + x)
        """)
    )
    out = tmp_path / "out"
    arguments = ["build", "--cell", f"{tmp_path}/my_cells.py:Leaky", "--sizes", "7,11", "--dtype", "float64"]
    assert main.main([*arguments, "--out", str(out)]) == 0
    assert "Leaky(7, 11), float64: inference and training" in capsys.readouterr().out
    code = f"""
    import sys, torch, unrolled as ur
    sys.path.insert(0, {str(tmp_path)!r})
    from my_cells import Leaky
    with ur.engine("native"):
        layer = ur.Recurrent(Leaky, 3, 4, dtype=torch.float64)
        print(layer(torch.ones(2, 3, dtype=torch.float64))[0].sum().backward())
    """
    done = run_python(code, **NO_COMPILER, UNROLLED_KERNELS=str(out))
    assert (done.stdout, done.stderr) == ("None\n", "")
    arguments = ["build", "--cell", f"{tmp_path}/my_cells.py:Bessel", "--out", str(out)]
    assert main.main([*arguments, "--sizes", "5,5"]) == 2
    assert "Bessel(5, 5), float32 can't be compiled: aten.i0" in capsys.readouterr().err
    assert main.main(arguments) == 2
    assert "Bessel(16, 32), float32 can't be compiled: its step can't be captured" in capsys.readouterr().err


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_bad_arguments_of_build_give_one_line(tmp_path: Path, capsys: Any) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    (tmp_path / "file").write_text("")
    for name, text in (("fails", "raise KeyError('x')"), ("exits", "import sys; sys.exit('no data')")):
        (tmp_path / f"{name}.py").write_text(text)
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (["build", "--cell", "lstm"], "the following arguments are required: --out"),
        (["build", *out], "nothing to build: specify WEIGHTS, --cell or --program"),
        (["build", "--program", str(tmp_path / "fails.py"), *out], "fails.py failed: KeyError: 'x'"),
        (["build", "--program", str(tmp_path / "exits.py"), *out], "exits.py exited with no data"),
        (["build", "--program", str(tmp_path / "none.py"), *out], "none.py"),
        (["build", "--cell", "lstm", "--sizes", "3", *out], "expected INPUT,HIDDEN such as 16,32, got '3'"),
        (
            ["build", "--cell", "lstm", "--sizes", "0,3", *out],
            "expected INPUT,HIDDEN such as 16,32, got '0,3'",
        ),
        (["build", "--cell", "lstm", "--dtype", "int8", *out], "invalid choice: 'int8'"),
        (["build", "--cell", "lstm", "--arch", "v3 -x", *out], "--arch should name an instruction set"),
        (
            ["build", "--cell", "lstm", "--inference", "--arch", "nothing", *out],
            "can't compile a kernel for nothing",
        ),
        (["build", str(tmp_path / "linear.pt"), *out], "no recurrent layer found"),
        (["build", "--cell", "lstm", "--inference", "--out", str(tmp_path / "file")], "file: File exists"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert main.main(arguments) == 2, arguments
        _, error = capsys.readouterr()
        assert message in error
        assert error.startswith("unrolled: ")
        assert error.count("\n") == 1

"""``unrolled doctor``: its report is correct, and the engine it reports is the one that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unrolled as ur
from helpers import processes
from helpers.layer_pairs import NEEDS_SYSTEM_COMPILER
from helpers.toolchain import NO_COMPILER
from helpers.triton_standin import StandIn
from unrolled.cli import main
from unrolled.cli.arguments import parse_cell
from unrolled.engines.gpu import backend as gpu
from unrolled.engines.native.toolchain import build, cache, cpu

CELLS = """
import torch, unrolled as ur
class Plain(ur.Cell):
    weight = ur.Param("hidden", "input")
    def step(self, x, h):
        return torch.tanh(torch.nn.functional.linear(x, self.weight) + h)
class Turned(ur.Cell):
    def step(self, x, h):
        turned = torch.zeros_like(h)
        turned[:, 1:] = h[:, :-1]
        return turned + x
class Bessel(ur.Cell):
    def step(self, x, h):
        return torch.special.i0(h + x)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "CXX",
        "UNROLLED_KERNELS",
        "UNROLLED_ARCH",
        "UNROLLED_LOG",
        "UNROLLED_VERIFY",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "kernels"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    return folder


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "200", **environment}
    return processes.run("-m", "unrolled", "doctor", *arguments, env=variables)


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_json_report_of_the_machine(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unrolled", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["unrolled"] == ur.__version__
    assert data["processor"]["system"] == cpu.system()
    assert set(data["processor"]["instructions"]) <= set(cpu.features() or ())
    command = data["compiler"]["command"].split()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    assert data["compiler"]["version"] == version.splitlines()[0]
    assert "-O3" in data["compiler"]["flags"]
    assert data["kernel"]["arch"] == "native"
    assert data["kernel"]["float32_lanes"] == build.load(build.PROBE).lanes()
    assert data["threads"]["torch"] == 1
    assert data["threads"]["cores"] == len(os.sched_getaffinity(0))
    libraries = list(folder.glob("*.so"))
    assert data["cache"]["folder"] == str(folder)
    assert data["cache"]["libraries"] == len(libraries) == 1
    assert data["cache"]["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert data["cache"]["writable"] is True
    assert data["shipped"] is None
    assert data["variables"] == {cache.VARIABLE: str(folder), "OMP_NUM_THREADS": "1"}
    assert data["engine"] == "auto"
    assert data["layers"] == []


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_the_reported_engine_runs_each_cell(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(CELLS)
    names = [f"{tmp_path}/mine.py:{name}" for name in ("Plain", "Turned", "Bessel")]
    cells = [part for name in (*names, "lstm") for part in ("--cell", name)]
    assert main.main(["doctor", *cells, "--sizes", "6,6", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["layers"]
    engines = {e["cell"]: (e["inference"]["engine"], e["training"]["engine"]) for e in entries}
    assert engines == {
        "Plain(6, 6)": ("native", "native"),
        "Turned(6, 6)": ("native", "native"),
        "Bessel(6, 6)": ("reference", "reference"),
        "LSTM(6, 6)": ("native", "native"),
    }
    for entry in entries:
        cell = parse_cell(entry["layer"])
        layer, x = ur.Recurrent(cell, 6, 6), torch.randn(2, 1, 6)
        for mode in ("inference", "training"):
            with torch.set_grad_enabled(mode == "training"), ur.engine("native"):
                try:
                    layer(x.requires_grad_(mode == "training"))
                    ran = ("native", "its step is compiled")
                except RuntimeError as error:
                    ran = ("reference", str(error).partition("native engine: ")[2])
            assert (entry[mode]["engine"], entry[mode]["why"]) == ran


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_the_layers_of_a_file(tmp_path: Path, capsys: Any) -> None:
    model = nn.ModuleDict({"encoder": nn.GRU(3, 5, 2, bidirectional=True), "tail": nn.LSTM(3, 4)})
    torch.save(model.state_dict(), tmp_path / "w.pt")
    torch.save(model["tail"].half().state_dict(), tmp_path / "half.pt")
    assert main.main(["doctor", str(tmp_path / "w.pt"), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["layers"]
    assert [(e["layer"], e["index"], e["direction"], e["cell"]) for e in entries] == [
        ("encoder", 0, "forward", "GRU(3, 5)"),
        ("encoder", 0, "backward", "GRU(3, 5)"),
        ("encoder", 1, "forward", "GRU(10, 5)"),
        ("encoder", 1, "backward", "GRU(10, 5)"),
        ("tail", 0, "forward", "LSTM(3, 4)"),
    ]
    assert {e[mode]["engine"] for e in entries for mode in ("inference", "training")} == {"native"}
    assert main.main(["doctor", str(tmp_path / "w.pt"), str(tmp_path / "half.pt")]) == 0
    out = capsys.readouterr().out
    text = "".join(out.split())
    why = "(the native engine supports float32, float64 and bfloat16, not torch.float16)"
    for line in (
        f"{tmp_path}/w.pt: encoder, layer 1 backward: GRU(10, 5), float32: native",
        f"{tmp_path}/half.pt: (no prefix): LSTM(3, 4), float16: reference {why}",
    ):
        assert line.replace(" ", "") in text
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
@NEEDS_SYSTEM_COMPILER
def test_printed_report(folder: Path) -> None:
    done = doctor("--cell", "gru", UNROLLED_LOG="")
    assert (done.returncode, done.stderr) == (0, "")
    lanes = build.load(build.PROBE).lanes()
    for words in (
        f"Unrolled      {ur.__version__}",
        f"Processor     {cpu.name()}, {cpu.system()}, ",
        f"instruction set: native (vectors of {lanes} float32 or {lanes // 2} float64)",
        f"Cache         {folder} (1 kernel, ",
        "; private and writable)",
        "Engine        auto (default)",
        "native: the test kernel loaded and ran in ",
        "  gru: GRU(16, 32), float32: native",
    ):
        assert words in done.stdout, words


@pytest.mark.slow
def test_problems_are_reported(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    done = doctor("--cell", "lstm", **NO_COMPILER, UNROLLED_KERNELS=str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for words in (
        "Compiler no C++ compiler was found. Install one, or the ziglang package",
        "Engine auto (default) native: not available because no C++ compiler was found",
        f"Cache Other users can write to the kernel cache {folder} (mode 777; empty it, then run chmod 700)",
        f"Prebuilt {tmp_path}/none can't be read (No such file or directory)",
        "lstm: LSTM(16, 32), float32: reference (no C++ compiler was found",
    ):
        assert words in text, words


def test_bad_usage_gets_one_line(tmp_path: Path, capsys: Any) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    for arguments, message in (
        (["--cell", "lstn"], "unknown cell 'lstn'; expected rnn, lstm, gru, another cell in unrolled.cells"),
        (["--cell", "lstm", "--option", "proj_size=64"], "has to be smaller than hidden_size=32, got 64"),
        (["--cell", "lstm", "--option", "no=1"], "LSTM has no option 'no'"),
        (["--sizes", "a,b"], "expected INPUT,HIDDEN such as 16,32, got 'a,b'"),
        ([str(tmp_path / "none.pt")], "none.pt: No such file or directory"),
        ([str(tmp_path / "linear.pt")], "no recurrent layer found"),
    ):
        assert main.main(["doctor", *arguments]) == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        assert error.startswith("unrolled: ")
        assert message in error
    with pytest.raises(SystemExit) as exited:
        main.main(["doctor", "--help"])
    assert exited.value.code == 0
    assert "--sizes INPUT,HIDDEN" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: Any) -> None:
    """The strategies of kernels don't depend on a device."""
    for cell, sizes, strategy in (
        ("mgu", "4,20", "registers, because its matrices of 8 KiB fit on chip"),
        ("mgu", "4,200", "persistent, because a value has 256 columns with padding"),
        ("mingru", "4,300", "scan, because each column of a step depends only on itself"),
    ):
        arguments = ["doctor", "--cell", cell, "--sizes", sizes, "--device", "cuda"]
        assert main.main(arguments) == 0
        words = " ".join(capsys.readouterr().out.split())
        assert "GPU kernels not available: torch finds no CUDA device" in words
        assert "reference (torch finds no CUDA device; on a GPU: " in words
        assert strategy in words
    assert main.main(["doctor", "--cell", "mgu", "--device", "tpu"]) == 2
    assert "expected cpu, cuda or cuda:N, got 'tpu'" in capsys.readouterr().err


def test_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The report with a device, here with the stand-in for Triton."""
    properties = types.SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu.BACKEND, "runtime", StandIn())
    assert main.main(["doctor", "--cell", "mgu", "--sizes", "4,20", "--device", "cuda"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "GPU H200, compute capability 9.0, 132 multiprocessors kernels: Triton" in words
    assert "mgu: MGU(4, 20), float32: native (registers, because its matrices of 8 KiB" in words

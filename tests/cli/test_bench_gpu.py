"""``unrolled bench --device cuda`` without a GPU: on CPU tensors, with the stand-in for Triton."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers.gpu_engine import RUNTIME, gpu_engine
from helpers.triton_standin import modules
from unrolled import cells
from unrolled.cli import main
from unrolled.cli.bench.gpu import checks, clock, command, contenders, parity, report, worker, workers
from unrolled.cli.bench.gpu.custom import COMPARED, COMPARED_BY_STRATEGY, TIMED
from unrolled.cli.bench.gpu.parity import ParityTask
from unrolled.cli.bench.gpu.rows import select_rows
from unrolled.cli.bench.rows import Row
from unrolled.cli.bench.runtimes import Runtime
from unrolled.engines.gpu.backend import GpuBackend
from unrolled.engines.gpu.choice import STRATEGIES

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(capsys: Any) -> None:
    assert main.main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "unrolled: --device cuda: torch finds no CUDA device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--full"], "--full only works on the CPU: remove it, or remove --device"),
        (["--device", "cuda", "--peers", "jax"], "--peers only works on the CPU"),
        (["--device", "cuda", "--mode", "streaming"], "use inference or training"),
        (["--device", "mps"], "expected cpu, cuda or cuda:N, got 'mps'"),
        (["--minutes", "3"], "--minutes needs --device cuda"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: Any) -> None:
    assert main.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_rows() -> None:
    rows = select_rows()
    assert len(rows) == len({*rows}) == len(TIMED) * 5 * 3 * 2
    assert {(row.hidden, row.batch) for row in rows[: 2 * len(TIMED)]} == {(256, 32)}
    assert select_rows(["gru"], [2], [8], [3], "training") == [Row("gru", 2, 3, 8, "training")]


def test_the_tasks_of_the_comparison() -> None:
    tasks = parity.tasks()
    assert {task.cell for task in tasks if task.kind == "float32"} == {*parity.CELLS}
    for kind in parity.TOLERANCES:
        assert {*COMPARED} <= {task.cell for task in tasks if task.kind == kind}
    assert len(tasks) == len({*tasks})


@pytest.mark.slow
def test_cells_have_kernels_of_the_strategies_that_are_compared() -> None:
    assert {*COMPARED_BY_STRATEGY} == {*STRATEGIES}
    device = torch.device("cuda", 0)
    for strategy, names in COMPARED_BY_STRATEGY.items():
        for name in names:
            cell = getattr(cells, name)(parity.SHAPE[-1], parity.HIDDEN)
            compiled: Any = GpuBackend(RUNTIME, strategy).compile(cell, torch.float32, device)
            assert compiled.inference.specs
            assert compiled.backward.specs


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        ParityTask("MGU", "float64", "streamed", hidden=4),
        ParityTask("MGU", "float32"),
        ParityTask("LSTM", "bfloat16", hidden=8),
        ParityTask("MGU", "tf32", hidden=8),
    ],
    ids=str,
)
def test_kernels_agree(task: ParityTask) -> None:
    with gpu_engine() as runtime:
        result = worker.run_task({"parity": asdict(task)}, CPU)
        assert result["agrees"]
        assert 0 < result["difference"] <= parity.TOLERANCES[task.kind]
        assert all(("debug_barrier" in source) is bool(task.strategy) for source in runtime.sources)


@pytest.mark.slow
def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with another number, one that returns NaN, and one that doesn't run."""
    load, old = RUNTIME.load, "1.0 / (1.0 + tl.exp(-x))"
    for hidden, new in enumerate(("1.0 / (1.001 + tl.exp(-x))", "float('nan') * x", "tl.missing(x)"), 3):
        monkeypatch.setattr(type(RUNTIME), "load", lambda self, text: load(text.replace(old, new)))  # noqa: B023
        with gpu_engine():
            result = worker.run_task({"parity": asdict(ParityTask("MGU", "float32", hidden=hidden))}, CPU)
        if "missing" in new:
            assert result["problem"].startswith("AttributeError: ")
            continue
        assert not result["agrees"]
        assert (result["difference"] is None) is ("nan" in new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repetition", "drop-in layers"])
def test_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass, and fail if products are wrong in another way each time."""
    monkeypatch.setattr(checks, "_SIZES", (3, 20, 4, 5))
    with gpu_engine():
        assert worker.run_task({"check": name}, CPU) == {"agrees": True}
        language, dot = modules()["triton.language"], modules()["triton.language"].dot
        monkeypatch.setattr(language, "dot", lambda *args, **options: dot(*args, **options) + torch.rand(()))
        problem = worker.run_task({"check": name}, CPU)["problem"]
    assert problem in ("LSTM: two runs aren't bit-identical", "RNN: kernels differ from torch.nn")


PROGRAM = """
import json, os, sys, time
for task in json.load(sys.stdin):
    if task["do"] == "crash":
        print("half a result", end="", flush=True)
        sys.exit("an illegal access")
    if task["do"] == "sleep":
        time.sleep(60)
    print("not a result")
    print(json.dumps({"value": task["value"], "process": os.getpid()}), flush=True)
"""


def test_workers_survive_a_crash() -> None:
    tasks = [{"do": "crash" if k == 2 else "run", "value": k} for k in range(6)]
    results = workers.run_tasks(tasks, 2, 60, [sys.executable, "-c", PROGRAM])
    assert results[2] == {"problem": "an illegal access"}
    assert [one["value"] for k, one in enumerate(results) if k != 2] == [0, 1, 3, 4, 5]
    assert len({one["process"] for k, one in enumerate(results) if k != 2}) == 3


@pytest.mark.slow
def test_workers_end_in_time() -> None:
    tasks = [{"do": "run", "value": 1}, {"do": "sleep", "value": 2}, {"do": "run", "value": 3}]
    results = workers.run_tasks(tasks, 1, 2, [sys.executable, "-c", PROGRAM])
    assert results[0]["value"] == 1
    assert results[1:] == [{"problem": "no result within 2 s"}] * 2
    assert workers.run_tasks([], 3, 1) == []


@pytest.mark.slow
def test_the_program_of_workers() -> None:
    """It fails for a device that isn't there, without ending, and for one that PyTorch doesn't know."""
    task = {"row": asdict(Row("rnn", 1, 2, 3, "inference")), "device": "cuda:99"}
    [result] = workers.run_tasks([task], 1, 120)
    assert "CUDA" in result["problem"]


@pytest.mark.slow
def test_a_row() -> None:
    """Contenders that agree are timed, others and those that fail say why."""

    def fail(workload: Any) -> Any:
        raise OSError("no such library\nand more")

    def differ(workload: Any) -> Any:
        return lambda: [value + 1 for value in contenders.CONTENDERS["loop"].prepare(workload)()]

    chosen = {name: contenders.CONTENDERS[name] for name in ("unrolled", "kernels", "torch.nn", "loop")}
    chosen |= {"fails": Runtime(fail), "differs": Runtime(differ)}
    chosen |= {"absent": Runtime(fail, packages=("no_such_package",))}
    for mode in ("inference", "training"):
        with gpu_engine() as runtime:
            entry = contenders.measure(Row("gru", 2, 3, 5, mode), CPU, 0.001, chosen)
        assert runtime.sources
        results = entry["contenders"]
        for name in ("unrolled", "kernels", "torch.nn", "loop"):
            assert results[name]["us_per_step"] == pytest.approx(results[name]["seconds"] / 3 * 1e6)
            assert results[name]["difference"] < 1e-4
        assert results["fails"] == {"problem": "OSError: no such library", "unsupported": False}
        assert results["differs"]["problem"].startswith("differs from the loop by ")
        assert results["absent"] == {"problem": "not installed: no_such_package", "unsupported": True}
        assert entry["ratios"]["loop"] == results["loop"]["seconds"] / results["unrolled"]["seconds"]
        assert ("bytes" in results["loop"]) is (mode == "training")


def test_the_clock_counts_calls() -> None:
    calls = {"a": 0, "b": 0}

    def call(name: str) -> None:
        calls[name] += 1

    timings = clock.time_calls({name: lambda name=name: call(name) for name in calls}, CPU, 1e-4)
    assert all(count > 8 for count in calls.values())
    assert all(0 < one.seconds < 1 for one in timings.values())
    low, high = timings["a"].quartiles
    assert low <= timings["a"].seconds <= high


def arguments(**values: Any) -> Any:
    options = {"minutes": None, "seconds": 0.001, "json": None, "plot": None, "mode": None, "cells": ["mgu"]}
    return type("Options", (), options | values)()


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a failing comparison, and without the time for the last row."""
    tasks = [ParityTask("MGU", "float32", hidden=8), ParityTask("MGU", "float32", "nothing", 8)]
    monkeypatch.setattr(parity, "tasks", lambda: tasks)
    monkeypatch.setattr(command, "run_tasks", lambda tasks, *limits: [worker.run_task(t, CPU) for t in tasks])
    json_file, plot = tmp_path / "gpu.json", tmp_path / "gpu.svg"
    rows = [Row("gru", 2, 3, 5, "inference"), Row("mgu", 1, 2, 4, "training")]
    with gpu_engine():
        document = command.run_benchmark(arguments(json=json_file, plot=plot), CPU, rows)
    assert report.count_failures(document) == 1
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "1 of 2 comparisons with the reference engine agree." in out
    assert "Failed: MGU, float32, 8 units, nothing: ValueError: strategy should be one of " in words
    assert [line.split()[0] for line in out.splitlines() if line.startswith((" gru", "gru", "mgu", " mgu"))]
    saved = json.loads(json_file.read_text())
    assert [row["cell"] for row in saved["rows"]] == ["gru", "mgu"]
    assert "µs per time step" in plot.read_text()
    with gpu_engine():
        document = command.run_benchmark(arguments(minutes=1e-9), CPU, rows)
    assert [row["cell"] for row in document["left_out"]] == ["gru", "mgu"]
    assert "2 rows skipped (time limit). Raise --minutes to run them." in capsys.readouterr().out


def test_the_table_of_a_gpu() -> None:
    """What only a GPU gives: memory, and the name of the device."""
    entry = {"us_per_step": 2.5, "seconds": 1e-3, "bytes": 3 * 2**20}
    slower = {"us_per_step": 5.0, "seconds": 2e-3, "bytes": 2**20}
    row = {"cell": "lstm", "batch": 32, "time": 128, "hidden": 256, "mode": "training"}
    row |= {"contenders": {"unrolled": entry, "loop": slower}, "ratios": {"loop": 2.0}}
    console = Console(width=100, record=True, file=io.StringIO())
    report.print_rows(console, {"rows": [row], "left_out": []})
    assert ["lstm", "32", "256", "2.5", "5", "2.00", "3", "1"] in [
        line.split() for line in console.export_text().splitlines()
    ]
    setup = {"unrolled": "1", "device": "cuda:0", "name": "H200", "capability": "9.0", "cuda": "13.0"}
    text = report.format_setup({**setup, "cudnn": 91002, "versions": {"torch": "2.13", "triton": "3.7"}})
    assert text == (
        "unrolled 1 on H200 (compute capability 9.0, CUDA 13.0, cuDNN 91002); torch 2.13, triton 3.7"
    )

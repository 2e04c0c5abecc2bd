"""``unrolled bench``: every runtime computes the same as torch, and the report is correct."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from unrolled.cli import main
from unrolled.cli.bench import disturbance, in_subprocess, limits, measure, report, results, runtimes, timing
from unrolled.cli.bench.disturbance import Probe
from unrolled.cli.bench.rows import CELLS, MODES, STANDARD, Row, select_rows
from unrolled.cli.bench.runtimes import RUNTIMES, Runtime, without_warnings
from unrolled.cli.bench.workload import Workload, max_difference

LIMITS = limits.Limits(1e11, 2**20, 1e11, 2**28, 1e10)
SMALL = ("--batch", 2, "--hidden", 8, "--time", 3, "--seconds", 0.001)


@pytest.fixture
def run_here(capsys: Any, monkeypatch: Any) -> Any:
    """Run the command in this process, with fake results for measurements in subprocesses."""
    monkeypatch.setattr(
        in_subprocess, "peak_memory", lambda row, name: 3 * 2**20 if name == "torch" else 2**20
    )
    monkeypatch.setattr(in_subprocess, "first_use", lambda row, name: 1.5)
    for name in ("MAX_SLOWDOWN", "MAX_SPREAD", "MAX_SHARE"):  # the machine may be busy
        monkeypatch.setattr(disturbance, name, float("inf"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main.main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


DEFAULT_CELLS = sorted({row.cell for row in select_rows(True)})


def test_every_cell_can_be_timed() -> None:
    assert set(CELLS) == {name.lower() for name in ur.cells.__all__}
    assert {row.cell for row in select_rows(True, list(CELLS))} == set(CELLS)


@pytest.fixture(autouse=True)
def _reference_engine() -> Any:
    with ur.engine("reference"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", DEFAULT_CELLS)
@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != runtimes.TORCH])
def test_runtimes_agree_with_torch(name: str, cell: str, mode: str, monkeypatch: Any) -> None:
    if missing := RUNTIMES[name].missing_packages():
        pytest.skip(f"{missing[0]} is not installed")
    if name.startswith("compile"):  # inductor would take ten seconds each
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = Row(cell, 2, 5, 8, mode)
    if reason := RUNTIMES[name].unsupported(row):
        pytest.skip(reason)
    workload = Workload(row)
    call = without_warnings(lambda: RUNTIMES[name].prepare(workload))
    try:
        result = without_warnings(call)
    except RuntimeError as error:  # no compiler on this machine, or an unsupported operation
        if "can't run on the native engine" not in str(error):
            raise
        pytest.skip(str(error))
    leaves = [workload.x, *workload.theirs.parameters()]
    output, state = workload.theirs(workload.x)
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    expected = torch.autograd.grad(output.sum(), leaves) if mode == "training" else [output, *states]
    assert len(result) == len(expected)
    for a, b in zip(result, expected, strict=True):
        a, b = torch.as_tensor(a).detach(), b.detach()
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5)
    assert max_difference(without_warnings(call), expected) < 1e-5


def test_supported_rows_of_each_runtime() -> None:
    def supporting(cell: str, mode: str, time: int = 1) -> set[str]:
        row = Row(cell, 1, time, 8, mode)
        return {name for name, runtime in RUNTIMES.items() if runtime.unsupported(row) is None}

    every = {"unrolled", "torch", "compile"}
    onnx = {"onnxruntime", "openvino"}
    assert supporting("gru", "inference") == every | onnx | {"jax", "frozen"}
    assert supporting("lstm", "inference") >= every | onnx | {"jax", "frozen"}
    assert supporting("rnn", "training", 1000) == every - {"compile"} | {"jax"}
    assert supporting("mgu", "training") == every | {"compile-step", "torchscript"}
    assert supporting("lstm", "streaming", 100) == {"unrolled", "torch", "frozen", "jax"} | onnx
    assert supporting("mgu", "streaming", 100) == {"unrolled", "torch", "frozen"}


def test_custom_cells_match_their_equations() -> None:
    """A peephole LSTM with zero peepholes is torch.nn's LSTM; LayerNormLSTM follows its equations."""
    layer, theirs = ur.Recurrent(ur.cells.PeepholeLSTM, 3, 4), torch.nn.LSTM(3, 4)
    with torch.no_grad():
        theirs.bias_hh_l0.zero_()
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
            getattr(layer, name).copy_(getattr(theirs, name))
        for gate in "ifo":
            getattr(layer, f"peep_{gate}_l0").zero_()
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(layer(x)[0], theirs(x)[0])
    with torch.no_grad():
        layer.peep_o_l0.fill_(0.5)
        _, (h, c) = layer(x[:1])
        o = linear(x[0], theirs.weight_ih_l0, theirs.bias_ih_l0)[:, 12:]
        torch.testing.assert_close(h[0], torch.sigmoid(o + 0.5 * c[0]) * torch.tanh(c[0]))

    layer_norm = ur.Recurrent(ur.cells.LayerNormLSTM, 3, 4, dtype=torch.float64)
    w = {name.removesuffix("_l0"): value.detach() for name, value in layer_norm.named_parameters()}

    def normalize(a: torch.Tensor) -> torch.Tensor:
        centered = a - a.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    h = c = torch.zeros(2, 4, dtype=torch.float64)
    for x_t in x.double():
        sums = normalize(x_t @ w["weight_ih"].T) + w["bias_ih"] + normalize(h @ w["weight_hh"].T)
        i, f, g, o = sums.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(normalize(c))
    torch.testing.assert_close(layer_norm(x.double())[0][-1].detach(), h, rtol=0, atol=1e-12)


def test_failures_are_reported_and_not_timed() -> None:
    def wrong(workload: Workload) -> Any:
        return lambda: [value + 0.5 for value in RUNTIMES["torch"].prepare(workload)()]

    def nan(workload: Workload) -> Any:
        return lambda: [value * torch.nan for value in RUNTIMES["torch"].prepare(workload)()]

    def fails(workload: Workload) -> Any:
        raise RuntimeError("no such thing\nat all")

    selected = {"torch": RUNTIMES["torch"], "wrong": Runtime(wrong), "nan": Runtime(nan)}
    selected |= {"fails": Runtime(fails), "unrolled": Runtime(RUNTIMES["torch"].prepare)}
    entry = measure.measure(Row("rnn", 2, 3, 8, "inference"), selected, 0.001, LIMITS, Probe())
    assert [name for name, result in entry["runtimes"].items() if "seconds" in result] == [
        "torch",
        "unrolled",
    ]
    assert entry["best_other"] is None
    lines = "\n".join(report.format_failures([entry]))
    assert "wrong disagrees with torch: " in lines
    assert "nan disagrees with torch: NaN" in lines
    assert "fails failed: RuntimeError: no such thing (batch × time × hidden: 2×3×8)" in lines


@pytest.mark.slow
@NEEDS_COMPILER
def test_amplified_rounding_errors_are_accepted() -> None:
    """In this row, torch's float32 result differs from float64 by up to 2e-4, and so does ours."""
    selected = {name: RUNTIMES[name] for name in ("torch", "unrolled")}
    entry = measure.measure(Row("layernormlstm", 32, 100, 128, "inference"), selected, 0.001, LIMITS, Probe())
    assert "seconds" in entry["runtimes"]["unrolled"]


def test_default_rows() -> None:
    full = select_rows(True)
    assert len(set(full)) == len(full)
    for cell in STANDARD:
        sizes = {(row.batch, row.time, row.hidden) for row in full if row.cell == cell}
        assert 50 < len(sizes) < 60
        assert (64, 1000, 1024) not in sizes
        assert {(1, 1, 32), (64, 1, 1024), (64, 100, 1024), (64, 1000, 256), (1, 1000, 1024)} <= sizes
    assert {row.input for row in full if row.hidden == 32} == {16}
    assert {row.cell for row in full} == set(DEFAULT_CELLS)
    quick = select_rows(False)
    assert len(quick) < 20
    assert {row.mode for row in quick} == set(MODES)
    assert select_rows(False, ["gru"], [64], [1024], [1000], "training") == [
        Row("gru", 64, 1000, 1024, "training")
    ]


def test_operations_and_traffic_of_a_row() -> None:
    row = Row("lstm", 2, 10, 32, "inference")
    assert row.operations() == 2 * 10 * 2 * 4 * 32 * (16 + 32)
    assert row.weight_traffic() == 4 * 4 * 32 * (16 + 10 * 32)
    assert row.weight_bytes() == 4 * 4 * 32 * (16 + 32)
    assert Row("lstm", 2, 10, 32, "training").operations() == 3 * row.operations()
    assert Row("lstm", 2, 10, 32, "streaming").weight_traffic() == 4 * 4 * 32 * 10 * (16 + 32)
    assert Row("mgu", 1, 7, 32, "inference").weight_traffic() == 4 * 2 * 32 * (16 + 7 * 32)


@pytest.mark.slow
def test_limits_are_plausible() -> None:
    attempts = [limits.Limits.measure(0.05) for _ in range(3)]  # other programs may disturb one of them
    best = max(attempts, key=lambda limit: limit.cache_rate / limit.memory_rate)
    assert 1e8 < best.flops < 1e15
    assert 1e8 < best.memory_rate < 1e13
    assert best.memory_rate / 2 < best.cache_rate < 1e14
    assert best.memory_bytes > best.cache_bytes
    for row in (Row("rnn", 1, 100, 256, "inference"), Row("rnn", 512, 100, 256, "inference")):
        seconds, reason = best.lower_bound(row)
        assert seconds >= row.operations() / best.flops
        assert reason in ("compute", "reading")
    assert LIMITS.lower_bound(Row("lstm", 512, 100, 512, "inference"))[1] == "compute"
    assert "100 GFLOP/s" in report.format_limits(LIMITS.as_data())


def test_each_block_of_calls_is_prepared() -> None:
    """Warming up, too."""
    prepared = [""]
    seen: dict[str, set[str]] = {"a": set(), "b": set()}
    timing.interleave(
        {name: lambda name=name: seen[name].add(prepared[0]) for name in seen},  # type: ignore[misc]
        0.01,
        before_block=functools.partial(prepared.__setitem__, 0),
    )
    assert seen == {"a": {"a"}, "b": {"b"}}


def test_interleaved_timing() -> None:
    called: list[str] = []
    timings = timing.interleave({name: functools.partial(called.append, name) for name in "ab"}, 0.01)
    assert sum(a != b for a, b in itertools.pairwise(called[6:])) >= 5
    assert all(0 < t.seconds < 1e-3 and t.calls >= 5 for t in timings.values())
    assert timings["a"].quartiles[0] <= timings["a"].seconds <= timings["a"].quartiles[1]


@pytest.mark.slow
@NEEDS_COMPILER  # the chart shows ratios to the native engine
def test_json_tables_and_a_chart(run_here: Any, tmp_path: Path) -> None:
    path, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    threads = torch.get_num_threads()
    arguments = ("--cells", "rnn,mgu", *SMALL, "--peers", "torchscript", "--threads", 1, "--json", path)
    code, out, err = run_here(*arguments, "--plot", plot)
    assert (code, err) == (0, "")
    assert torch.get_num_threads() == threads
    for words in (
        "Limits of this machine",
        "Geometric means",
        "Peak memory",
        "0.33",
        "First call of a custom cell",
        "torchscript",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= 80
    assert "<svg" in plot.read_text()
    document = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) != []
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "bench.svg"}
    assert set(document) == {"version", "setup", "limits", "missing", "rows", "means", "memory", "first_use"}
    assert document["version"] == results.VERSION
    assert document["setup"]["threads"] == 1
    assert set(document["limits"]) == set(LIMITS.as_data())
    assert [row["mode"] for row in document["rows"]] == ["inference", "training"] * 2
    for row in document["rows"]:
        assert (
            asdict(Row(*(row[name] for name in ("cell", "batch", "time", "hidden", "mode")))).items()
            <= row.items()
        )
        ours, theirs = row["runtimes"]["unrolled"], row["runtimes"]["torch"]
        assert set(ours) == {"difference", "seconds", "quartiles", "calls"}
        assert row["ratio_to_torch"] == theirs["seconds"] / ours["seconds"]
        comparable = row["runtimes"]["frozen"] if row["mode"] == "inference" else ours
        assert row["share_of_limit"] == row["limit_seconds"] / comparable["seconds"]
        assert (row["best_other"] == "torchscript") == (row["cell"] == "mgu")
    assert document["rows"][0]["runtimes"]["torchscript"] == {
        "problem": "for custom cells only",
        "unsupported": True,
    }
    assert document["means"][0]["ratio_to_torch"] == pytest.approx(document["rows"][0]["ratio_to_torch"])
    assert (
        document["memory"][0] | {"unrolled_bytes": 2**20, "torch_bytes": 3 * 2**20} == document["memory"][0]
    )
    assert document["first_use"][0]["seconds"] == 1.5

    rows = document["rows"]
    code, _, _ = run_here(
        *arguments, "--resume", "--mode", "inference", "--cells", "rnn,gru", "--peers", "none"
    )
    again = json.loads(path.read_text())["rows"]
    assert (code, again[:4]) == (0, rows)
    assert [row["cell"] for row in again[4:]] == ["gru"]
    code, _, err = run_here(*arguments[:-4], "--threads", 2, "--json", path, "--resume")
    assert (code, err) == (2, f"unrolled: {path} can't be resumed: threads was 1, but is now 2\n")
    path.write_text("{}")
    code, _, err = run_here(*arguments, "--resume")
    assert (code, err) == (2, f"unrolled: {path} is not a result file of unrolled bench\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1,2", "--peers", "jax"], "--peers needs a single number of threads, got 2"),
        (["--threads", "1,2", "--resume"], "--resume needs a single number of threads, got 2"),
        (["--cells", "elman"], "argument --cells: expected one or more of rnn, lstm, gru, "),
        (["--batch", "0"], "expected a positive integer, got '0'"),
        (["--hidden", "1,x"], "expected a positive integer, got 'x'"),
        (["--threads", "none"], "expected a positive integer, got 'none'"),
        (["--seconds", "nan"], "expected a positive number, got 'nan'"),
        (["--mode", "both"], "invalid choice: 'both'"),
        (["--peers", "tensorflow"], "--peers: expected one or more of compile, "),
        (["--peers", ","], "expected comma-separated names"),
        (["--quick", "--full"], "not allowed with"),
        (["--resume"], "--resume needs --json FILE"),
        (["--json", "no/such/folder.json"], "the folder no/such doesn't exist"),
        (["--plot", "chart.doc"], "--plot: expected a file name ending in ."),
        (["--hidden", "1000000"], "these sizes are too large"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, run_here: Any) -> None:
    code, out, err = run_here(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("unrolled: ")
    assert err.count("\n") == 1
    assert message in err


def test_missing_packages_are_reported(run_here: Any, monkeypatch: Any) -> None:
    uninstalled = Runtime(RUNTIMES["torch"].prepare, packages=("no_such_package",))
    monkeypatch.setitem(RUNTIMES, "jax", uninstalled)
    code, _, err = run_here("--peers", "jax")
    assert (code, err) == (2, "unrolled: --peers: jax needs no_such_package: pip install no_such_package\n")
    selected, missing = runtimes.select_runtimes(None, full=False)
    assert "jax" not in selected
    assert "no_such_package" in missing
    assert report.format_missing(missing).endswith(f". To install: pip install {' '.join(missing)}")


@pytest.mark.slow
def test_measurements_in_a_subprocess(monkeypatch: Any) -> None:
    """The peak memory includes at least the saved outputs; a failure raises an error."""
    row = Row("rnn", 4, 1000, 64, "training")
    assert 4 * 1000 * 4 * 64 < in_subprocess.peak_memory(row, "torch") < 2**30
    monkeypatch.setattr(in_subprocess.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="exit code 1"):
        in_subprocess.first_use(row, "torch")

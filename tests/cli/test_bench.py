"""The benchmark: every runtime computes what torch does, and what it reports can be relied on."""

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
from unrolled.cli.bench import apart, grid, limits, measure, peers, report, results, timing
from unrolled.cli.bench.grid import CELLS, STANDARD, Row
from unrolled.cli.bench.work import Work, difference

LIMITS = limits.Limits(1e11, 2**20, 1e11, 2**28, 1e10)
SMALL = ("--batch", 2, "--hidden", 8, "--time", 3, "--seconds", 0.001)


@pytest.fixture
def here(capsys: Any, monkeypatch: Any) -> Any:
    """The command in this process, without what takes processes of their own."""
    monkeypatch.setattr(apart, "peak_memory", lambda row, name: 3 * 2**20 if name == "torch" else 2**20)
    monkeypatch.setattr(apart, "first_use", lambda row, name: 1.5)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main.main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


GRID = sorted({row.cell for row in grid.rows(True)})


def test_every_cell_can_be_timed() -> None:
    assert set(CELLS) == {name.lower() for name in ur.cells.__all__}
    assert {row.cell for row in grid.rows(True, list(CELLS))} == set(CELLS)


@pytest.fixture(autouse=True)
def _same_engine() -> Any:
    with ur.engine("reference"):
        yield


@pytest.mark.parametrize("mode", grid.MODES)
@pytest.mark.parametrize("cell", GRID)
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != peers.TORCH])
def test_a_runtime_computes_what_torch_does(name: str, cell: str, mode: str, monkeypatch: Any) -> None:
    if missing := peers.PEERS[name].missing():
        pytest.skip(f"{missing[0]} is not installed")
    if name.startswith("compile"):  # the wiring; what inductor makes of it takes ten seconds each
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = Row(cell, 2, 5, 8, mode)
    if why := peers.PEERS[name].refuses(row):
        pytest.skip(why)
    work = Work(row)
    call = peers.quietly(lambda: peers.PEERS[name].prepare(work))
    try:
        found = peers.quietly(call)
    except RuntimeError as error:  # no compiler on this machine, or an operation that ours doesn't know
        if "can't run on the native engine" not in str(error):
            raise
        pytest.skip(str(error))
    leaves = [work.x, *work.theirs.parameters()]
    output, state = work.theirs(work.x)
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    expected = torch.autograd.grad(output.sum(), leaves) if mode == "training" else [output, *states]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        a, b = torch.as_tensor(a).detach(), b.detach()
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5)
    assert difference(peers.quietly(call), expected) < 1e-5


def test_which_runtimes_take_a_row() -> None:
    def take(cell: str, mode: str, time: int = 1) -> set[str]:
        return {
            name for name, peer in peers.PEERS.items() if peer.refuses(Row(cell, 1, time, 8, mode)) is None
        }

    every = {"unrolled", "torch", "compile"}
    graphs = {"onnxruntime", "openvino"}
    assert take("gru", "inference") == every | graphs | {"jax", "frozen"}
    assert take("lstm", "inference") >= every | graphs | {"jax", "frozen"}
    assert take("rnn", "training", 1000) == every - {"compile"} | {"jax"}
    assert take("mgu", "training") == every | {"compile-step", "torchscript"}
    assert take("lstm", "streaming", 100) == {"unrolled", "torch", "frozen", "jax"} | graphs
    assert take("mgu", "streaming", 100) == {"unrolled", "torch", "frozen"}


def test_custom_cells() -> None:
    """A peephole cell without peepholes is torch.nn's LSTM; the normalised one against its equations."""
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

    normal = ur.Recurrent(ur.cells.LayerNormLSTM, 3, 4, dtype=torch.float64)
    w = {name.removesuffix("_l0"): value.detach() for name, value in normal.named_parameters()}

    def over(a: torch.Tensor) -> torch.Tensor:
        away = a - a.mean(-1, keepdim=True)
        return away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    h = c = torch.zeros(2, 4, dtype=torch.float64)
    for now in x.double():
        sums = over(now @ w["weight_ih"].T) + w["bias_ih"] + over(h @ w["weight_hh"].T)
        i, f, g, o = sums.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(over(c))
    torch.testing.assert_close(normal(x.double())[0][-1].detach(), h, rtol=0, atol=1e-12)


def test_what_disagrees_is_reported_and_not_timed() -> None:
    def wrong(work: Work) -> Any:
        return lambda: [value + 0.5 for value in peers.PEERS["torch"].prepare(work)()]

    def nan(work: Work) -> Any:
        return lambda: [value * torch.nan for value in peers.PEERS["torch"].prepare(work)()]

    def fails(work: Work) -> Any:
        raise RuntimeError("no such thing\nat all")

    chosen = {"torch": peers.PEERS["torch"], "wrong": peers.Peer(wrong), "nan": peers.Peer(nan)}
    chosen |= {"fails": peers.Peer(fails), "unrolled": peers.Peer(peers.PEERS["torch"].prepare)}
    entry = measure.measure(Row("rnn", 2, 3, 8, "inference"), chosen, 0.001, LIMITS)
    assert [name for name, found in entry["runtimes"].items() if "seconds" in found] == ["torch", "unrolled"]
    assert entry["best_other"] is None
    lines = "\n".join(report.troubles([entry]))
    assert "wrong disagrees with torch: " in lines
    assert "nan disagrees with torch: NaN" in lines
    assert "fails failed: RuntimeError: no such thing (batch × time × hidden: 2×3×8)" in lines


@NEEDS_COMPILER
def test_roundings_that_grow_are_no_disagreement() -> None:
    """Here torch's own float32 is 2e-4 away from its float64 at some elements, and ours as far."""
    chosen = {name: peers.PEERS[name] for name in ("torch", "unrolled")}
    entry = measure.measure(Row("layernormlstm", 32, 100, 128, "inference"), chosen, 0.001, LIMITS)
    assert "seconds" in entry["runtimes"]["unrolled"]


def test_the_grid() -> None:
    full = grid.rows(True)
    assert len(set(full)) == len(full)
    for cell in STANDARD:
        sizes = {(row.batch, row.time, row.hidden) for row in full if row.cell == cell}
        assert 50 < len(sizes) < 60
        assert (64, 1000, 1024) not in sizes
        assert {(1, 1, 32), (64, 1, 1024), (64, 100, 1024), (64, 1000, 256), (1, 1000, 1024)} <= sizes
    assert {row.input for row in full if row.hidden == 32} == {16}
    assert {row.cell for row in full} == set(GRID)
    quick = grid.rows(False)
    assert len(quick) < 20
    assert {row.mode for row in quick} == set(grid.MODES)
    assert grid.rows(False, ["gru"], [64], [1024], [1000], "training") == [
        Row("gru", 64, 1000, 1024, "training")
    ]


def test_the_work_of_a_row() -> None:
    row = Row("lstm", 2, 10, 32, "inference")
    assert row.operations() == 2 * 10 * 2 * 4 * 32 * (16 + 32)
    assert row.reading() == 4 * 4 * 32 * (16 + 10 * 32)
    assert row.resident() == 4 * 4 * 32 * (16 + 32)
    assert Row("lstm", 2, 10, 32, "training").operations() == 3 * row.operations()
    assert Row("lstm", 2, 10, 32, "streaming").reading() == 4 * 4 * 32 * 10 * (16 + 32)
    assert Row("mgu", 1, 7, 32, "inference").reading() == 4 * 2 * 32 * (16 + 7 * 32)


def test_the_limits_are_sane() -> None:
    tried = [limits.Limits.measured(0.05) for _ in range(3)]  # others may have kept a core busy in one
    found = max(tried, key=lambda limit: limit.cache_rate / limit.memory_rate)
    assert 1e8 < found.flops < 1e15
    assert 1e8 < found.memory_rate < 1e13
    assert found.memory_rate / 2 < found.cache_rate < 1e14
    assert found.memory_bytes > found.cache_bytes
    for row in (Row("rnn", 1, 100, 256, "inference"), Row("rnn", 512, 100, 256, "inference")):
        seconds, why = found.of(row)
        assert seconds >= row.operations() / found.flops
        assert why in ("compute", "reading")
    assert LIMITS.of(Row("lstm", 512, 100, 512, "inference"))[1] == "compute"
    assert "100 GFLOP/s" in report.limits(LIMITS.as_data())


def test_calls_are_timed_in_turn() -> None:
    seen: list[str] = []
    found = timing.interleave({name: functools.partial(seen.append, name) for name in "ab"}, 0.01)
    assert sum(a != b for a, b in itertools.pairwise(seen[6:])) >= 5
    assert all(0 < timed.seconds < 1e-3 and timed.calls >= 5 for timed in found.values())
    assert found["a"].quartiles[0] <= found["a"].seconds <= found["a"].quartiles[1]


@NEEDS_COMPILER  # what it draws is the ratio to our own engine
def test_json_tables_and_a_picture(here: Any, tmp_path: Path) -> None:
    path, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    threads = torch.get_num_threads()
    arguments = ("--cells", "rnn,mgu", *SMALL, "--peers", "torchscript", "--threads", 1, "--json", path)
    code, out, err = here(*arguments, "--plot", plot)
    assert (code, err) == (0, "")
    assert torch.get_num_threads() == threads
    for words in ("machine's limits", "Geometric means", "Peak memory", "0.33", "First use", "torchscript"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 80
    assert "<svg" in plot.read_text()
    found = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) != []
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "bench.svg"}
    assert set(found) == {"version", "setup", "limits", "missing", "rows", "means", "memory", "first_use"}
    assert found["version"] == results.VERSION
    assert found["setup"]["threads"] == 1
    assert set(found["limits"]) == set(LIMITS.as_data())
    assert [row["mode"] for row in found["rows"]] == ["inference", "training"] * 2
    for row in found["rows"]:
        assert (
            asdict(Row(*(row[name] for name in ("cell", "batch", "time", "hidden", "mode")))).items()
            <= row.items()
        )
        ours, theirs = row["runtimes"]["unrolled"], row["runtimes"]["torch"]
        assert set(ours) == {"difference", "seconds", "quartiles", "calls"}
        assert row["ratio_to_torch"] == theirs["seconds"] / ours["seconds"]
        alike = row["runtimes"]["frozen"] if row["mode"] == "inference" else ours
        assert row["share_of_limit"] == row["limit_seconds"] / alike["seconds"]
        assert (row["best_other"] == "torchscript") == (row["cell"] == "mgu")
    assert found["rows"][0]["runtimes"]["torchscript"] == {
        "trouble": "for custom cells only",
        "refused": True,
    }
    assert found["means"][0]["ratio_to_torch"] == pytest.approx(found["rows"][0]["ratio_to_torch"])
    assert found["memory"][0] | {"unrolled_bytes": 2**20, "torch_bytes": 3 * 2**20} == found["memory"][0]
    assert found["first_use"][0]["seconds"] == 1.5

    rows = found["rows"]
    code, _, _ = here(*arguments, "--resume", "--mode", "inference", "--cells", "rnn,gru", "--peers", "none")
    again = json.loads(path.read_text())["rows"]
    assert (code, again[:4]) == (0, rows)
    assert [row["cell"] for row in again[4:]] == ["gru"]
    code, _, err = here(*arguments[:-4], "--threads", 2, "--json", path, "--resume")
    assert (code, err) == (2, f"unrolled: {path} can't be continued: its threads was 1, not 2\n")
    path.write_text("{}")
    code, _, err = here(*arguments, "--resume")
    assert (code, err) == (2, f"unrolled: {path} holds no results of unrolled bench\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "elman"], "'elman' is none of rnn, lstm, gru"),
        (["--batch", "0"], "expected a whole number from 1, got '0'"),
        (["--hidden", "1,x"], "expected a whole number from 1, got 'x'"),
        (["--threads", "none"], "expected a whole number from 1, got 'none'"),
        (["--seconds", "nan"], "expected a number above 0, got 'nan'"),
        (["--mode", "both"], "invalid choice: 'both'"),
        (["--peers", "tensorflow"], "there is no runtime 'tensorflow': there are compile, "),
        (["--peers", ","], "expected names with commas between them"),
        (["--quick", "--full"], "not allowed with"),
        (["--resume"], "--resume needs --json FILE"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
        (["--plot", "picture.doc"], "--plot should end in ."),
        (["--hidden", "1000000"], "every row is too large for the grid"),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], message: str, here: Any) -> None:
    code, out, err = here(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("unrolled: ")
    assert err.count("\n") == 1
    assert message in err


def test_what_is_not_installed_is_said(here: Any, monkeypatch: Any) -> None:
    gone = peers.Peer(peers.PEERS["torch"].prepare, needs=("no_such_package",))
    monkeypatch.setitem(peers.PEERS, "jax", gone)
    code, _, err = here("--peers", "jax")
    assert (code, err) == (2, "unrolled: --peers: jax needs no_such_package: pip install no_such_package\n")
    chosen, missing = peers.chosen(None, full=False)
    assert "jax" not in chosen
    assert "no_such_package" in missing
    assert report.missing(missing).endswith(f". To get them: pip install {' '.join(missing)}")


def test_a_process_of_its_own(monkeypatch: Any) -> None:
    """The peak holds at least the output; failures are told."""
    row = Row("rnn", 4, 1000, 64, "training")
    assert 4 * 1000 * 4 * 64 < apart.peak_memory(row, "torch") < 2**30
    monkeypatch.setattr(apart.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="exit code 1"):
        apart.first_use(row, "torch")

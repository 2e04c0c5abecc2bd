"""``unrolled compare``: the budget, training, interrupted runs and the report."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unrolled as ur
from helpers import processes
from unrolled.cli import main
from unrolled.cli.compare import report
from unrolled.cli.compare.base import Task
from unrolled.cli.compare.runs import Run
from unrolled.cli.compare.tasks import TASKS
from unrolled.cli.compare.training import Budget, CellConfig, Model, train, units_for

SMALL = ("--tasks", "adding", "--length", 6, "--parameters", 60, "--seeds", 2)
TABLE_ROW = re.compile(r"^(\w+) +(\d+) +(\d+) +2 ", re.MULTILINE)  # cell, units, parameters, 2 seeds
CELL = """
import torch, unrolled as ur
class Custom(ur.Cell):
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
def run_here(capsys: Any, tmp_path: Path) -> Any:
    """Run the command in this process, on the reference engine, with its runs in a temporary folder."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with ur.engine("reference"):
            code = main.main(["compare", "--runs", str(tmp_path / "runs"), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("name", ur.cells.__all__)
def test_every_cell_gets_the_same_budget(name: str) -> None:
    """The hidden size is the one that brings the model closest to the budget."""
    config, task = CellConfig(getattr(ur.cells, name)), TASKS["adding"].create(4)
    for layers in (1, 2):
        units = units_for(config, task, budget(parameters=10_000, layers=layers))
        counts = {
            size: sum(p.numel() for p in Model(config, task, size, layers).parameters())
            for size in (units - 1, units, units + 1)
        }
        assert abs(counts[units] / 10_000 - 1) < 0.05
        assert abs(counts[units] - 10_000) == min(abs(count - 10_000) for count in counts.values())


def test_the_budget_with_sizes_that_a_cell_rejects() -> None:
    task = TASKS["copy"].create(4)
    heads = CellConfig(ur.cells.SLSTM, {"heads": 8})
    counts = {units: heads.count_parameters(task, units, 1) for units in range(8, 100, 8)}
    closest = min(counts, key=lambda units: abs(counts[units] - 2500))
    assert units_for(heads, task, budget(parameters=2500)) == closest
    projected = CellConfig(ur.cells.LSTM, {"proj_size": 20})
    assert units_for(projected, task, budget(parameters=5000)) > 20


def test_training_matches_torch() -> None:
    """A plain training loop with torch.nn, the same parameters and batches gives the same curve."""
    task = TASKS["adding"].create(10)
    with ur.engine("reference"):
        result = train(CellConfig(ur.cells.GRU), task, budget(steps=40), 3, lambda: None)
    torch.manual_seed(3)
    layer = nn.GRU(2, result["units"])
    head = nn.Linear(result["units"], 1)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters)
    batches = torch.Generator().manual_seed(3)
    expected = []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * step / 40)) / 2
        x, target = task.sample(8, batches)
        optimizer.zero_grad()
        (head(layer(x)[1][0]) - target).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 2:
            with torch.no_grad():
                x, target = task.held_out
                expected.append((head(layer(x)[1][0]) - target).square().mean().item())
    steps = [step for step, _ in result["curve"]]
    assert steps == list(range(2, 41, 2))
    assert [score for _, score in result["curve"]] == pytest.approx(expected, rel=1e-3)
    assert result["score"] == result["curve"][-1][1]


def test_cells_see_the_same_data() -> None:
    task = TASKS["adding"].create(5)

    def batches(cell: Any, seed: int) -> list[float]:
        sums = []

        def sample(rows: int, generator: torch.Generator) -> Any:
            x, target = task.sample(rows, generator)
            sums.append(x.double().sum().item())
            return x, target

        rng_state, threads = torch.get_rng_state(), torch.get_num_threads()
        with ur.engine("reference"):
            train(
                CellConfig(cell),
                replace(task, sample=sample),
                budget(steps=5, threads=threads + 1),
                seed,
                lambda: None,
            )
        assert torch.equal(torch.get_rng_state(), rng_state)
        assert torch.get_num_threads() == threads
        return sums

    rnn_batches = batches(ur.cells.RNN, 0)
    assert len(set(rnn_batches)) == 5
    assert batches(ur.cells.MinGRU, 0) == rnn_batches
    assert not set(batches(ur.cells.RNN, 1)) & set(rnn_batches)


@pytest.mark.slow
def test_killed_and_interrupted_commands_resume(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The JSON and the table are the same as without an interruption."""
    arguments = (
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
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    printed = []

    def finish(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        assert main.main(arguments) == 0
        printed.append(capsys.readouterr())

    finish(uninterrupted)
    interrupted.mkdir()
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        saved = {path: path.stat().st_mtime_ns for path in interrupted.glob("runs/compare/*.json")}
        process = processes.start("-m", "unrolled", *arguments, cwd=interrupted)
        while process.poll() is None and len(list(interrupted.glob("runs/compare/*.json"))) == len(saved):
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == code
        assert not (interrupted / "all.json").exists()
        assert {path: path.stat().st_mtime_ns for path in saved} == saved  # not trained again
    message = r"unrolled: stopped; [23] of 4 runs are saved in runs/compare. Rerun the command to resume.\n"
    assert re.search(message, err)
    finish(interrupted)
    assert printed[0] == printed[1]
    assert (interrupted / "all.json").read_text() == (uninterrupted / "all.json").read_text()
    names = [
        {path.name for path in folder.glob("runs/compare/*.json")} for folder in (uninterrupted, interrupted)
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 4


def test_an_interrupt_between_two_runs(run_here: Any, monkeypatch: Any) -> None:
    """The message is also printed if the interrupt comes just after a result was saved."""
    save = Run.save

    def save_and_interrupt(run: Run, *args: Any) -> None:
        save(run, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_interrupt)
    code, out, err = run_here("--cells", "rnn", *SMALL, "--seeds", 2, "--steps", 1)
    assert (code, out) == (130, "")
    assert re.fullmatch(
        r"unrolled: stopped; 1 of 2 runs are saved in .*. Rerun the command to resume.\n", err
    )


@pytest.mark.slow
def test_table_json_and_a_chart(run_here: Any, tmp_path: Path) -> None:
    path, plot = tmp_path / "all.json", tmp_path / "all.svg"
    arguments = ("--cells", "rnn,GRU,gru", *SMALL, "--steps", 60, "--json", path, "--plot", plot)
    code, out, err = run_here(*arguments)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    data = json.loads(path.read_text())
    (task,) = data["tasks"]
    assert {cell["cell"] for cell in task["cells"]} == {"RNN", "GRU"}
    assert [(name, int(u), int(p)) for name, u, p in TABLE_ROW.findall(out)] == [
        (cell["cell"], cell["units"], cell["parameters"]) for cell in task["cells"]
    ]
    assert f"{task['baseline']['score']:.3g}" in out
    for cell in task["cells"]:
        scores = [run["score"] for run in data["runs"] if run["cell"] == cell["cell"]]
        assert (cell["best"], cell["median"], cell["worst"]) == (min(scores), sum(scores) / 2, max(scores))
        assert f"{cell['median']:.3g}" in out
    medians = [cell["median"] for cell in task["cells"]]
    assert medians == sorted(medians)
    for words in ("RNN", "GRU", "adding, length 6", task["measure"], "always predict 1"):
        assert f"<!-- {words} -->" in plot.read_text()
    modified = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert run_here(*arguments) == (code, out, err)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == modified
    assert json.loads(path.read_text()) == data


def test_cells_are_ranked_by_median() -> None:
    """The best median comes first; a diverged run counts as worse than any other."""

    def ranking(higher_is_better: bool) -> list[tuple[Any, ...]]:
        task = Task(1, 1, False, lambda *_: None, (None, None), None, None, "m", higher_is_better, ("b", 0.5))  # type: ignore[arg-type]
        runs = []
        for cell, scores in (
            ("RNN", [3.0, 1.0, 2.0]),
            ("GRU", [4.0, None, 1.5]),
            ("LSTM", [None, 1.0, None]),
        ):
            for seed, score in enumerate(scores):
                run = Run(CellConfig(getattr(ur.cells, cell)), "t", 1, task, budget(), seed)
                stored = {
                    "task": "t",
                    "cell": cell,
                    "units": 1,
                    "parameters": 200,
                    "curve": [],
                    "score": score,
                }
                runs.append((run, stored))
        (entry,) = report.document(runs)["tasks"]
        return [(c["cell"], c["median"], c["best"], c["worst"], c["diverged"]) for c in entry["cells"]]

    assert ranking(False) == [("RNN", 2, 1, 3, 0), ("GRU", 4, 1.5, None, 1), ("LSTM", None, 1, None, 2)]
    assert ranking(True) == [("RNN", 2, 3, 1, 0), ("GRU", 1.5, 4, None, 1), ("LSTM", None, 1, None, 2)]


def test_a_diverging_cell_and_an_edited_cell(run_here: Any, tmp_path: Path) -> None:
    path, results = tmp_path / "cell.py", tmp_path / "all.json"
    path.write_text(CELL.format(step="h * 1e30 + x @ self.weight_ih.T"))
    arguments = ("--cells", f"{path}:Custom,rnn", *SMALL, "--steps", 4, "--json", results)
    code, out, _ = run_here(*arguments, "--plot", tmp_path / "all.png")
    assert code == 0
    assert "Custom diverged for 2 of 2 seeds. Try a lower --rate." in out
    runs = json.loads(results.read_text())["runs"]
    assert [run["score"] for run in runs if run["cell"] == "Custom"] == [None, None]
    path.write_text(CELL.format(step="torch.tanh(h + x @ self.weight_ih.T)"))
    code, out, _ = run_here(*arguments)
    assert code == 0
    assert "diverged" not in out
    assert all(run["score"] for run in json.loads(results.read_text())["runs"])


def test_options_apply_to_the_cells_that_have_them(run_here: Any, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    arguments = ("--cells", "rnn,gru,slstm", "--option", "heads=2", "--option", "nonlinearity=relu", *SMALL)
    code, _, err = run_here(*arguments, "--steps", 1, "--json", path)
    assert (code, err) == (0, "")
    options = {run["cell"]: run["options"] for run in json.loads(path.read_text())["runs"]}
    assert options == {"RNN": {"nonlinearity": "relu"}, "GRU": {}, "SLSTM": {"heads": 2}}


def test_errors_are_one_line(run_here: Any, tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(CELL.format(step="h + x"))
    (tmp_path / "rnn.py").write_text(CELL.format(step="h").replace("Custom", "RNN"))
    fixed = CELL.format(step="h + x @ self.weight_ih.T").replace('"hidden"', "3")
    (tmp_path / "fixed.py").write_text(fixed.replace("    weight", "    state = {'h': 3}\n    weight"))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--cells", "lstn"], "--cells: unknown cell 'lstn'; expected rnn, lstm, gru, another cell in un"),
        (["--cells", f"rnn,{tmp_path}/rnn.py:RNN"], "--cells: two cells are named RNN; rename one of them"),
        (["--cells", f"{tmp_path}/no.py:A"], "--cells: "),
        (
            ["--cells", f"{tmp_path}/cell.py:Custom"],
            "--cells: can't train Custom on adding (RuntimeError: The",
        ),
        (
            ["--cells", f"{tmp_path}/fixed.py:Custom"],
            "Custom can't reach --parameters 5000: it has 10 parameters",
        ),
        (["--cells", "rnn,"], "expected comma-separated names, got 'rnn,'"),
        (["--cells", "rnn", "--option", "heads=2"], "RNN has no option 'heads'"),
        (["--tasks", "imagenet"], "--tasks: expected one or more of adding, copy, digits, sunspots, ch"),
        (["--seeds", "0"], "expected a positive integer, got '0'"),
        (["--rate", "-1"], "expected a positive number, got '-1'"),
        (["--length", "1"], "adding needs a --length of at least 2"),
        (
            ["--tasks", "digits", "--length", "9"],
            "digits needs --length 8 (one time step per image row), got 9",
        ),
        (["--tasks", "sunspots", "--length", "249"], "sunspots needs a --length below 249, the nu"),
        (["--parameters", "5"], "--parameters 5 is too small for RNN: a model with 1 unit has 7 parameters"),
        (["--plot", "all.doc"], "--plot: expected a file name ending in ."),
        (["--json", "no/such/all.json"], "the folder no/such doesn't exist"),
        (["--runs", tmp_path / "file"], "file: File exists"),
    ):
        code, out, err = run_here("--cells", "rnn", "--tasks", "adding", "--steps", 1, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert err.startswith("unrolled: ")
        assert err.count("\n") == 1, err


def test_a_damaged_run_file(run_here: Any, tmp_path: Path) -> None:
    arguments = ("--cells", "rnn", *SMALL, "--steps", 2)
    assert run_here(*arguments)[0] == 0
    path = next((tmp_path / "runs").iterdir())
    content = path.read_text()
    for text in ("", "[]", "{}", content[:-20], content.replace('"seed": ', '"seed": 1')):
        path.write_text(text)
        code, _, err = run_here(*arguments)
        assert (code, err) == (
            2,
            f"unrolled: {path} is damaged or doesn't match its file name; delete it\n",
        )


def test_missing_packages_are_reported(run_here: Any, monkeypatch: Any) -> None:
    uninstalled = replace(TASKS["digits"], package="no_such_package")
    monkeypatch.setattr(
        "unrolled.cli.compare.command.TASKS", {"digits": uninstalled, "adding": TASKS["adding"]}
    )
    install = "digits, which needs no_such_package: pip install scikit-learn"
    code, out, err = run_here("--cells", "rnn", "--steps", 1)
    assert (code, err) == (0, f"unrolled: skipped {install}\n")
    assert "adding" in out
    code, out, err = run_here("--tasks", "adding,digits")
    assert (code, out, err) == (2, "", f"unrolled: --tasks: {install.replace(', which', '')}\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("task", "arguments", "margin"),
    [
        ("adding", "--length 400 --steps 8000", 0.1),
        ("copy", "--length 40 --steps 6000 --rate 0.005 --parameters 20000", 0.2),
    ],
)
def test_published_rankings(task: str, arguments: str, margin: float, tmp_path: Path) -> None:
    """Gated cells remember what an RNN forgets (Hochreiter & Schmidhuber, 1997; Arjovsky et al., 2016)."""
    path = tmp_path / "all.json"
    command = f"compare --cells RNN,LSTM,GRU --tasks {task} --seeds 1 {arguments} --runs {tmp_path}/runs"
    assert main.main([*command.split(), "--json", str(path)]) == 0
    (entry,) = json.loads(path.read_text())["tasks"]
    score = {cell["cell"]: cell["median"] for cell in entry["cells"]}
    assert score["RNN"] > entry["baseline"]["score"] * 0.95
    assert max(score["LSTM"], score["GRU"]) < score["RNN"] - margin

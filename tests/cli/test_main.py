"""The command line, run as users run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

import unrolled
from helpers import processes
from unrolled.cli import main


def run(*arguments: object, columns: int = 80) -> tuple[int, str, str]:
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": str(columns)}
    done = processes.run("-m", "unrolled", *arguments, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_here(capsys: Any) -> Any:
    """Run the command in this process, which is faster, for tests that don't need a process of their own."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.slow
def test_the_example() -> None:
    code, out, err = run("show")
    assert (code, err) == (0, "")
    assert out.startswith("RNN(2, 3, batch_first=True)\n")
    for line in (
        r"input_size=2 +number of features at each time step",
        r"hidden_size=3 +number of units \(size of the hidden state\)",
        r"batch_first=True +input shape: \(batch, time, features\) if True",
        r"weight_ih_l0 +3 × 2 +multiplies the input",
        r"weight_hh_l0 +3 × 3 +multiplies the previous hidden state",
        r"bias_ih_l0 +3 +added to the weighted input",
        r"input_sum = linear\(x, self.weight_ih, self.bias_ih\)",
        r"Input \(1, 4, 2\): 4 time steps, 2 features\n",
        r"Step 0\n +x +input +\[1.0000, 1.0000\]",
        r"input_sum +input pre-activation +\[-0.1290, 0.5513, 0.2439\]",
        r"hidden_sum +recurrent pre-activation +\[0.3875, 0.5334, -0.2906\]",
        r"h +hidden state \(output\) +\[0.2529, 0.7949, -0.0466\]",
        r"\[0.3066, 0.9938, 0.6123\]",
        r"\[0.2971, 0.9556, 0.1416\]",
        r"\[0.7421, 1.4364, 0.9806\]",
        r"\[0.5706, 0.9837, 0.4186\]",
        r"\[1.1777, 1.8790, 1.3490\]",
        r"\[0.7589, 0.9947, 0.5448\]",
        r"input_sum: 0.54068·1 − 0.10514·1 − 0.56450 = −0.1290",
        r"h: tanh\(−0.1290 \+ 0.3875\) = 0.2529",
        r"shapes: output \(1, 4, 3\), final h \(1, 1, 3\)",
        r"largest difference from torch.nn.RNN: \d\.\de[-+]\d\d",
    ):
        assert re.search(line, out), line


@pytest.mark.slow
def test_a_terminal_with_zero_columns_counts_as_80() -> None:
    assert run("show", columns=0) == run("show", columns=80)


@pytest.mark.slow
def test_the_lstm_shows_its_gates_and_both_states() -> None:
    code, out, _ = run("show", "--cell", "lstm")
    assert code == 0
    assert out.startswith("LSTM(2, 3, batch_first=True)\n")
    for name in (
        "i +input gate",
        "f +forget gate",
        "g +candidate",
        "o +output gate",
        "c +cell state",
        "h +hidden",
    ):
        assert len(re.findall(rf"^  {name}", out, re.MULTILINE)) == 4, name
    assert "shapes: output (4, 3), final h (1, 3), final c (1, 3)" in out
    assert float(re.search(r"largest difference from torch.nn.LSTM: (\S+)", out)[1]) < 1e-6


def test_the_gru(run_here: Any) -> None:
    code, out, _ = run_here("show", "--cell", "GRU")
    assert code == 0
    assert float(re.search(r"largest difference from torch.nn.GRU: (\S+)", out)[1]) < 1e-6


def test_labels_are_printed_with_the_steps(run_here: Any) -> None:
    code, out, _ = run_here("show", "--labels", "wörd")
    assert code == 0
    assert re.findall(r"^Step (.*)$", out, re.M) == ["0 'w'", "1 'ö'", "2 'r'", "3 'd'"]


@pytest.mark.parametrize("name", ["MinGRU", "mingru"])
def test_cell_names_in_any_case(name: str, run_here: Any) -> None:
    code, out, err = run_here("show", "--cell", name)
    assert (code, err) == (0, "")
    assert out.startswith("Recurrent(MinGRU, 2, 3, batch_first=True)\n")


def test_json_matches_torch(run_here: Any) -> None:
    code, out, _ = run_here("show", "--json", "--cell", "lstm", "--seed", "5", "--steps", "1,3")
    assert code == 0
    data = json.loads(out)
    torch.manual_seed(5)
    reference = nn.LSTM(2, 3, batch_first=True)
    for name, values in reference.state_dict().items():
        with torch.no_grad():
            values.copy_(values.round(decimals=2))
        assert torch.equal(torch.tensor(data["parameters"][name]), values)
    output, (h, c) = reference(torch.tensor(data["input"]))
    torch.testing.assert_close(torch.tensor(data["output"]), output)
    torch.testing.assert_close(torch.tensor(data["final_state"]["h"]), h)
    torch.testing.assert_close(torch.tensor(data["final_state"]["c"]), c)
    assert [step["step"] for step in data["steps"]] == [1, 3]
    torch.testing.assert_close(torch.tensor(data["steps"][1]["quantities"]["h"]), output[3])
    assert data["torch"] == "torch.nn.LSTM"
    assert data["largest_difference_from_torch"] < 1e-6


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Any]:
    model = nn.ModuleDict(
        {"encoder": nn.GRU(3, 60, 2, bidirectional=True), "tail": nn.RNN(3, 4, nonlinearity="relu")}
    )
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"model": model["tail"].state_dict()}, tmp_path / "tail.pt")
    x = numpy.random.default_rng(1).normal(size=(30, 3))
    numpy.savetxt(tmp_path / "x.csv", x, delimiter=",")
    return {"model": model, "path": tmp_path, "x": torch.tensor(x, dtype=torch.float32)}


@pytest.mark.slow
def test_weights_files(weights: Any, run_here: Any) -> None:
    folder = weights["path"]
    code, out, _ = run_here("show", folder / "w.safetensors")
    assert code == 0
    assert "encoder: GRU(3, 60, num_layers=2, bidirectional=True), float32" in out
    assert "tail: RNN(3, 4), float32" in out
    arguments = ("show", folder / "w.safetensors", "--input", folder / "x.csv", "--layer", "encoder")
    code, out, err = run(*arguments, columns=70)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 70
    assert "Step 29 (layer 1, backward)" in out
    assert "26 of 30 steps hidden; use --steps all" in out
    assert not re.search(r"\d…", out)  # no number is truncated
    assert float(re.search(r"largest difference from torch.nn.GRU: (\S+)", out)[1]) < 1e-5
    code, out, _ = run_here(*arguments, "--json", "--steps", "all")
    expected = weights["model"]["encoder"](weights["x"])[0]
    torch.testing.assert_close(torch.tensor(json.loads(out)["output"]), expected, atol=1e-5, rtol=0)
    assert len(json.loads(out)["steps"]) == 4 * 30


def test_assumed_options_are_reported(weights: Any, run_here: Any) -> None:
    arguments = ("show", weights["path"] / "tail.pt", "--input", weights["path"] / "x.csv")
    code, out, _ = run_here(*arguments)
    assert code == 0
    assert "Assuming nonlinearity=tanh, since the weights don't contain it. Use --option" in out
    code, out, _ = run_here(*arguments, "--option", "nonlinearity=relu", "--json")
    expected = weights["model"]["tail"](weights["x"])[0]
    torch.testing.assert_close(torch.tensor(json.loads(out)["output"]), expected)


def test_bad_usage_and_bad_input_get_one_line(weights: Any, run_here: Any, tmp_path: Path) -> None:
    folder = weights["path"]
    torch.save(nn.Linear(2, 3).state_dict(), folder / "linear.pt")
    torch.save(weights["model"], folder / "whole.pt")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:100])
    (folder / "text.csv").write_text("1,2,3\n4,five,6\n")
    (folder / "two.csv").write_text("1,2\n3,4\n")
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    (folder / "cells.py").write_text(CELLS)
    torch.save(nn.LSTM(3, 4).state_dict(), folder / "lstm.pt")
    torch.save({"weight_l0": torch.randn(4, 3)}, folder / "own.pt")
    parametrized = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    torch.save(parametrized.state_dict(), folder / "part.pt")
    x = ("--input", folder / "x.csv")
    for arguments, message in (
        ((), "required: COMMAND"),
        (("shw",), "invalid choice: 'shw'"),
        (("show", "--zzz"), "unrecognized arguments: --zzz"),
        (("show", "--cell", "lstn"), "unknown cell 'lstn'; expected rnn, lstm, gru, another cell in unr"),
        (("show", "--cell", f"{folder}/no.py:A"), "no.py (FileNotFoundError"),
        (("show", "--cell", f"{folder}/broken.py:A"), "broken.py (ModuleNotFoundError"),
        (("show", "--cell", "json:JSONDecoder"), "no subclass of unrolled.Cell named 'JSONDecoder'"),
        (("show", "--cell", "json:X"), "(cells found: none)"),
        (("show", "--cell", f"{folder}/cells.py"), "followed by :CLASS (cells found: Empty, Wrong"),
        (("show", folder / "own.pt"), "for a custom cell, add --cell FILE.py:CLASS"),
        (("show", folder / "linear.pt", "--cell", "lstm"), "no recurrent layer found\n"),
        (("show", "--option", "relu"), "--option: expected NAME=VALUE"),
        (("show", "--option", "proj_size=1"), "RNN has no option 'proj_size' (available: nonlinearity)"),
        (("show", "--option", "num_layers=2"), "--option: RNN has no option 'num_layers'"),
        (("show", "--option", "device=cuda"), "--option: RNN has no option 'device'"),
        (("show", "--cell", "gru", "--option", "a=1"), "GRU has no option 'a' (available: none)"),
        (("show", "--seed", 10**30), f"expected an integer from 0 to 2**63 - 1, got '{10**30}'"),
        (("show", "--seed", "x"), "expected an integer from 0 to 2**63 - 1, got 'x'"),
        (("show", "--option", "nonlinearity=selu"), "Unknown nonlinearity 'selu'"),
        (("show", "--steps", "3-1"), "expected time steps such as 0,2-5 or all, got '3-1'"),
        (("show", "--steps", "x"), "expected time steps such as 0,2-5 or all, got 'x'"),
        (("show", "--steps", "4"), "--steps: time step 4 is out of range; the last one is 3"),
        (("show", "--layer", "a"), "--layer needs a WEIGHTS file"),
        (("show", folder / "no.pt"), "no.pt: No such file or directory"),
        (("show", folder / "linear.pt"), "no recurrent layer found"),
        (("show", folder / "part.pt"), "; found weight_ih_l0, bias_ih_l0, bias_hh_l0, but other"),
        (("show", folder / "tail.pt", "--option", "relu=1"), "--option: RNN has no option 'relu'"),
        (("show", folder / "tail.pt", "--option", "nonlinearity=selu"), "Unknown nonlinearity 'selu'"),
        (("show", folder / "tail.pt", *x, "--option", "nonlinearty=relu"), "RNN has no option 'nonlinearty'"),
        (("show", folder / "lstm.pt", *x, "--option", "proj_size=2"), "the weights have proj_size=0 (LSTM("),
        (("show", folder / "lstm.pt", *x, "--option", "nonlinearity=relu"), "LSTM has no option 'nonl"),
        (("show", "--cell", f"{folder}/cells.py:Wrong"), "Wrong failed to run (RuntimeError: mat1 and mat2"),
        (("show", "--cell", f"{folder}/cells.py:Empty"), "Empty failed to run (NotImplementedError: Em"),
        (("show", folder / "whole.pt"), "refused, because loading it would run code"),
        (("show", folder / "cut.safetensors"), "not a safetensors file, or damaged"),
        (("show", folder / "w.safetensors", *x), "has 2 recurrent layers (encoder: GRU(3, 60"),
        (("show", folder / "w.safetensors", *x, "--layer", "no"), "no recurrent layer 'no' (available: enc"),
        (("show", folder / "tail.pt", "--input", folder / "text.csv"), "line 2, column 2: expected a number"),
        (("show", folder / "tail.pt", "--input", folder / "two.csv"), "2 columns, but the layer expects 3"),
        (("show", folder / "tail.pt", "--input", folder / "two.csv"), "with unrolled.record(model) as rec"),
        (("show", folder / "tail.pt", "--input", folder), "expected a .csv or .npy file"),
    ):  # fmt: skip
        code, out, err = run_here(*arguments)
        assert code == 2, arguments
        assert out == "" or "float32" in out
        assert message in err
        assert err.startswith("unrolled: ")
        assert err.count("\n") == 1, err


CELLS = """
import torch
import unrolled as ur


class Empty(ur.Cell):
    weight = ur.Param("hidden", "input")


class Wrong(Empty):
    def step(self, x, h):
        return x @ self.weight


class Inline(Empty):
    step = lambda self, x, h: torch.tanh(x @ self.weight.T + h)


class Kinds(Empty):
    def step(self, x, h):
        strength = x.mean(-1)
        heads = h.view(len(x), 3, 1)
        turned = torch.complex(h, x @ self.weight.T)
        noise = torch.rand_like(h)
        h = torch.tanh(turned.abs() + strength.unsqueeze(-1)) + noise
        return h
"""


@pytest.mark.parametrize("name", ["Inline", "Kinds"])
def test_unusual_steps_are_shown(run_here: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "cells.py").write_text(CELLS)
    code, out, err = run_here("show", "--cell", f"{tmp_path}/cells.py:{name}")
    assert (code, err) == (0, "")
    assert "torch.tanh(" in out
    code, out, _ = run_here("show", "--cell", f"{tmp_path}/cells.py:{name}", "--json")
    assert code == 0
    data = json.loads(out)
    assert "torch.tanh(" in data["equations"]
    if name == "Kinds":
        quantities = data["steps"][1]["quantities"]
        assert quantities["strength"] == 0.5
        assert numpy.shape(quantities["heads"]) == (3, 1)
        assert [complex(value).real for value in quantities["turned"]] == pytest.approx(
            data["steps"][0]["quantities"]["h"], rel=1e-5
        )


def test_nan_and_infinity_are_strings_in_json(run_here: Any, tmp_path: Path) -> None:
    module = nn.RNN(2, 3)
    with torch.no_grad():
        module.weight_ih_l0[0, 0] = torch.nan
        module.bias_hh_l0[1] = -torch.inf
    torch.save(module.state_dict(), tmp_path / "w.pt")
    (tmp_path / "x.csv").write_text("1,inf\n3,4\n")
    code, out, _ = run_here("show", tmp_path / "w.pt", "--input", tmp_path / "x.csv", "--json")

    def fail(name: str) -> None:
        raise AssertionError(f"{name} is not valid JSON")

    data = json.loads(out, parse_constant=fail)
    assert code == 0
    assert data["parameters"]["weight_ih_l0"][0][0] == "NaN"
    assert data["parameters"]["bias_hh_l0"][1] == "-Infinity"
    assert data["input"][0] == [1.0, "Infinity"]


def test_a_number_too_large_for_the_dtype_is_an_error(run_here: Any, tmp_path: Path) -> None:
    torch.save(nn.RNN(2, 3).state_dict(), tmp_path / "w.pt")
    torch.save(nn.RNN(2, 3, dtype=torch.float64).state_dict(), tmp_path / "wide.pt")
    (tmp_path / "x.csv").write_text("1,inf\n3,-1e39\n")
    message = f"unrolled: {tmp_path}/x.csv: -1e+39 is too large for float32, the dtype of the layer\n"
    x = ("--input", tmp_path / "x.csv")
    assert run_here("show", tmp_path / "w.pt", *x) == run_here("show", *x) == (2, "", message)
    assert run_here("show", tmp_path / "wide.pt", *x)[0] == 0


def test_nan_weights_are_shown(run_here: Any, tmp_path: Path) -> None:
    module = nn.LSTM(2, 3)
    with torch.no_grad():
        module.weight_ih_l0[0, 0] = torch.nan
    torch.save(module.state_dict(), tmp_path / "w.pt")
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    code, out, _ = run_here("show", tmp_path / "w.pt", "--input", tmp_path / "x.csv")
    assert code == 0
    assert "[nan, " in out
    assert "largest difference from torch.nn.LSTM: " in out


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m unrolled show --cell lstm --json | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '{\n  "layer', "")


def test_an_interrupt_gives_no_traceback(run_here: Any, tmp_path: Path) -> None:
    handling = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job of a shell ignores it
    )
    (tmp_path / "slow.py").write_text(f"import signal\n\n{handling}\nsignal.raise_signal(signal.SIGINT)\n")
    assert run_here("show", "--cell", f"{tmp_path}/slow.py:Cell") == (130, "", "")


@pytest.mark.slow
def test_a_closed_standard_output_is_no_error() -> None:
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m unrolled show >&-"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_an_ascii_terminal() -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "unrolled", "show"], capture_output=True, env=environment)
    assert done.returncode == 0
    assert b"0.54068*1 - 0.10514*1 - 0.56450 = -0.1290" in done.stdout


def test_version_and_help() -> None:
    assert run("--version")[:2] == (0, f"unrolled {unrolled.__version__}\n")
    assert "FILE.py:CLASS" in run("show", "--help")[1]

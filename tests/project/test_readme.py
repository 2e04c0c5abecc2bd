"""Every command and snippet of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
from torch import nn

import unrolled
from helpers import processes
from helpers.layer_pairs import NEEDS_COMPILER, QUIET
from helpers.terminal import Terminal

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NEEDING = [pytest.param(text, marks=NEEDS_COMPILER if "torch.export" in text else ()) for text in SNIPPETS]
COMMANDS = [
    pytest.param(command, marks=NEEDS_COMPILER if "build" in command.split() else ())
    for command in re.findall(r"^\$ (.*)$", README, re.MULTILINE)
    if "--watch" not in command
]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("snippet", NEEDING)
def test_snippet(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(snippet)
    done = processes.run("-W", "error", "-W", QUIET, "snippet.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for shown in re.findall(r"# (torch\.Size\(.*?\)|\('input_sum.*?\))$", snippet, re.MULTILINE):
        assert shown in done.stdout


def test_the_snippets_cell_opens_in_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "FILE.py").write_text(next(text for text in SNIPPETS if "class MGU" in text))
    (command,) = re.findall(r"`(unrolled show --cell FILE.*?)`", README)
    done = processes.run(BIN / "unrolled", *shlex.split(command)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "candidate = tanh" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(3, 4, num_layers=2), "decoder": nn.GRU(4, 5)})
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    numpy.savetxt(tmp_path / "sequence.csv", numpy.ones((6, 3)), delimiter=",")
    program, *arguments = shlex.split(command)
    done = processes.run(BIN / program, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LSTM" in done.stdout or "RNN(" in done.stdout


def test_the_command_that_is_watched() -> None:
    (command,) = re.findall(r"^\$ (.* --watch)$", README, re.MULTILINE)
    with Terminal([BIN / "unrolled", *shlex.split(command)[1:]]) as terminal:
        terminal.until(lambda lines: lines[0].startswith("LSTM") and lines[-1].startswith("q quit"))
        terminal.press("q")
        assert terminal.end() == 0


def test_make_demo(tmp_path: Path) -> None:
    assert "make demo" in README
    command = ["make", "demo", f"BIN={BIN}", "SHOWN=", f"RUNS={tmp_path / 'runs'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0.2529, 0.7949, -0.0466]" in done.stdout
    assert str(tmp_path / "runs") in done.stdout.replace("\n", "")
    assert list((tmp_path / "runs").rglob("*.json"))


def test_the_rooms_are_those_of_the_readme() -> None:
    rooms = README.split("along the data:")[1].split("`tests/`")[0]
    for path in Path(unrolled.__file__).parent.iterdir():
        if not path.name.startswith("_") and path.name != "py.typed":
            assert path.name in rooms, f"{path.name} is not in the README's architecture"
    for name in re.findall(r"[\w/]+\.py", rooms):
        assert (Path(unrolled.__file__).parent / name).exists(), f"the README speaks of {name}"

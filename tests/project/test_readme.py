"""Every command and snippet of the README runs, and every file that it names exists."""

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

from helpers import processes
from helpers.layer_pairs import FALLBACK_FILTER, NEEDS_COMPILER
from helpers.sampling import sample
from helpers.terminal import Terminal

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SAMPLED = sample(SNIPPETS, SNIPPETS[:2])
COMMANDS = [
    pytest.param(command, marks=NEEDS_COMPILER if "build" in command.split() else ())
    for command in re.findall(r"^\$ (.*)$", README, re.MULTILINE)
    if "--watch" not in command
]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("snippet", SAMPLED)
def test_snippet(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(snippet)
    done = processes.run("-W", "error", "-W", FALLBACK_FILTER, "snippet.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for shown in re.findall(r"# (torch\.Size\(.*?\)|\('input_sum.*?\))$", snippet, re.MULTILINE):
        assert shown in done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_command_that_is_watched() -> None:
    (command,) = re.findall(r"^\$ (.* --watch)$", README, re.MULTILINE)
    with Terminal([BIN / "unrolled", *shlex.split(command)[1:]]) as terminal:
        terminal.until(lambda lines: lines[0].startswith("LSTM") and lines[-1].startswith("q quit"))
        terminal.press("q")
        assert terminal.exit_code() == 0


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    assert "make demo" in README
    command = ["make", "demo", f"BIN={BIN}", "DEMO_READY=", f"RUNS={tmp_path / 'runs'}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0.2529, 0.7949, -0.0466]" in done.stdout
    assert str(tmp_path / "runs") in done.stdout.replace("\n", "")
    assert list((tmp_path / "runs").rglob("*.json"))


def test_length() -> None:
    """Details belong in docs/."""
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "src/unrolled/engines/README.md", "tests/README.md"]
)
def test_named_files_exist(name: str) -> None:
    """Links, and files and folders in code style or in indented tables."""
    text = (ROOT / name).read_text()
    folders = [
        ROOT,
        (ROOT / name).parent,
        ROOT / "src" / "unrolled",
        ROOT / "src" / "unrolled" / "engines" / "native",
    ]
    folders += [ROOT / "tests" / "helpers"]
    named = re.findall(r"\]\(([^)#]+)", text) + re.findall(r"`([\w/.]+(?:/|\.(?:py|md|js|css)))`", text)
    named += re.findall(r"^ {4}([\w/]+(?:/|\.py)) ", text, re.MULTILINE)
    assert named
    for path in set(named) - {"FILE.py", "build/docs/"}:
        assert any((folder / path).exists() for folder in folders), f"{name}: there is no {path}"

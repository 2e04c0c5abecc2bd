"""``unrolled show MODEL.py:FUNCTION``: a model of the user on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled as ur
from unrolled.cli import main
from unrolled.cli.model import _as_data, _details

CODE = """
import torch
import unrolled as ur

class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.reader = torch.nn.LSTM(3, 4)
        self.between = torch.nn.Linear(4, 2)
        self.writer = ur.GRU(2, 5)

    def forward(self, x, scale):
        x, _ = self.reader(scale * x)
        return self.writer(self.between(x))[0]

def build():
    torch.manual_seed(0)
    return Tagger(), torch.linspace(-1, 1, 18).view(6, 1, 3), 2

def small():
    return torch.nn.Sequential(ur.GRU(2, 3)), torch.ones(4, 1, 2)

def stuck():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4, bidirectional=True))
    with torch.no_grad():
        model[0].bias_ih_l0_reverse[4:6] = 12
    return model, torch.linspace(-1, 1, 18).view(6, 1, 3)

def broken():
    return Tagger(), torch.ones(2, 2)

def raises():
    raise RuntimeError("no weights")

def not_a_model():
    return 3
"""


@pytest.fixture
def show(capsys: Any, tmp_path: Path) -> Any:
    """A function that runs ``show`` with one of the models and returns the exit code, output and errors."""
    path = tmp_path / "tagger.py"
    path.write_text(CODE)

    def run(function: str, *arguments: str) -> tuple[int, str, str]:
        code = main.main(["show", f"{path}{function}", *arguments])
        return code, *capsys.readouterr()

    return run


def test_calls_in_order(show: Any) -> None:
    code, out, _ = show(":build")
    assert code == 0
    texts = [
        "Tagger reader: LSTM(3, 4), (6, 1, 3) → (6, 1, 4) initial state: zeros no problem found",
        "between: Linear(in_features=4, out_features=2, bias=True), (6, 1, 4) → (6, 1, 2) "
        "writer: GRU(2, 5), (6, 1, 2) → (6, 1, 5) initial state: zeros no problem found",
        "To show the values of a layer, add --layer NAME. For a page of the model, add --html FILE.",
    ]
    assert " ".join(out.split()) == " ".join(texts)
    code, out, _ = show(":build", "--json")
    calls = json.loads(out)["calls"]
    assert [call["name"] for call in calls] == ["reader", "between", "writer"]
    assert calls[2]["input_from"] == "between"
    assert calls[0]["final_state"] == "(1, 1, 4), (1, 1, 4)"


def test_a_problem_with_its_place(show: Any) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    model, x = namespace["stuck"]()
    with ur.record(model) as rec, torch.no_grad():
        model(x)
    (call,) = rec.call_order
    worst, *_ = rec["0"].health()
    assert (worst.layer, worst.direction) == (0, "backward")
    text = f"layer 0, backward: {worst.message}"
    assert _details(call)[1] == f"warning: {text}"
    assert _as_data(call)["health"][0] == text


def test_one_layer_of_a_model(show: Any, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    model, x, scale = namespace["build"]()
    with ur.record(model) as rec, torch.no_grad():
        model(x, scale)
    code, out, _ = show(":build", "--layer", "writer", "--json")
    assert code == 0
    assert json.loads(out)["output"] == rec["writer"].output.tolist()
    code, out, _ = show(":small", "--steps", "0")
    assert code == 0
    assert out.startswith("GRU(2, 3)")


@pytest.mark.slow
def test_page_of_a_model(show: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = show(":build", "--html", str(page), "--labels", "abcdef")
    assert (code, err) == (0, "")
    assert out == f"Wrote {page}, an interactive page for Tagger: reader, writer.\n"
    text = re.search(r'id="trace">(.*?)</script>', page.read_text(), re.DOTALL)
    assert text is not None
    data = json.loads(text[1])
    assert [one["labels"] for one in data["pages"]] == [list("abcdef")] * 2


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("", (), "expected FILE.py:FUNCTION, a function that returns a model and its inputs"),
        (":missing", (), "has no function named 'missing'"),
        (":raises", (), "failed to run (RuntimeError: no weights)"),
        (":broken", (), "the model failed to run (TypeError: "),
        (":not_a_model", (), "should return a model and its inputs, got int"),
        (":build", ("--layer", "other"), "no recurrent layer 'other'; available: reader, writer"),
        (":build", ("--steps", "0"), "the model has 2 recorded layers: choose one with --layer NAME"),
        (":build", ("--cell", "gru"), "--cell can't be combined with a model"),
    ],
)
def test_error_messages(show: Any, function: str, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = show(function, *arguments)
    assert (code, out) == (2, "")
    assert message in err.replace("\n", " ")

"""``unrolled show`` in unusual cases: hostile names in files, empty quantities, names of any width."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from torch import nn

import unrolled as ur
from unrolled.cli import example, main
from unrolled.cli.arguments import parse_cell
from unrolled.cli.stepper import _View

CELLS = """
import torch, unrolled as ur


class Still(ur.Cell):
    def step(self, x, h):
        return h


class Empty(ur.Cell):
    weight = ur.Param('hidden', 'input')

    def step(self, x, h):
        none = h[:, :0]
        h = torch.tanh(x @ self.weight.T) + none.sum()
        return h


class 門(ur.Cell):
    '''A gate with a name in Chinese.

    Quantities:
        忘却門: 忘れる割合
        h: the state
    '''

    weight = ur.Param('hidden', 'input')

    def step(self, x, h):
        忘却門 = torch.sigmoid(x @ self.weight.T)
        h = 忘却門 * (h + 1)
        return h


class Long(ur.Cell):
    weight = ur.Param('hidden', 'input')

    def step(self, x, h):
        a_name_longer_than_the_terminal_is_wide_that_would_leave_no_room_for_any_number = x @ self.weight.T
        h = a_name_longer_than_the_terminal_is_wide_that_would_leave_no_room_for_any_number + h
        return h
"""


@pytest.fixture
def cells(tmp_path: Path) -> str:
    (tmp_path / "cells.py").write_text(CELLS, encoding="utf-8")
    return f"{tmp_path}/cells.py"


@pytest.mark.parametrize("name", ["Still", "Empty"])
def test_cells_without_parameters_or_with_an_empty_quantity(cells: str, name: str, capsys: Any) -> None:
    assert main.main(["show", "--cell", f"{cells}:{name}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert ("Parameters\n  none\n" in out) == (name == "Still")
    assert main.main(["show", "--cell", f"{cells}:{name}", "--json"]) == 0
    step = json.loads(capsys.readouterr()[0])["steps"][0]
    assert set(step["explanations"]) == {"h"}
    assert step["quantities"].get("none", []) == []
    view = new_view(cells, name)
    view.do("down")
    assert [line for line in view.lines(80, 24) if line.plain.startswith("▸ h ")]


def new_view(cells: str, name: str) -> _View:
    layer, x = example.example(parse_cell(f"{cells}:{name}"), None, 0, {})
    return _View(ur.trace(layer, x), range(4), None)


@pytest.mark.parametrize(("name", "width"), [("門", 60), ("Long", 80), ("Long", 30)])
def test_numbers_are_aligned_for_names_of_any_width(cells: str, name: str, width: int) -> None:
    view = new_view(cells, name)
    lines = [line.plain for line in view.lines(width, 24)]
    first = next(k for k, line in enumerate(lines) if line.startswith("  unit"))
    ends = set()
    for line in lines[first + 1 : first + 4]:
        number = re.search(r"\d\.\d{4}", line)
        assert number, "the first number is not truncated"
        ends.add(cell_len(line[: number.end()]))
    assert len(ends) == 1, lines
    assert max(map(cell_len, lines)) <= width


def test_a_long_name_leaves_room_for_the_numbers(cells: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main(["show", "--cell", f"{cells}:Long", "--steps", "0"]) == 0
    step = capsys.readouterr()[0].split("Step 0\n")[1]
    layer, x = example.example(parse_cell(f"{cells}:Long"), None, 0, {})
    trace = ur.trace(layer, x)
    for name in trace.names:
        row = ", ".join(f"{value:.4f}" for value in trace[name][0, 0].tolist())
        assert f"[{row}]" in step


HOSTILE = "enc\x1b[31m\x9b2J\x07\r\u202ered\nnext"


@pytest.mark.slow
def test_control_characters_in_names_are_replaced(tmp_path: Path, capsys: Any) -> None:
    weights = {f"{HOSTILE}.{name}": value for name, value in nn.LSTM(3, 4).state_dict().items()}
    torch.save(weights, tmp_path / "one.pt")
    torch.save(
        {**weights, **{f"b.{k}": v for k, v in nn.GRU(3, 4).state_dict().items()}}, tmp_path / "two.pt"
    )
    torch.save(dict(list(weights.items())[:1]), tmp_path / "part.pt")
    (tmp_path / "x.csv").write_text("1,2,3\n")
    (tmp_path / "\x1bx.html").touch()
    x = ("--input", str(tmp_path / "x.csv"))
    for code, arguments in (
        (0, ["show", "one.pt"]),
        (0, ["show", "one.pt", *x]),
        (0, ["show", "one.pt", *x, "--html", str(tmp_path / "\x1bx.html")]),
        (0, ["show", "one.pt", *x, "--layer", HOSTILE]),
        (0, ["doctor", "one.pt"]),
        (2, ["show", "two.pt", *x]),
        (2, ["show", "part.pt"]),
        (2, ["show", "\x1b.pt"]),
    ):
        assert main.main([arguments[0], str(tmp_path / arguments[1]), *arguments[2:]]) == code, arguments
        out, err = capsys.readouterr()
        assert [letter for letter in out + err if unicodedata.category(letter) == "Cc"] == ["\n"] * (
            out + err
        ).count("\n")
        assert "\u202e" not in out + err
        assert "␛" in out + err or "--layer" in arguments
    assert main.main(["show", str(tmp_path / "one.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr()[0]) == {"layers": {HOSTILE: "LSTM(3, 4)"}}

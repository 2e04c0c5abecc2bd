"""``unrolled show --html``: the page of a trace from the command line."""

from __future__ import annotations

import base64
import json
import re
import webbrowser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import unrolled as ur
from unrolled.cli import main


@pytest.fixture
def page(capsys: Any, tmp_path: Path) -> Any:
    """A function that runs ``show --html`` on an LSTM with ten steps and returns the data in the page."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    x = numpy.random.default_rng(1).normal(size=(10, 3))
    torch.save(torch.nn.ModuleDict({"encoder": model}).state_dict(), tmp_path / "w.pt")
    numpy.save(tmp_path / "x.npy", x)
    weights = (str(tmp_path / "w.pt"), "--input", str(tmp_path / "x.npy"))

    def write(*arguments: object) -> Any:
        path = tmp_path / "page.html"
        assert main.main(["show", *weights, "--html", str(path), *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == (f"Wrote {path}, an interactive page for LSTM(3, 4).\n", "")
        return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>',
                                    path.read_text(), re.DOTALL)[1])  # fmt: skip

    write.trace = ur.trace(model, torch.tensor(x, dtype=torch.float32))
    return write


def test_the_page_contains_the_numbers(page: Any) -> None:
    data = page()
    assert (data["labels"], data["inputs"]) == (None, "numbers")
    [layer] = data["layers"]
    assert layer["length"] == 10
    diagram = layer["diagram"]
    values = numpy.frombuffer(base64.b64decode(diagram["values"]["data"]), "<f4").reshape(10, -1)
    starts = numpy.cumsum([0, *diagram["sizes"]])
    indices = {node["name"]: node["value"] for node in diagram["nodes"] if node["name"]} | {
        "x": diagram["inputValue"]
    }
    assert {*indices} == {"i", "f", "g", "o", "c", "h", "x"}
    for name, index in indices.items():
        expected = page.trace.input if name == "x" else page.trace[name][:, 0]
        assert values[:, starts[index] : starts[index + 1]].tolist() == expected.tolist(), name


def test_the_picture_of_the_cell(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "cell.svg"
    assert main.main(["show", "--cell", "gru", "--steps", "1", "--plot", str(path)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"Wrote {path}, a picture of one step of GRU(2, 3, batch_first=True).\n", "")
    assert path.read_text(encoding="utf-8").startswith("<svg")
    assert main.main(["show", "--plot", str(tmp_path / "cell.png")]) == 2
    assert "expected a file name ending in .svg" in capsys.readouterr().err


def test_labels_and_image_input(page: Any, tmp_path: Path) -> None:
    assert page("--labels", "</script>!")["labels"] == list("</script>!")
    assert page("--labels", "x" * 10, "--as", "image")["inputs"] == "image"
    lines = [f"label {k}" for k in range(8)] + ["", "ein Wort mit ß"]
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert page("--labels", tmp_path / "labels.txt")["labels"] == lines


def test_titles(page: Any) -> None:
    assert page()["title"] == "w.pt: encoder"
    assert page("--title", "Mine")["title"] == "Mine"


def test_open_starts_the_browser(page: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    (tmp_path / "browser").chmod(0o755)
    monkeypatch.setenv("BROWSER", str(tmp_path / "browser"))
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # look up the browser again, with this variable
    page("--open")
    assert (tmp_path / "opened").read_text().strip() == (tmp_path / "page.html").as_uri()


def test_a_quantity_that_a_page_cannot_show_gives_a_warning(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "cells.py").write_text(
        "import torch, unrolled as ur\n\n\n"
        "class Turned(ur.Cell):\n"
        "    weight = ur.Param('hidden', 'input')\n\n"
        "    def step(self, x, h):\n"
        "        turned = torch.complex(h, x @ self.weight.T)\n"
        "        h = turned.abs()\n"
        "        return h\n"
    )
    path = tmp_path / "page.html"
    assert main.main(["show", "--cell", f"{tmp_path}/cells.py:Turned", "--html", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Wrote {path}, an interactive page for Recurrent(Turned, ")
    assert err == "unrolled: turned is not shown because its values are complex.\n"


def test_errors_are_one_line(page: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "latin.txt").write_bytes(b"\xfc\n" * 10)
    html = ("--html", tmp_path / "no.html")
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    for arguments, message in (
        (("--html", tmp_path / "no" / "page.html"), "no: the folder doesn't exist"),
        (("--html", tmp_path), "expected the path of a file, but this is a folder"),
        (
            (*html, "--labels", "hello"),
            "'hello' is not a file and has 5 characters, but the sequence has 4 time",
        ),
        ((*html, "--labels", tmp_path / "three.txt"), "three.txt has 3 lines, but the sequence has 4 time"),
        (
            (*html, "--labels", tmp_path / "latin.txt"),
            "latin.txt: expected UTF-8 text with one label per line",
        ),
        ((*html, "--labels", ""), "'' is not a file and has 0 characters"),
        ((*html, "--steps", "0"), "--steps can't be combined with --html: the page always shows all steps"),
        ((*html, "--as", "picture"), "argument --as: invalid choice: 'picture'"),
        ((*html, "--json"), "argument --json: not allowed with argument --html"),
        ((*html, "--watch"), "argument --watch: not allowed with argument --html"),
        (("--open",), "--open needs --html FILE"),
        (("--labels", "abcd", "--json"), "--labels can't be combined with --json"),
        (("--labels", "abc"), "'abc' is not a file and has 3 characters, but the sequence has 4 time steps"),
        (("--title", "Mine"), "--title needs --html FILE"),
        (("--as", "image", "--json"), "--as needs --html FILE"),
        ((tmp_path / "w.pt", *html), "--html needs an input sequence: add --input FILE"),
    ):
        assert main.main(["show", *map(str, arguments)]) == 2, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), arguments
        assert err.startswith("unrolled: ")
        assert message in err
        assert not (tmp_path / "no.html").exists()
    assert main.main(["show", "--html", str(tmp_path / "page.html"), "--open"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(
        f"Wrote {tmp_path}/page.html, an interactive page for RNN(2, 3, batch_first=True).\n"
    )
    assert err == "unrolled: --open: can't start a browser; open the file manually\n"

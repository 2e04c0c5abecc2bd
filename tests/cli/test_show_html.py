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
    """The contents of the page that ``show`` writes with these arguments, of an LSTM and ten steps."""
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
        assert (out, err) == (f"Wrote {path}: LSTM(3, 4) as a page to look at in a browser.\n", "")
        return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>',
                                    path.read_text(), re.DOTALL)[1])  # fmt: skip

    write.trace = ur.trace(model, torch.tensor(x, dtype=torch.float32))
    return write


def test_the_page_holds_the_numbers_and_the_line_says_where_it_is(page: Any) -> None:
    data = page()
    assert (data["labels"], data["inputs"], data["length"]) == (None, "numbers", 10)
    quantities = {quantity["key"].split()[-1]: quantity for quantity in data["parts"][0]["quantities"]}
    for name in page.trace.names:
        values = numpy.frombuffer(base64.b64decode(quantities[name]["values"]["data"]), "<f4")
        assert values.tolist() == page.trace[name].flatten().tolist(), name


def test_labels_are_characters_or_lines_and_the_input_an_image(page: Any, tmp_path: Path) -> None:
    assert page("--labels", "</script>!")["labels"] == list("</script>!")
    assert page("--labels", "x" * 10, "--as", "image")["inputs"] == "image"
    lines = [f"label {k}" for k in range(8)] + ["", "ein Wort mit ß"]
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert page("--labels", tmp_path / "labels.txt")["labels"] == lines


def test_the_title_is_the_file_and_the_layer_or_what_is_given(page: Any) -> None:
    assert page()["title"] == "w.pt: encoder"
    assert page("--title", "Mine")["title"] == "Mine"


def test_the_browser_opens_it(page: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    (tmp_path / "browser").chmod(0o755)
    monkeypatch.setenv("BROWSER", str(tmp_path / "browser"))
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # found anew, by this variable
    page("--open")
    assert (tmp_path / "opened").read_text().strip() == (tmp_path / "page.html").as_uri()


def test_what_the_page_leaves_out_is_said(tmp_path: Path, capsys: Any) -> None:
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
    assert out.startswith(f"Wrote {path}: Recurrent(Turned, ")
    assert err == "unrolled: turned is not shown: its numbers are complex.\n"


def test_what_cannot_be_done_gets_one_sentence(
    page: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "latin.txt").write_bytes(b"\xfc\n" * 10)
    html = ("--html", tmp_path / "no.html")
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    for arguments, message in (
        (("--html", tmp_path / "no" / "page.html"), "no: there is no such folder"),
        (("--html", tmp_path), "a folder is there, give the path of a file"),
        (
            (*html, "--labels", "hello"),
            "'hello' is no file and has 5 characters, but the sequence has 4 time",
        ),
        ((*html, "--labels", tmp_path / "three.txt"), "three.txt has 3 lines, but the sequence has 4 time"),
        ((*html, "--labels", tmp_path / "latin.txt"), "latin.txt: expected a text in UTF-8, a label on each"),
        ((*html, "--labels", ""), "'' is no file and has 0 characters"),
        ((*html, "--steps", "0"), "--steps chooses what is printed, and --html writes every step"),
        ((*html, "--as", "picture"), "argument --as: invalid choice: 'picture'"),
        ((*html, "--json"), "argument --json: not allowed with argument --html"),
        ((*html, "--watch"), "argument --watch: not allowed with argument --html"),
        (("--open",), "--open says how a page is to be, and none is asked for: give --html FILE too"),
        (("--labels", "abcd", "--json"), "--labels names time steps for a reader, and --json"),
        (("--labels", "abc"), "'abc' is no file and has 3 characters, but the sequence has 4 time steps"),
        (("--title", "Mine"), "--title says how a page is to be"),
        (("--as", "image", "--json"), "--as says how a page is to be"),
        ((tmp_path / "w.pt", *html), "--html shows a sequence: give one with --input FILE"),
    ):
        assert main.main(["show", *map(str, arguments)]) == 2, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), arguments
        assert err.startswith("unrolled: ")
        assert message in err
        assert not (tmp_path / "no.html").exists()
    assert main.main(["show", "--html", str(tmp_path / "page.html"), "--open"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"Wrote {tmp_path}/page.html: RNN(2, 3, batch_first=True) as a page")
    assert err == "unrolled: --open: there is no browser that can be started here: open the file yourself\n"

"""The table of all cells: what the site shows of each is read from the cell itself, and from its tests."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from html import escape
from pathlib import Path

import unrolled as ur
from unrolled.equations import formulas

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from conformance.other_cells import DEPARTS, LIBRARIES, PEERS


def table() -> str:
    """The table as HTML, a row for each cell."""
    rows = "\n".join(_row(name) for name in sorted(ur.cells.__all__, key=str.lower))
    head = "<thead><tr><th>cell</th><th>equations of a step</th></tr></thead>"
    return f'<table class="cells">\n{head}\n<tbody>\n{rows}\n</tbody>\n</table>\n'


def _row(name: str) -> str:
    cell = getattr(ur.cells, name)
    words = (inspect.getdoc(cell) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    options = ", ".join(f"{option}={value!r}" for option, value in cell.options().items())
    facts = {
        "states": ", ".join(f"{state} ({size})" for state, size in _states(cell).items()),
        "parameters": _count(cell),
        "options": f"<code>{escape(options)}</code>" if options else "",
        "time beside LSTM": ", ".join(
            f"{mode} {times[name]:.2f}" for mode, times in _times().items() if name in times
        ),
        "checked against": _checked(name),
    }
    told = "".join(f"<dt>{title}</dt><dd>{fact}</dd>" for title, fact in facts.items() if fact)
    equations = "".join(f"<div>{one.math}</div>" for one in formulas.formulas(cell(8, 8)))
    return (
        f'<tr id="{name}"><td><code>{name}</code><p>{_linked(words)}</p><dl>{told}</dl></td>'
        f"<td>{equations}</td></tr>"
    )


@functools.cache
def _times() -> dict[str, dict[str, float]]:
    """What ``benchmarks/cells.py --keep`` has measured: by mode, each cell's time in units of the LSTM's."""
    kept = json.loads((Path(__file__).parents[1] / "benchmarks" / "cells.json").read_text())
    return {mode: kept[f"{mode}, 32×100×128×128"] for mode in ("inference", "training")}


def _states(cell: type[ur.Cell]) -> dict[str, str]:
    declared = cell.state if isinstance(cell.state, dict) else dict.fromkeys(cell.state, "hidden")
    return {name: str(size).replace("hidden", "n") for name, size in declared.items()}


def _linked(words: str) -> str:
    link = r'<a href="https://arxiv.org/abs/\1">arXiv:\1\2</a>'
    return re.sub(r"arXiv:(\d+\.\d+)(v\d+)?", link, escape(words))


def _count(cell: type[ur.Cell]) -> str:
    """How many parameters there are with n units and n inputs, as a polynomial of n."""

    def of(n: int) -> int:
        shapes = cell(n, n).shapes().values()
        return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in shapes)

    at, twice, thrice = of(64), of(128), of(192)
    square = (thrice - 2 * twice + at) // (2 * 64**2)
    line = (twice - at - square * (128**2 - 64**2)) // 64
    rest = at - square * 64**2 - line * 64
    terms = [(square, " n²"), (line, " n"), (rest, "")]
    return " + ".join(f"{number}{power}" for number, power in terms if number)


def _checked(name: str) -> str:
    """Against what tests compare it: other libraries, and the paper's equations in NumPy."""
    cases = {case.split()[0]: library for case, (library, _) in PEERS.items()}
    others = [*LIBRARIES.get(name, ()), *([cases[name]] if name in cases and name not in DEPARTS else [])]
    if name not in ("RNN", "LSTM", "GRU"):
        others.append("NumPy")
    departs = f"; {cases[name]} departs: {escape(DEPARTS[name])}" if name in DEPARTS else ""
    return ", ".join(others) + departs

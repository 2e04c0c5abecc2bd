"""Generate the table of all cells from the cells themselves and from their tests."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from html import escape
from pathlib import Path

import torch

import unrolled as ur
from unrolled.equations import formulas

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from conformance.other_cells import DEPARTS, LIBRARIES, PEERS


def table() -> str:
    """Return the table as HTML, with one row for each cell."""
    rows = "\n".join(_row(name) for name in sorted(ur.cells.__all__, key=str.lower))
    head = "<thead><tr><th>cell</th><th>equations of a step</th></tr></thead>"
    return f'<table class="cells">\n{head}\n<tbody>\n{rows}\n</tbody>\n</table>\n'


def _row(name: str) -> str:
    cell = getattr(ur.cells, name)
    summary = (inspect.getdoc(cell) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    options = ", ".join(f"{option}={value!r}" for option, value in cell.options().items())
    facts = {
        "states": ", ".join(f"{state} ({size})" for state, size in _states(cell).items()),
        "parameters": _count(cell),
        "options": f"<code>{escape(options)}</code>" if options else "",
        "time relative to LSTM": ", ".join(
            f"{mode} {times[name]:.2f}" for mode, times in _times().items() if name in times
        ),
        "tested against": _references(name),
    }
    description = "".join(f"<dt>{title}</dt><dd>{fact}</dd>" for title, fact in facts.items() if fact)
    equations = "".join(f"<div>{one.math}</div>" for one in formulas.formulas(cell(8, 8)))
    return (
        f'<tr id="{name}"><td><code>{name}</code><p>{_with_links(summary)}</p><dl>{description}</dl></td>'
        f"<td>{equations}{_drawing(cell)}</td></tr>"
    )


def _drawing(cell: type[ur.Cell]) -> str:
    """Return the drawing of a step of a small layer with random weights."""
    torch.manual_seed(0)
    layer = ur.Recurrent(cell, 3, 4)
    t = ur.trace(layer, torch.randn(4, 3))
    svg = t.plot("cell", unit=1).svg
    for hidden in ("title", "style"):  # Sphinx tries to highlight the words of a search in their texts, too
        svg = svg.replace(f"<{hidden}>", f'<{hidden} class="nohighlight">')
    return f"<figure>{svg}</figure>"


@functools.cache
def _times() -> dict[str, dict[str, float]]:
    """Return the times saved by ``benchmarks/cells.py --keep``: by mode and cell, relative to the LSTM."""
    measurements = json.loads((Path(__file__).parents[1] / "benchmarks" / "cells.json").read_text())
    return {mode: measurements[f"{mode}, 32×100×128×128"] for mode in ("inference", "training")}


def _states(cell: type[ur.Cell]) -> dict[str, str]:
    declared = cell.state if isinstance(cell.state, dict) else dict.fromkeys(cell.state, "hidden")
    return {name: str(size).replace("hidden", "n") for name, size in declared.items()}


def _with_links(text: str) -> str:
    link = r'<a href="https://arxiv.org/abs/\1">arXiv:\1\2</a>'
    text = re.sub(r"arXiv:(\d+\.\d+)(v\d+)?", link, escape(text))
    return re.sub(r"doi:(10\.\d+/[\w./-]*\w)", r'<a href="https://doi.org/\1">doi:\1</a>', text)


def _count(cell: type[ur.Cell]) -> str:
    """Return the number of parameters for n units and n inputs, as a polynomial of n."""

    def count(n: int) -> int:
        shapes = cell(n, n).shapes().values()
        return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in shapes)

    # Solve for the coefficients of the polynomial from its values at three sizes.
    at_64, at_128, at_192 = count(64), count(128), count(192)
    quadratic = (at_192 - 2 * at_128 + at_64) // (2 * 64**2)
    linear = (at_128 - at_64 - quadratic * (128**2 - 64**2)) // 64
    constant = at_64 - quadratic * 64**2 - linear * 64
    terms = [(quadratic, " n²"), (linear, " n"), (constant, "")]
    return " + ".join(f"{coefficient}{power}" for coefficient, power in terms if coefficient)


def _references(name: str) -> str:
    """List what the tests compare a cell with: other libraries, and the paper's equations in NumPy."""
    cases = {case.split()[0]: library for case, (library, _) in PEERS.items()}
    others = [*LIBRARIES.get(name, ()), *([cases[name]] if name in cases and name not in DEPARTS else [])]
    if name not in ("RNN", "LSTM", "GRU"):
        others.append("NumPy")
    departs = f"; {cases[name]} departs: {escape(DEPARTS[name])}" if name in DEPARTS else ""
    return ", ".join(others) + departs

"""Formulas as text, and cells that are generated from the body of a step."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_module_numbers = itertools.count()
HEAD = """
import torch
import torch as th
import torch.nn.functional as fn
from torch.nn import functional as F
from torch import relu, sigmoid, tanh
from torch.nn.functional import linear, softplus
import unrolled as ur

SCALE = w_t = V = 2.5

def third(value):
    return value / 3

def silu(value):
    return value

def square(value):
    return value

class GeneratedCell(ur.Cell):
    state = ("h", "c")
    W = ur.Param("hidden", "input")
    U = ur.Param("hidden", "hidden")
    V = ur.Param("hidden", "hidden")
    b = ur.Param("hidden")
    kind: str = "tanh"
    k: int = 1
    rate: float = -0.5
    fine: float = 0.123456789

    def both(self, x, h, c):
        return h, c

    def step(self, x, h, c):
"""


def to_text(math: str) -> str:
    """Return a formula as text: _ for subscripts, ^ for superscripts, ~ after its letter, / for fractions."""

    def text(element: ElementTree.Element) -> str:
        parts = [text(part) for part in element]
        match element.tag:
            case "msub":
                return f"{parts[0]}_{{{parts[1]}}}"
            case "msup":
                return f"{parts[0]}^{{{parts[1]}}}"
            case "msubsup":
                return f"{parts[0]}^{{{parts[2]}}}_{{{parts[1]}}}"
            case "mfrac":
                return f"({parts[0]})/({parts[1]})"
            case "mspace":
                return " "
        return (element.text or "").replace("\u2061", "") + "".join(parts)

    return text(ElementTree.fromstring(math))


def build_cell(folder: Path, body: str) -> Any:
    """Write a module with a cell whose step has this body, and return the cell."""
    path = folder / f"generated_{next(_module_numbers)}.py"
    path.write_text(HEAD + textwrap.indent(textwrap.dedent(body).strip(), " " * 8) + "\n")
    namespace: dict[str, Any] = {"__name__": "builtins"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["GeneratedCell"]

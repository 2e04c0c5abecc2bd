"""Formulas of published cells, and that they are valid MathML."""

from __future__ import annotations

import inspect
import re
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from formula_helpers import to_text
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur
from unrolled.equations.formulas import formulas


def read(cell: type[ur.Cell], **options: Any) -> list[str]:
    return [to_text(one.math) for one in formulas(cell(2, 3, **options))]


def test_equations_of_torch_layers_match_its_documentation() -> None:
    assert read(ur.cells.RNN) == [
        "input_{sum,t}=W_{ih} x_{t}+b_{ih}",
        "hidden_{sum,t}=W_{hh} h_{t−1}+b_{hh}",
        "h_{t}=tanh(input_{sum,t}+hidden_{sum,t})",
    ]
    assert read(ur.cells.RNN, nonlinearity="relu", bias=False)[::2] == [
        "input_{sum,t}=W_{ih} x_{t}",
        "h_{t}=ReLU(input_{sum,t}+hidden_{sum,t})",
    ]
    assert read(ur.cells.GRU)[4:] == [
        "r_{t}=σ(input_{r,t}+hidden_{r,t})",
        "z_{t}=σ(input_{z,t}+hidden_{z,t})",
        "n_{t}=tanh(input_{n,t}+r_{t}⊙hidden_{n,t})",
        "h_{t}=(1−z_{t})⊙n_{t}+z_{t}⊙h_{t−1}",
    ]
    assert read(ur.cells.LSTM)[2:] == [
        "[i~_{t},f~_{t},g~_{t},o~_{t}]=input_{sum,t}+hidden_{sum,t}",
        "i_{t}=σ(i~_{t})",
        "f_{t}=σ(f~_{t})",
        "g_{t}=tanh(g~_{t})",
        "o_{t}=σ(o~_{t})",
        "c_{t}=f_{t}⊙c_{t−1}+i_{t}⊙g_{t}",
        "h_{t}=o_{t}⊙tanh(c_{t})",
    ]


def test_options_change_the_formulas() -> None:
    assert read(ur.cells.LSTM, proj_size=2)[-2:] == ["h~_{t}=o_{t}⊙tanh(c_{t})", "h_{t}=W_{hr} h~_{t}"]


class OtherNotations(ur.Cell):
    rate: float = 0.25
    U = ur.Param("hidden", "hidden")
    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        """A docstring is not an equation."""
        alpha = torch.exp(-self.rate * h.abs())
        both = torch.cat((h, x), dim=-1)
        (u,) = (x @ self.weight.T,)
        u /= 2
        power: torch.Tensor = -(u**2) - (h - alpha)
        if x.shape[0] > 5:
            power = power * 2
        return F.layer_norm(power + both[:, :3], (self.hidden,)) + h @ (self.U - self.U.T)


def test_other_notations() -> None:
    assert read(OtherNotations) == [
        "α_{t}=e^{−0.25·abs(h_{t−1})}",
        "both_{t}=[h_{t−1};x_{t}]",
        "u~_{t}=x_{t} W^{⊤}",
        "u_{t}=(u~_{t})/(2)",
        "power~_{t}=−u_{t}^{2}−(h_{t−1}−α_{t})",
        "if x.shape[0] > 5:\n    power = power * 2",
        "h_{t}=layer norm(power_{t}+both[:, :3])+h_{t−1} (U−U^{⊤})",
    ]
    lines = [(one.names, one.first_line, one.last_line) for one in formulas(OtherNotations(2, 3))]
    assert lines[0] == (("alpha",), 0, 0)
    assert lines[5] == (("power",), 5, 6)


@pytest.mark.parametrize("name", ur.cells.__all__)
def test_every_traced_quantity_has_a_formula(name: str) -> None:
    cell = getattr(ur.cells, name)
    equations = formulas(cell(2, 3))
    assert all(ElementTree.fromstring(equation.math).tag == "math" for equation in equations)
    if "for " not in inspect.getsource(cell.step):  # a loop is shown as code
        assert not any("<mtext>" in equation.math for equation in equations if "None" not in equation.math)
    names = {name for equation in equations for name in equation.names}
    assert set(ur.trace(ur.Recurrent(cell, 2, 3), torch.randn(2, 2)).names) <= names


def test_no_formulas_without_source() -> None:
    namespace: dict[str, Any] = {"ur": ur, "linear": linear, "nn": nn}
    exec("class GeneratedCell(ur.Cell):\n    def step(self, x, h):\n        return h + x", namespace)
    assert formulas(namespace["GeneratedCell"](2, 2)) == []
    assert re.search("GeneratedCell", repr(namespace["GeneratedCell"]))

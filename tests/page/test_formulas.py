"""The formulas that the page writes: they have parentheses where the step needs them, and no others."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

import unrolled as ur
from helpers.evaluator import needs_javascript, run_javascript
from unrolled.page import layer_data
from unrolled.page.contents import page_data

pytestmark = [needs_javascript, pytest.mark.usefixtures("without_drawings")]

# Lines of a step, and the formulas of r, s and h.
STEPS = {
    "h = W(x) + U(h * self.a)": "h = W x_t + u (h_t−1 ⊙ a)",
    "h = U(r + h)": "h = u (r_t + h_t−1)",
    "h = U(r * h, self.b) * (r + h)": "h = (u (r_t ⊙ h_t−1) + b) ⊙ (r_t + h_t−1)",
    "h = U(U(h)) + U(torch.tanh(r))": "h = u (u h_t−1) + u tanh(r_t)",
    "h = r * (U(h) + self.b)": "h = r_t ⊙ (u h_t−1 + b)",
    "h = r * U(h) - W(x) * r": "h = r_t ⊙ u h_t−1 − W x_t ⊙ r_t",
    "h = r - (h - 2 * r) * r": "h = r_t − (h_t−1 − 2 r_t) ⊙ r_t",
    "s = r + h; h = r - s + torch.tanh(s)": "s = r_t + h_t−1; h = r_t − s_t + tanh(s_t)",
    "s = r + h; h = torch.tanh(s) - (h - r)": "s = r_t + h_t−1; h = tanh(s_t) − h_t−1 + r_t",
    "h = r / (h * r) + r / (h / (1 + r))": "h = r_t / (h_t−1 ⊙ r_t) + r_t / (h_t−1 / (r_t + 1))",
    "h = -(h + r) * r": "h = (−h_t−1 − r_t) ⊙ r_t",
    "h = r + (-h) * r": "h = r_t + (−h_t−1 ⊙ r_t)",
    "h = r * -0.5 - h * -self.a": "h = −0.5 r_t − h_t−1 ⊙ (−a)",
    "h = h + r * -0.5 * h": "h = h_t−1 + (−0.5 r_t ⊙ h_t−1)",
    "h = r * h / (self.a * self.b)": "h = r_t ⊙ h_t−1 / (a b)",
    "h = r * (self.a - (self.b - 1)) * h": "h = r_t ⊙ (a − (b − 1)) ⊙ h_t−1",
    "h = r * (-(self.a + self.b)) - h": "h = r_t ⊙ (−(a + b)) − h_t−1",
    "h = (1 - self.a) * h + self.a * r": "h = h_t−1 ⊙ (1 − a) + r_t ⊙ a",
    "h = torch.tanh(r) ** 2 + (r + h).abs()": "h = (tanh(r_t))² + |r_t + h_t−1|",
    "h = torch.where(h > 0.5, r, h + 1) * r": "h = (if h_t−1 > 0.5 then r_t else h_t−1 + 1) ⊙ r_t",
    "h = (h >= r) * r - torch.maximum(h + r, self.b - r)": (
        "h = (h_t−1 ≥ r_t) ⊙ r_t − max(h_t−1 + r_t, b − r_t)"
    ),
}


@pytest.fixture
def without_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawings of the pages, since most of the time is spent on their layout."""
    monkeypatch.setattr(layer_data, "drawing_data", lambda diagram: None)


def own_layer(step: str) -> ur.Recurrent:
    """Return a layer of a cell with the given lines of its step. They can read ``r``."""
    lines = "\n".join(step.split("; "))
    code = f"def step(self, x, h):\n{textwrap.indent(HEAD + lines, '    ')}\n    return h\n"
    namespace = {"torch": torch}
    exec(code, namespace)
    parameters = {
        "weight": ur.Param("hidden", "input"),
        "u": ur.Param("hidden", "hidden"),
        "a": ur.Param("hidden"),
        "b": ur.Param("hidden"),
    }
    return ur.Recurrent(type("Own", (ur.Cell,), {**parameters, "step": namespace["step"]}), 2, 3)


HEAD = """\
def W(x): return torch.nn.functional.linear(x, self.weight)
def U(h, bias=None): return torch.nn.functional.linear(h, self.u, bias)
r = torch.sigmoid(W(x))
"""


def equations(layers: list[ur.Recurrent], folder: Path) -> list[list[str]]:
    """Return the equations of each layer's step, as the page writes them."""
    torch.manual_seed(0)
    traces = [ur.trace(layer, torch.randn(3, layer.input_size)) for layer in layers]
    pages = [page_data(trace, None, None, "numbers", None, 3_000_000)["layers"] for trace in traces]
    return [parts[0] for parts in run_javascript("equations", pages, folder)]


def test_parentheses(tmp_path: Path) -> None:
    found = equations([own_layer(step) for step in STEPS], tmp_path)
    for (step, expected), lines in zip(STEPS.items(), found, strict=True):
        assert "; ".join(line for line in lines if line[0] in "sh") == expected, step


def test_an_input_that_the_step_computes_again_has_its_own_symbol(tmp_path: Path) -> None:
    layer = ur.Recurrent(ur.cells.IntersectionRNN, 2, 3)
    first, second, *_ = equations([layer], tmp_path)[0]
    assert (first, second[: second.index(" +")]) == ("x′ = W_x x_t", "g_h = σ(W_ih[g_h] x′_t")


@pytest.mark.slow
def test_no_cell_has_two_signs_in_a_row(tmp_path: Path) -> None:
    layers = [ur.Recurrent(getattr(ur.cells, name), 2, 3) for name in ur.cells.__all__]
    for line in (line for lines in equations(layers, tmp_path) for line in lines):
        assert line.count("(") == line.count(")")
        assert not re.search("[+−⊙/] −", line), line

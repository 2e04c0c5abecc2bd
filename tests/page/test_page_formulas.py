"""The formulas that the page writes: they have parentheses where the step needs them, and no others."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from page_helpers import WithSoftmax

import unrolled as ur
from helpers.evaluator import needs_javascript, run_javascript
from unrolled.diagram.symbols import symbol
from unrolled.diagram.text import symbol as split_name
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
    "h = r * h / (self.a * self.b)": "h = r_t ⊙ h_t−1 / (a ⊙ b)",
    "h = r * (self.a - (self.b - 1)) * h": "h = r_t ⊙ (a − (b − 1)) ⊙ h_t−1",
    "h = r * (-(self.a + self.b)) - h": "h = r_t ⊙ (−(a + b)) − h_t−1",
    "h = (1 - self.a) * h + self.a * r": "h = h_t−1 ⊙ (1 − a) + r_t ⊙ a",
    "h = torch.tanh(r) ** 2 + (r + h).abs()": "h = (tanh(r_t))² + |r_t + h_t−1|",
    "h = torch.where(h > 0.5, r, h + 1) * r": "h = (if h_t−1 > 0.5 then r_t else h_t−1 + 1) ⊙ r_t",
    "h = (h >= r) * r - torch.maximum(h + r, self.b - r)": (
        "h = (h_t−1 ≥ r_t) ⊙ r_t − max(h_t−1 + r_t, b − r_t)"
    ),
    "h = torch.tanh(N(W(x) - U(h), self.a, self.b) - r)": (
        "h = tanh(LayerNorm(W x_t − u h_t−1, a, b) − r_t)"
    ),
    "h = N(W(x) + U(h)) * 2 - N(U(h, self.b))": ("h = 2 LayerNorm(W x_t + u h_t−1) − LayerNorm(u h_t−1 + b)"),
    "h = r - torch.tanh(N(U(h)) - N(W(x), self.a))": (
        "h = r_t − tanh(LayerNorm(u h_t−1) − LayerNorm(W x_t, a))"
    ),
    "s = (r + h).clamp(-3, 3); h = F.hardtanh(U(h), -0.5, 1) + s": (
        "s = clamp(r_t + h_t−1, −3, 3); h = hardtanh(u h_t−1, min_val=−0.5, max_val=1) + s_t"
    ),
    "s = F.softmax(U(h), -1); h = s * torch.cumsum(r + h, -1)": (
        "s = softmax(u h_t−1); h = s_t ⊙ cumsum(r_t + h_t−1)"
    ),
    "s = torch.cumsum(r + h, -1); h = s[:, 1:2] * h.roll(1, -1) + U(r.flip(-1))": (
        "s = cumsum(r_t + h_t−1); h = s_t[1] ⊙ h_t−1[2, 0, 1] + u r_t[2, 1, 0]"
    ),
    "h = torch.tanh(W(x) * self.a + U(h) * 0.5)": "h = tanh(a ⊙ (W x_t) + 0.5 u h_t−1)",
}


@pytest.fixture
def without_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawings of the pages, since most of the time is spent on their layout."""
    monkeypatch.setattr(layer_data, "drawing_data", lambda diagram: None)


def own_layer(step: str) -> ur.Recurrent:
    """Return a layer of a cell with the given lines of its step. They can read ``r``."""
    lines = "\n".join(step.split("; "))
    code = f"def step(self, x, h):\n{textwrap.indent(HEAD + lines, '    ')}\n    return h\n"
    namespace = {"torch": torch, "F": torch.nn.functional}
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
def N(sums, gain=None, bias=None): return torch.nn.functional.layer_norm(sums, (3,), gain, bias)
r = torch.sigmoid(W(x))
"""


def derivations(layer: ur.Recurrent, names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Return how the page computes unit 1 of some quantities at step 2."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.6)
    trace = ur.trace(layer, torch.randn(3, layer.input_size))
    layers = page_data(trace, None, None, "numbers", None, 3_000_000)["layers"]
    found: list[dict[str, Any]] = run_javascript("derivations", [[layers, name] for name in names], folder)
    for name, one in zip(names, found, strict=True):
        if name in trace.names:
            assert one["value"] == pytest.approx(trace[name][2, 0, 1].item(), rel=1e-6)
    return found


@pytest.mark.slow
def test_a_sum_that_is_normalized_is_one_part(tmp_path: Path) -> None:
    [z, n] = derivations(ur.Recurrent(ur.cells.LayerNormGRU, 2, 3), ["z", "n"], tmp_path)
    norm = "LayerNorm(W_ih x_2 + b_ih + W_hh h_1, gain, b_norm)"
    assert [total and total[0] for _, total, _ in z["parts"]] == [f"{norm}[z][1]", None]
    assert z["parts"][1][2] == [[1, ["1", 1]]]
    sums = sum(sign * (total or rows[0][1])[1] for sign, total, rows in z["parts"])
    assert z["value"] == pytest.approx(torch.tensor(sums, dtype=torch.float64).sigmoid().item(), rel=1e-6)
    [[_, [name, value]]] = n["rows"]
    assert name == f"r_2[1]·{norm}[n][1]"
    assert n["value"] == pytest.approx(torch.tensor(value, dtype=torch.float64).tanh().item(), rel=1e-6)


def test_sums_that_are_normalized_apart_are_two_parts(tmp_path: Path) -> None:
    lines = equations([ur.Recurrent(ur.cells.LayerNormLSTM, 2, 3)], tmp_path)[0]
    gates = {name: "tanh" if name == "g" else "σ" for name in "figo"}
    for name, function in gates.items():
        sums = f"LayerNorm(W_ih x_t, gain_ih, b_ih)[{name}] + LayerNorm(W_hh h_t−1, gain_hh)[{name}]"
        assert f"{name} = {function}({sums})" in lines


def test_a_function_of_a_vector_reads_all_units(tmp_path: Path) -> None:
    f, h = derivations(ur.Recurrent(WithSoftmax, 2, 3), ["f", "h"], tmp_path)
    assert f["value"] == pytest.approx(torch.tensor(f["vector"]).softmax(-1)[1].item(), rel=1e-6)
    names = [name for _, (name, _) in h["rows"]]
    assert names == ["c_2[0]", "c_2[1]", "c_2[2]"]
    read = torch.tensor([value for _, (_, value) in h["rows"]])
    assert h["value"] == pytest.approx(read.log_softmax(-1)[1].item(), rel=1e-6)


@pytest.mark.slow
def test_parameters_are_called_the_same_in_formulas_and_arithmetic(tmp_path: Path) -> None:
    cases = {
        WithSoftmax: ("f.0", "W[f] x_t", "W[f][1,0]"),
        ur.cells.BRC: ("n3.0", "W_gates[input_a] x_t", "W_gates[input_a][1,0]"),
        ur.cells.MinLSTM: ("n0.0", "W_if x_t", "W_if[1,0]"),
        ur.cells.LSTM: ("o.0", "W_io x_t", "W_io[1,0]"),
    }
    layers = [ur.Recurrent(cell, 2, 3) for cell in cases]
    for layer, lines, (number, formula, name) in zip(
        layers, equations(layers, tmp_path), cases.values(), strict=True
    ):
        assert any(formula in line for line in lines)
        [found] = derivations(layer, [number], tmp_path)
        assert found["rows"][0][1][0] == name


def test_elements_of_unnamed_vectors_have_an_index(tmp_path: Path) -> None:
    [m] = derivations(ur.Recurrent(ur.cells.MultiplicativeLSTM, 2, 3), ["m"], tmp_path)
    assert [name for name, _ in m["rows"][0][1:]] == ["(W_mx x_2)[1]", "(W_mh h_1)[1]"]
    [s] = derivations(ur.Recurrent(ur.cells.SCRN, 2, 3), ["s"], tmp_path)
    assert [row[1][0] for row in s["rows"]] == ["(0.05 W_sx x_2)[1]", "s_1[1]"]
    [re] = derivations(ur.Recurrent(ur.cells.LRU, 2, 3), ["re"], tmp_path)
    assert [[name for name, _ in row[1:]] for row in re["rows"]] == [
        ["re_1[1]", "across[1]"],
        ["im_1[1]", "up[1]"],
        ["(scale ⊙ (W_b[in_re] x_2))[1]"],
    ]


def equations(layers: list[ur.Recurrent], folder: Path, what: str = "equations") -> list[list[str]]:
    """Return the equations of each layer's step, as the page writes them, or the titles of its gates."""
    torch.manual_seed(0)
    traces = [ur.trace(layer, torch.randn(3, layer.input_size)) for layer in layers]
    pages = [page_data(trace, None, None, "numbers", None, 3_000_000)["layers"] for trace in traces]
    return [parts[0] for parts in run_javascript(what, pages, folder)]


@pytest.mark.slow
def test_parentheses(tmp_path: Path) -> None:
    found = equations([own_layer(step) for step in STEPS], tmp_path)
    for (step, expected), lines in zip(STEPS.items(), found, strict=True):
        assert "; ".join(line for line in lines if line[0] in "sh") == expected, step


def test_an_input_that_the_step_computes_again_has_its_own_symbol(tmp_path: Path) -> None:
    layer = ur.Recurrent(ur.cells.IntersectionRNN, 2, 3)
    first, second, *_ = equations([layer], tmp_path)[0]
    assert (first, second[: second.index(" +")]) == ("x′ = W_x x_t", "g_h = σ(W_ih[g_h] x′_t")


def test_names_of_constants_are_defined(tmp_path: Path) -> None:
    steps = {
        "f = torch.sigmoid(self.a); h = f * h + (1 - f) * r": ["f = σ(a)"],
        "rate = 1 / (1 + torch.exp(-self.a)); h = h - rate * (h - r) / 2": ["rate = 1/(exp(−a) + 1)"],
        "turn = self.u - self.u.T; h = torch.tanh(F.linear(h, turn, self.b) + r)": ["turn = u − uᵀ"],
        "p = self.a.abs(); q = p ** 2 * self.b; h = q * h + p.clamp(-1, 2) * r": [
            "p = |a|", "q = (p)² ⊙ b",
        ],
        "k = torch.ones(3) * 0.5; h = torch.tanh(k * h + r)": ["k = 0.5"],
        "h = h * torch.sigmoid(self.a) + r": [],
    }  # fmt: skip
    for expected, lines in zip(
        steps.values(), equations([own_layer(step) for step in steps], tmp_path), strict=True
    ):
        assert [line for line in lines if "_t" not in line] == expected
    assert equations([ur.Recurrent(ur.cells.LRU, 2, 3)], tmp_path)[0][:5] == [
        "size = exp(−exp(ν))",
        "turn = exp(θ)",
        "up = size ⊙ sin(turn)",
        "across = size ⊙ cos(turn)",
        "scale = exp(γ)",
    ]


def test_deep_formulas_are_divided(tmp_path: Path) -> None:
    lines = equations([ur.Recurrent(ur.cells.RGLRU, 2, 3)], tmp_path)[0]
    assert "v_1 = √(1 − exp(2 log_a_t))" in lines
    assert lines[-1] == "h = a_t ⊙ h_t−1 + v_1,t ⊙ i_t ⊙ x′_t"


def test_a_name_that_begins_with_a_function_has_no_base(tmp_path: Path) -> None:
    """As text, an index is behind an underscore: that of log_f_t is t, and that of hidden_n,t is n,t."""
    lines = equations([ur.Recurrent(ur.cells.SLSTM, 2, 3)], tmp_path)[0]
    assert "f = exp(log_f_t − m_t)" in lines
    assert split_name("log_f") == ("log_f", "")
    assert split_name("hidden_n") == ("hidden", "n")


def test_gates_without_a_name_are_told_apart(tmp_path: Path) -> None:
    cells = (ur.cells.NAS, ur.cells.BRC, ur.cells.LSTM, ur.cells.QRNN)
    nas, brc, lstm, qrnn = equations([ur.Recurrent(cell, 2, 3) for cell in cells], tmp_path, "gateTitles")
    assert nas[:4] == ["σ x0, h0", "ReLU x1, h1", "σ x2, h2", "x3"]
    assert len({*nas}) == len(nas)
    assert brc == ["c", "tanh input_a", "tanh W ih"]
    assert lstm == ["f", "i", "g", "o"]
    assert qrnn[-1] == "σ"


@pytest.mark.slow
def test_every_symbol_of_every_cell_is_defined(tmp_path: Path) -> None:
    layers = [ur.Recurrent(getattr(ur.cells, name), 2, 3) for name in ur.cells.__all__]
    for layer, lines in zip(layers, equations(layers, tmp_path), strict=True):
        names = [name.removesuffix("_l0") for name, _ in layer.named_parameters()]
        names += [line.split(" = ")[0] for line in lines]
        known = {symbol(name).split("_")[0] for name in names} | {"x", "if", "then", "else", "log"}
        for line in lines:
            for base in re.findall(
                r"[^\W\d_]+(?![\w(])", re.sub(r"\[\w+\]|_[\w−,]+|\w+\(|′", "", line.partition(" = ")[2])
            ):
                assert base in known, line


@pytest.mark.slow
def test_no_cell_has_two_signs_in_a_row(tmp_path: Path) -> None:
    layers = [ur.Recurrent(getattr(ur.cells, name), 2, 3) for name in ur.cells.__all__]
    for line in (line for lines in equations(layers, tmp_path) for line in lines):
        assert line.count("(") == line.count(")")
        assert not re.search("[+−⊙/] −", line), line

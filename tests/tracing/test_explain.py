"""The arithmetic that `explain` shows, and quantities as tables and DataFrames."""

from __future__ import annotations

import re
import sys
from io import StringIO
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.by_hand import is_right
from helpers.layer_pairs import LAYERS, OddCell, pair
from unrolled.io.state_dicts import new_layer
from unrolled.tracing.explain import arithmetic, digits_for


def plain(text: str) -> str:
    return text.replace("−", "-")


def number(text: str) -> float:
    return float(plain(text).strip("()"))


def signed(value: torch.Tensor) -> str:
    return f"{value:.4f}".replace("-", "−")


def test_explain_integer_complex_and_multidimensional_quantities() -> None:
    class MixedTypes(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            strongest = x.argmax(-1)
            heads = nn.functional.linear(h.view(len(x), 2, 2), self.weight[:2, :2])
            imaginary = x @ self.weight.T
            turned = torch.complex(h, imaginary)
            column = h * self.weight.sum(-1)
            scaled = column / x.abs().max()
            h = torch.tanh(turned.abs() + heads.flatten(1) + scaled + strongest.unsqueeze(-1))
            return h

    t = ur.trace(
        ur.Recurrent(MixedTypes, 3, 4, dtype=torch.float64), torch.randn(4, 1, 3, dtype=torch.float64)
    )
    assert t.names == ("strongest", "heads", "imaginary", "turned", "column", "scaled", "h")
    assert t.explain("strongest", 1, 0).startswith("argmax([")
    for unit in range(4):
        assert is_right(t.explain("heads", 1, unit))
        assert t.explain("heads", 1, unit).count("·") == 2
        assert t.explain("h", 1, unit).startswith("tanh(abs(")
    real, imaginary = t["turned"][1, 0, 2].real.item(), t["turned"][1, 0, 2].imag.item()
    text, result = t.explain("turned", 1, 2).split(" = ")
    shown = [number(part) for part in text.removeprefix("complex(").removesuffix(")").split(", ")]
    assert shown == pytest.approx([real, imaginary], abs=1e-4)
    assert complex(plain(result)[1:-1].replace(" ", "").replace("i", "j")) == pytest.approx(
        complex(real, imaginary), abs=1e-4
    )
    before, weights, result = re.fullmatch(
        r"(.+)·sum\(\[(.+)\]\)\[3\] = (.+)", t.explain("column", 1, 3, terms=12)
    ).groups()
    rows = torch.tensor(list(map(number, weights.split(", ")))).view(4, 3)
    assert number(before) * float(rows[3].sum()) == pytest.approx(number(result), abs=1e-4)
    assert t.explain("column", 1, 3, terms=2).count(", ") == 2
    frame = t.to_pandas()
    assert frame[frame.name == "turned"].value.tolist() == t["turned"].flatten().tolist()
    str(t.table())


def test_explain_shows_no_arithmetic_for_in_place_changes() -> None:
    class InPlaceChanges(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            a = x @ self.weight.T
            b = 2 * a
            a += 1
            c = b.clone()
            c[:, 0] = 7.0
            d = b + 1
            d[:, 1].fill_(5.0)
            h = torch.tanh(a + b) + c + d
            return h

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            t = ur.trace(ur.Recurrent(InPlaceChanges, 3, 4), torch.randn(2, 3))
            for name in "abcd":
                for unit in range(4):
                    value = signed(t[name][1, 0, unit])
                    assert t.explain(name, 1, unit) == f"{value} = {value}"
            line = t.explain("h", 1, 0)
            assert is_right(line)
            numbers = [abs(t[name][1, 0, 0].item()) for name in "abcdh"]
            assert [float(n) for n in re.findall(r"[\d.]+", line)] == pytest.approx(numbers, abs=1e-4)


def test_explain_shows_no_arithmetic_for_what_a_single_row_cannot_reproduce() -> None:
    class NoiseAndBatchMean(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            noise = torch.randn_like(h)
            centered = x - x.mean(0)
            h = torch.tanh(centered @ self.weight.T + noise)
            return h

    t = ur.trace(ur.Recurrent(NoiseAndBatchMean, 3, 3), torch.randn(4, 2, 3))
    random_state = torch.get_rng_state()
    for name in t.names:
        value = signed(t[name][1, 1, 2])
        assert t.explain(name, 1, 2, batch=1) == f"{value} = {value}"
    assert torch.equal(torch.get_rng_state(), random_state)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    inputs=st.integers(1, 6),
    step=st.integers(0, 4),
    row=st.integers(0, 2),
    backward=st.booleans(),
    data=st.data(),
)
def test_explanations_evaluate_to_the_value(
    kind: str, inputs: int, step: int, row: int, backward: bool, data: Any
) -> None:
    """The result after the equals sign is what the printed operands give."""
    layer, _ = pair(kind, inputs, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    part = ur.trace(layer, torch.randn(5, 3, inputs, dtype=torch.float64)).layer(
        1, "backward" if backward else "forward"
    )
    name = data.draw(st.sampled_from(part.names))
    unit = data.draw(st.integers(0, part[name].shape[2] - 1))
    line = part.explain(name, step, unit, batch=row, terms=99)
    assert number(line.rpartition("= ")[2]) == pytest.approx(part[name][step, row, unit].item(), abs=1e-4)
    assert is_right(line, {other: values[step, row].tolist() for other, values in part.values.items()})


def test_explain_shortens_long_sums() -> None:
    t = ur.trace(ur.RNN(50, 3), torch.randn(2, 50))
    text = t.explain("input_sum", 1, 0, terms=5)
    assert text.count("·") == 5
    assert is_right(text)
    omitted = number(re.search(r"\(45 more terms: (−?[\d.]+)\)", text)[1])
    products = sorted((t["x"][1, 0] * t.layers[0].cell.weight_ih[0]).tolist(), key=abs)
    assert omitted == pytest.approx(sum(products[:45]), abs=1e-4)
    text = t.explain("input_sum", 1, 0, terms=None)
    assert text.count("·") == 50
    assert is_right(text)


def test_explain_supports_any_function() -> None:
    t = ur.trace(ur.Recurrent(OddCell, 2, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64))
    forms = {
        "half": "N / 2",
        "power": "pow(N, 2) − (N − 1)",
        "turned": "−N·exp(−N)",
        "weights": "softmax([N, N, N])[1]",
        "norm": "layer_norm([N, N, N])[1]",
        "h": "N − N − (N − N) + minimum(N, N)",
        "changed": "N",
    }
    for name, form in forms.items():
        line = t.explain(name, 1, 1)
        assert is_right(line) is not False
        pattern = re.escape(form).replace("N", r"(?:\(?−?[\d.]+\)?)")
        assert re.fullmatch(pattern.replace(r"\ −\ (?:", r"\ [−+]\ (?:"), line.rpartition(" = ")[0]), (
            name,
            line,
        )
    assert t.explain("kept", 1, 1).startswith("clamp(where(")


def test_signs() -> None:
    layer = ur.RNN(3, 1)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([[-0.5, 0.25, -1]]))
        layer.bias_ih_l0.fill_(-2)
        layer.weight_hh_l0.fill_(0.1)
        layer.bias_hh_l0.zero_()
    t = ur.trace(layer, torch.tensor([[1.0, -2, 3]]))
    assert t.explain("input_sum", 0, 0) == "−0.5·1 + 0.25·(−2) − 1·3 − 2 = −6.0000"
    assert t.explain("hidden_sum", 0, 0) == "0.1·0 + 0 = 0.0000"
    assert t.explain("h", 0, 0) == "tanh(−6 + 0) = −1.0000"
    assert t.explain("input_sum", 0, 0, digits=2) == "−0.5·1 + 0.25·(−2) − 1·3 − 2 = −6.00"


def test_digits() -> None:
    assert digits_for(lambda digits: 0.123456789, 0.123456789) == (4, 4)
    # Rounded to five digits, the operand is right: 2·0.12345 = 0.2469, but 2·0.1235 = 0.2470.
    assert digits_for(lambda digits: 2 * round(0.123451, digits), 2 * 0.123451) == (5, 4)
    # The layer rounded 0.12345 down, which is the middle between two numbers with four digits.
    assert digits_for(lambda digits: 0.123450001, 0.12344999) == (5, 5)
    assert digits_for(lambda digits: 0.2, 0.1) is None
    assert digits_for(lambda digits: None, 0.1) is None
    assert digits_for(lambda digits: 0.126, 0.131, digits=2) == (2, 2)


@pytest.mark.parametrize("digits", [1, 2, 6, 9])
def test_chosen_digits(digits: int) -> None:
    t = ur.trace(ur.LSTM(3, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    for name in t.names:
        line = t.explain(name, 1, 1, digits=digits)
        assert is_right(line), line
        assert len(line.rpartition(".")[2]) >= digits


def test_exact_operands() -> None:
    t = ur.trace(ur.LSTM(3, 2), torch.randn(2, 3))
    weights = t.layers[0].cell.weight_ih
    line = t.explain("input_sum", 1, 1, digits=None)
    assert is_right(line)
    factors = re.findall(r"([−\d.e]+)·\(?([−\d.e]+)", line)
    assert torch.equal(torch.tensor([abs(number(w)) for w, _ in factors]), weights[1].abs())
    assert torch.equal(torch.tensor([number(x) for _, x in factors]), t["x"][1, 0])
    assert len(line.rpartition(".")[2]) >= 6


def test_rounding_errors_of_the_layer_are_marked() -> None:
    layer = ur.RNN(3, 1, bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor([[1.0, 1, -1]]))
    t = ur.trace(layer, torch.tensor([[1.0, 3e7, 3e7]]))
    assert t["input_sum"].item() == 0  # the sum in float32
    assert t.explain("input_sum", 0, 0) == "1·1 + 1·3.000e+07 − 1·3.000e+07 ≈ 0.0000"


def check_by_hand(cell: str, scale: float) -> None:
    """Check the lines of all quantities of a layer, with weights of some magnitude."""
    layer = new_layer(getattr(ur.cells, cell), 12, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= scale
    t = ur.trace(layer, torch.randn(3, 1, 12) / scale)
    part = t.layers[0]
    lines = 0
    for name in t.names:
        values = {other: part[other][2, 0].flatten().tolist() for other in t.names}
        for unit in range(0, len(values[name]), 3):
            line = part.explain(name, 2, unit)
            assert is_right(line, values) is not False, line
            lines += "≈" not in line and "nan" not in line and "inf" not in line
            if "≈" in line:  # by rounding errors of float32 only
                computed = arithmetic(part.derivations(2).nodes[name], unit, None, 12).value
                size = max(1.0, *(abs(number(n)) for n in re.findall(r"[\d.]+(?:e[+-]\d+)?", line)))
                assert computed is None or abs(computed - values[name][unit]) < 1e-4 * size, line
    assert lines >= 1


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("cell", ["LSTM", "MGU", "SLSTM"])
def test_lines_are_right_by_hand(cell: str, scale: float) -> None:
    check_by_hand(cell, scale)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("cell", sorted(ur.cells.__all__))
def test_lines_of_every_cell_are_right_by_hand(cell: str, scale: float) -> None:
    check_by_hand(cell, scale)


def test_table_fits_the_console() -> None:
    t = ur.trace(nn.LSTM(2, 300), torch.randn(40, 2))
    for width in (60, 80, 200):
        out = StringIO()
        Console(file=out, width=width).print(t.table(["i", "c"]))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert f"{t['i'][0, 0, 0]:.4f}" in lines[4]
        assert "28 steps hidden" in out.getvalue()
        assert not re.search(r"\d…", out.getvalue())  # no number is cut
    out = StringIO()
    Console(file=out, width=100).print(t.table(["h"], steps=[5, -1], units=2))
    assert f"{t['h'][39, 0, 1]:.4f}" in out.getvalue()
    assert " 39 " in out.getvalue()


def test_table_with_the_input() -> None:
    t = ur.trace(ur.GRU(2, 3), torch.randn(4, 2))
    text = str(t.table(["x", "h"]))
    assert f"{t.layers[0].input[2, 0, 1]:.4f}" in text
    assert f"{t['h'][2, 0, 1]:.4f}" in text
    assert repr(t.table(["x", "h"])) == text
    assert torch.equal(t["x"], t.layers[0].input)
    with pytest.raises(ValueError, match="x is the input, so there is no arithmetic to show"):
        t.explain("x", 0, 0)


class Doubled(ur.Cell):
    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x = x * 2
        h = torch.tanh(linear(x, self.weight) + h)
        return h


def test_a_table_has_the_input_beside_an_x_that_the_step_computes() -> None:
    given = torch.randn(3, 2)
    t = ur.trace(ur.Recurrent(Doubled, 2, 3), given)
    for table in (t.table(steps=[1]), t.table(["x (input)", "x", "h"], steps=[1])):
        rows = [line.split() for line in str(table).splitlines()]
        numbers = {words[-3]: words[-2:] for words in rows if words[-3:-2] and words[-3] in ("(input)", "x")}
        assert numbers["(input)"] == [f"{value:.4f}" for value in given[1].tolist()]
        assert numbers["x"] == [f"{value:.4f}" for value in (2 * given[1]).tolist()]
    assert torch.equal(t["x (input)"][:, 0], given)
    assert torch.equal(t["x"][:, 0], 2 * given)
    with pytest.raises(KeyError, match=r"no quantity 'x \(input\)'"):
        ur.trace(ur.GRU(2, 3), given)["x (input)"]


def test_to_pandas_has_every_number_once() -> None:
    rows = [torch.randn(length, 2) for length in (3, 5)]
    t = ur.trace(ur.GRU(2, 4, num_layers=2, bidirectional=True), pack_sequence(rows, enforce_sorted=False))
    frame = t.to_pandas()
    assert list(frame.columns) == ["layer", "direction", "step", "batch", "name", "unit", "value"]
    assert len(frame) == 4 * (3 + 5) * sum(t[name].shape[2] for name in t.names)
    assert not frame.duplicated(list(frame.columns[:-1])).any()
    for line in frame.sample(50, random_state=0).itertuples():
        part = t.layer(line.layer, line.direction)
        assert part[line.name][line.step, line.batch, line.unit].item() == line.value


def test_missing_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    monkeypatch.setitem(sys.modules, "pandas", None)
    for traced in (t, t.layer(0)):
        with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas$"):
            traced.to_pandas()

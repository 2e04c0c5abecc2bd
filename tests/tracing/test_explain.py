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
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import LAYERS, OddCell, pair


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
        text = t.explain("heads", 1, unit)
        products = [float(a) * float(b) for a, b in re.findall(r"(-?[\d.]+)·(-?[\d.]+)", text)]
        assert len(products) == 2
        assert sum(products) == pytest.approx(t["heads"][1, 0].flatten()[unit].item(), abs=1e-3)
        assert t.explain("h", 1, unit).startswith("tanh(abs((")
    real, imaginary = (f"{part:.4f}" for part in torch.view_as_real(t["turned"][1, 0, 2]))
    assert t.explain("turned", 1, 2) == f"complex({real}, {imaginary}) = ({real} + {imaginary}i)"
    row = ", ".join(f"{value:.4f}" for value in t.layers[0].cell.weight.flatten())
    before, column = f"{t['h'][0, 0, 3]:.4f}", f"{t['column'][1, 0, 3]:.4f}"
    assert t.explain("column", 1, 3, terms=12) == f"{before}·sum([{row}])[3] = {column}"
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
                    value = f"{t[name][1, 0, unit]:.4f}"
                    assert t.explain(name, 1, unit) == f"{value} = {value}"
            a, b, c, d, h = (f"{t[name][1, 0, 0]:.4f}" for name in "abcdh")
            assert t.explain("h", 1, 0) == f"tanh({a} + {b}) + {c} + {d} = {h}"


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
        value = f"{t[name][1, 1, 2]:.4f}"
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
    """Evaluate the text of an explanation as arithmetic. The result is the number after the equals sign."""
    layer, _ = pair(kind, inputs, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    part = ur.trace(layer, torch.randn(5, 3, inputs, dtype=torch.float64)).layer(
        1, "backward" if backward else "forward"
    )
    name = data.draw(st.sampled_from(part.names))
    unit = data.draw(st.integers(0, part[name].shape[2] - 1))
    text, _, result = part.explain(name, step, unit, batch=row, terms=99).rpartition(" = ")
    assert result == f"{part[name][step, row, unit]:.4f}"
    scope: dict[str, Any] = {
        f: lambda v, f=f: getattr(torch, f)(torch.tensor(v)).item() for f in ("tanh", "sigmoid", "relu")
    }
    scope |= {other: values[step, row].tolist() for other, values in part.values.items()}
    value = eval(text.replace("·", "*"), {"__builtins__": {}}, scope)
    assert abs(value - float(result)) < 2e-3  # the numbers in the text are rounded to four places


def test_explain_shortens_long_sums() -> None:
    t = ur.trace(ur.RNN(50, 3), torch.randn(2, 50))
    text = t.explain("input_sum", 1, 0, terms=5)
    assert text.count("·") == 5
    rest = float(re.search(r"\(45 more terms: (-?[\d.]+)\)", text)[1])
    shown = sum(float(a) * float(b) for a, b in re.findall(r"(-?[\d.]+)·(-?[\d.]+)", text))
    bias = float(re.search(r"\) \+ (-?[\d.]+) =", text)[1])
    assert abs(shown + rest + bias - float(text.rpartition("= ")[2])) < 1e-3


def test_explain_supports_any_function() -> None:
    t = ur.trace(ur.Recurrent(OddCell, 2, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64))
    value = {name: t[name][1, 0, 1].item() for name in t.names}
    n = {name: f"{v:.4f}" for name, v in value.items()}
    rows = {name: "[" + ", ".join(f"{v:.4f}" for v in t[name][1, 0]) + "]" for name in t.names}
    assert t.explain("half", 1, 1) == f"{n['product']} / 2 = {n['half']}"
    assert t.explain("power", 1, 1) == f"pow({n['half']}, 2) - ({n['half']} - 1) = {n['power']}"
    half = f"({n['half']})" if value["half"] < 0 else n["half"]
    x = f"{t.layers[0].input[1, 0, 0]:.4f}"
    x = f"({x})" if x.startswith("-") else x
    assert t.explain("turned", 1, 1) == f"-{half}·exp(-{x}) = {n['turned']}"
    assert t.explain("weights", 1, 1) == f"softmax({rows['norm']})[1] = {n['weights']}"
    assert t.explain("norm", 1, 1) == f"layer_norm({rows['product']})[1] = {n['norm']}"
    assert t.explain("kept", 1, 1).startswith("clamp(where(")
    assert t.explain("h", 1, 1) == (
        f"{n['kept']} - {n['power']} - ({n['norm']} - {n['weights']})"
        f" + minimum({n['changed']}, {n['half']}) = {n['h']}"
    )
    assert t.explain("changed", 1, 1) == f"{n['changed']} = {n['changed']}"


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

"""The trace against torch.nn's outputs and the equations of torch.nn's documentation, in float64."""

from __future__ import annotations

import cProfile
import functools
import math
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
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import unrolled as ur
from helpers.layer_pairs import LAYERS, OddCell, assert_close, pair, tensors
from unrolled.cli import example

NAMES = {
    "rnn-tanh": ("input_sum", "hidden_sum", "h"),
    "lstm": ("input_sum", "hidden_sum", "i", "f", "g", "o", "c", "h"),
    "gru": ("r", "z", "n", "h"),
}


def by_hand(kind: str, w: Any, x: torch.Tensor, state: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """One step by the equations of torch.nn's documentation, gate by gate."""
    h = state[0]
    a = x @ w("weight_ih").T + w("bias_ih")
    b = h @ w("weight_hh").T + w("bias_hh")
    if kind.startswith("rnn"):
        act = torch.tanh if kind == "rnn-tanh" else torch.relu
        return {"input_sum": a, "hidden_sum": b, "h": act(a + b)}
    if kind == "gru":
        (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        return {"input_sum": a, "hidden_sum": b, "r": r, "z": z, "n": n, "h": n + z * (h - n)}
    i, f, g, o = (a + b).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * state[1] + i * g
    h = o * c.tanh()
    h = h @ w("weight_hr").T if kind == "lstm-proj" else h
    return {"input_sum": a, "hidden_sum": b, "i": i, "f": f, "g": g, "o": o, "c": c, "h": h}


@pytest.mark.parametrize("torchs_own", [False, True], ids=["ours", "torchs"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_quantity_of_every_layer_and_direction(kind: str, torchs_own: bool) -> None:
    ours, theirs = pair(kind, 4, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    module = theirs if torchs_own else ours
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    _, final = theirs(torch.randn(2, 3, 4, dtype=torch.float64))
    state = tuple(part.detach() for part in final) if isinstance(final, tuple) else final.detach()
    t = ur.trace(module, x, state)
    assert_close((t.output, t.final_state), theirs(x, state), 1e-12)
    initial = state if isinstance(state, tuple) else (state,)
    below, index = x, 0
    for k in range(2):
        outputs = []
        for direction in ("forward", "backward"):
            suffix = f"_l{k}" + ("_reverse" if direction == "backward" else "")
            part = t.layer(k, direction)
            assert_close(part.input, below, 1e-12)
            now = tuple(whole[index] for whole in initial)
            for step in range(6)[:: -1 if direction == "backward" else 1]:
                expected = by_hand(
                    kind, lambda name, s=suffix: getattr(theirs, name + s).detach(), below[step], now
                )
                for name, value in expected.items():
                    assert_close(part[name][step], value, 1e-12)
                now = (expected["h"], expected["c"]) if "c" in expected else (expected["h"],)
            outputs.append(part["h"])
            index += 1
        below = torch.cat(outputs, -1)
    assert t.check() < 1e-14
    assert set(NAMES["rnn-tanh" if "rnn" in kind else kind.split("-")[0]]) <= set(t.names)


def test_names_are_the_locals_in_the_order_of_the_code() -> None:
    assert ur.trace(ur.RNN(2, 3), torch.randn(4, 2)).names == NAMES["rnn-tanh"]
    assert ur.trace(nn.LSTM(2, 3), torch.randn(4, 2)).names == NAMES["lstm"]


def test_the_walk_through(walkthrough_layer: ur.RNN, walkthrough_input: torch.Tensor) -> None:
    output = [
        [0.2529, 0.7949, -0.0466],
        [0.2971, 0.9556, 0.1416],
        [0.5706, 0.9837, 0.4186],
        [0.7589, 0.9947, 0.5448],
    ]
    sums = [
        [-0.1290, 0.5513, 0.2439],
        [0.3066, 0.9938, 0.6123],
        [0.7421, 1.4364, 0.9806],
        [1.1777, 1.8790, 1.3490],
    ]
    assert repr(walkthrough_layer) == "RNN(2, 3, batch_first=True)"
    layer, x = example.example(ur.cells.RNN, None, 0, {})
    assert torch.equal(x, walkthrough_input)
    t = ur.trace(layer, x)
    for name, rounded in walkthrough_layer.state_dict().items():
        assert torch.equal(
            torch.round(layer.state_dict()[name], decimals=4), torch.round(rounded, decimals=4)
        )
    torch.testing.assert_close(torch.round(t.output[0], decimals=4), torch.tensor(output), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.round(t["input_sum"][:, 0], decimals=4), torch.tensor(sums), atol=1e-6, rtol=0
    )
    assert t.explain("input_sum", 0, 0) == "0.5407·1.0000 + -0.1051·1.0000 + -0.5645 = -0.1290"
    t = ur.trace(walkthrough_layer, walkthrough_input)  # the rounded weights: as near as their rounding
    assert t.output.shape == (1, 4, 3)
    assert t.final_state.shape == (1, 1, 3)
    torch.testing.assert_close(t.output[0], torch.tensor(output), atol=2e-4, rtol=0)
    torch.testing.assert_close(
        t["input_sum"][:, 0], torch.tensor(sums), atol=2e-4 + 1e-6, rtol=0
    )  # 1e-6: float32
    torch.testing.assert_close(t.final_state[0], t.output[:, -1])
    reference = nn.RNN(2, 3, batch_first=True)
    reference.load_state_dict(walkthrough_layer.state_dict())
    assert_close((t.output, t.final_state), reference(walkthrough_input), 1e-6)
    lstm = ur.LSTM(2, 3, batch_first=True)
    result = lstm(walkthrough_input[0])
    assert [tuple(part.shape) for part in tensors(result)] == [(4, 3), (1, 3), (1, 3)]


@pytest.mark.parametrize("sorted_rows", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed(kind: str, sorted_rows: bool) -> None:
    ours, theirs = pair(kind, 4, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    lengths = [6, 4, 1] if sorted_rows else [4, 1, 6]
    rows = [torch.randn(length, 4, dtype=torch.float64) for length in lengths]
    packed = pack_sequence(rows, enforce_sorted=sorted_rows)
    t = ur.trace(ours, packed)
    assert isinstance(t.output, PackedSequence)
    assert_close((t.output, t.final_state), theirs(packed), 1e-12)
    padded, _ = pad_packed_sequence(t.output)
    assert torch.equal(torch.cat([t.layer(1, d)["h"] for d in ("forward", "backward")], -1), padded)
    assert t.layers[0].lengths.tolist() == lengths
    for row, alone in enumerate(rows):
        single = ur.trace(ours, alone)
        for part, other in zip(t.layers, single.layers, strict=True):
            for name in part.names:
                assert_close(part[name][: len(alone), row], other[name][:, 0], 1e-12)
                assert not part[name][len(alone) :, row].any()
            assert part.explain("h", -1, 2, batch=row) == other.explain("h", -1, 2)
    with pytest.raises(IndexError, match="there is no time step 5: there are 4, counted from 0"):
        t.explain("h", 5, 0, batch=lengths.index(4))
    assert t.check() < 1e-14


@pytest.mark.parametrize("kind", LAYERS)
def test_leaves_everything_as_it_was(kind: str) -> None:
    for module in pair(kind, 4, 5, num_layers=2, dropout=0.5):
        calls: list[str] = []
        module.register_forward_hook(lambda *_: calls.append("hook"))  # noqa: B023
        module(torch.randn(3, 4))[0].sum().backward()
        del calls[:]
        gradients = [parameter.grad.clone() for parameter in module.parameters()]
        values = [parameter.clone() for parameter in module.parameters()]
        x = torch.randn(3, 2, 4, requires_grad=True)
        random_state = torch.get_rng_state()
        t = ur.trace(module, x)
        t.check()
        t.explain("h", 0, 0)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert module.training
        assert calls == []
        assert x.grad is None
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
        assert all(torch.equal(p, v) for p, v in zip(module.parameters(), values, strict=True))
        assert all(p.requires_grad for p in module.parameters())
        assert not any(
            value.requires_grad for value in tensors((t.output, t.final_state, *t.layers[0].values.values()))
        )
        assert_close(t.output, module(x)[0].detach(), 1e-5)  # the same masks of dropout


def test_a_layer_of_a_trace_says_what_it_is() -> None:
    found = ur.trace(ur.GRU(2, 3), torch.randn(4, 2)).layer(0)
    assert repr(found).startswith("<LayerTrace of GRU, layer 0, forward: 4 steps × 1 rows; ")


def test_it_is_a_copy() -> None:
    module, x = nn.LSTM(2, 3), torch.randn(4, 2)
    t = ur.trace(module, x)
    before = t.explain("input_sum", 1, 0), t.check()
    with torch.no_grad():
        module.weight_ih_l0.fill_(9.0)
        x.fill_(9.0)
    assert (t.explain("input_sum", 1, 0), t.check()) == before


def test_works_under_a_profiler() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    t = ur.trace(ur.GRU(2, 3), torch.randn(4, 2))
    sorted([3, 1, 2])
    profiler.disable()
    assert "r" in t.names
    assert any("sorted" in str(entry.code) for entry in profiler.getstats())


def test_works_under_torchs_profiler() -> None:
    layer, x = ur.GRU(2, 3), torch.randn(4, 2)
    expected = ur.trace(layer, x)
    with torch.profiler.profile(with_stack=True, acc_events=True):
        t = ur.trace(layer, x)
    assert t.names == expected.names
    assert all(torch.equal(t[name], expected[name]) for name in t.names)


def test_a_local_that_is_not_per_row_is_left_out() -> None:
    class MaskWrapper(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            doubled = 2 * self.weight  # (hidden, input): no row of the batch, whatever its size
            gate = torch.sigmoid(x @ doubled.T)
            strength = gate.mean(-1)
            return gate * h + strength.unsqueeze(-1)

    for batch in (1, 3):
        t = ur.trace(ur.Recurrent(MaskWrapper, 3, 3), torch.randn(4, batch, 3))
        assert t.names == ("gate", "strength", "h")
        assert t["strength"].shape == (4, batch)
    gates = ", ".join(f"{value:.4f}" for value in t["gate"][1, 2])
    assert t.explain("strength", 1, 0, batch=2) == f"mean([{gates}]) = {t['strength'][1, 2]:.4f}"
    with pytest.raises(IndexError, match="there is no unit 1: there are 1"):
        t.explain("strength", 0, 1)
    assert f"{t['strength'][1, 0]:.4f}" in str(t.table(["strength"]))


def test_a_local_whose_size_changes_is_left_out() -> None:
    class Growing(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            read = x if not h.any() else torch.cat([x, h], -1)
            return h + read[:, :1]

    t = ur.trace(ur.Recurrent(Growing, 2, 3), torch.ones(3, 2))
    assert t.names == ("h",)
    assert t["h"][-1].tolist() == [[3, 3, 3]]


def test_quantities_of_any_kind_are_explained() -> None:
    class Mixed(ur.Cell):
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

    t = ur.trace(ur.Recurrent(Mixed, 3, 4, dtype=torch.float64), torch.randn(4, 1, 3, dtype=torch.float64))
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


def test_what_is_changed_in_place_is_not_explained_wrongly() -> None:
    class Changing(ur.Cell):
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
            t = ur.trace(ur.Recurrent(Changing, 3, 4), torch.randn(2, 3))
            for name in "abcd":
                for unit in range(4):
                    value = f"{t[name][1, 0, unit]:.4f}"
                    assert t.explain(name, 1, unit) == f"{value} = {value}"
            a, b, c, d, h = (f"{t[name][1, 0, 0]:.4f}" for name in "abcdh")
            assert t.explain("h", 1, 0) == f"tanh({a} + {b}) + {c} + {d} = {h}"


def test_what_a_row_alone_does_not_give_stands_for_itself() -> None:
    class Noisy(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            noise = torch.randn_like(h)
            centred = x - x.mean(0)
            h = torch.tanh(centred @ self.weight.T + noise)
            return h

    t = ur.trace(ur.Recurrent(Noisy, 3, 3), torch.randn(4, 2, 3))
    random_state = torch.get_rng_state()
    for name in t.names:
        value = f"{t[name][1, 1, 2]:.4f}"
        assert t.explain(name, 1, 2, batch=1) == f"{value} = {value}"
    assert torch.equal(torch.get_rng_state(), random_state)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    inputs=st.integers(1, 6),
    step=st.integers(0, 4),
    row=st.integers(0, 2),
    backward=st.booleans(),
    data=st.data(),
)
def test_explanations_are_true(
    kind: str, inputs: int, step: int, row: int, backward: bool, data: Any
) -> None:
    """Read the text of an explanation back as arithmetic: it gives the number it ends with."""
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


def test_layer_and_direction_may_be_arguments() -> None:
    t = ur.trace(ur.GRU(2, 3, num_layers=2, bidirectional=True), torch.randn(4, 2)).backward(torch.sum)
    place = {"layer": 1, "direction": "backward"}
    part = t.layer(1, "backward")
    assert t.explain("h", 2, 1, **place) == part.explain("h", 2, 1) != t.explain("h", 2, 1)
    assert str(t.table(["h"], **place)) == str(part.table(["h"]))
    assert "layer 1, backward" in str(t.table(**place))
    assert torch.equal(t.gradient("h", **place), part.gradient("h"))
    assert not torch.equal(t.gradient("h", **place), t.gradient("h"))
    drawn, own = (of.plot("states", **at).lines for of, at in ((t, place), (part, {})))
    assert [list(line.get_ydata()) for line in drawn] == [list(line.get_ydata()) for line in own]
    with pytest.raises(IndexError, match="there is no layer 2: there are 2"):
        t.explain("h", 2, 1, layer=2)


def test_explain_shortens_long_sums() -> None:
    t = ur.trace(ur.RNN(50, 3), torch.randn(2, 50))
    text = t.explain("input_sum", 1, 0, terms=5)
    assert text.count("·") == 5
    rest = float(re.search(r"\(45 more terms: (-?[\d.]+)\)", text)[1])
    shown = sum(float(a) * float(b) for a, b in re.findall(r"(-?[\d.]+)·(-?[\d.]+)", text))
    bias = float(re.search(r"\) \+ (-?[\d.]+) =", text)[1])
    assert abs(shown + rest + bias - float(text.rpartition("= ")[2])) < 1e-3


def test_explain_speaks_of_any_function() -> None:
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


def test_table_shows_the_numbers_and_fits() -> None:
    t = ur.trace(nn.LSTM(2, 300), torch.randn(40, 2))
    for width in (60, 80, 200):
        out = StringIO()
        Console(file=out, width=width).print(t.table(["i", "c"]))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert f"{t['i'][0, 0, 0]:.4f}" in lines[4]
        assert "28 steps are not shown" in out.getvalue()
        assert not re.search(r"\d…", out.getvalue())  # no number is cut
    out = StringIO()
    Console(file=out, width=100).print(t.table(["h"], steps=[5, -1], units=2))
    assert f"{t['h'][39, 0, 1]:.4f}" in out.getvalue()
    assert " 39 " in out.getvalue()


def test_table_prints_and_takes_the_input_by_name() -> None:
    t = ur.trace(ur.GRU(2, 3), torch.randn(4, 2))
    text = str(t.table(["x", "h"]))
    assert f"{t.layers[0].input[2, 0, 1]:.4f}" in text
    assert f"{t['h'][2, 0, 1]:.4f}" in text
    assert repr(t.table(["x", "h"])) == text
    assert torch.equal(t["x"], t.layers[0].input)
    with pytest.raises(ValueError, match="x is the input: no arithmetic stands behind it"):
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


def test_without_pandas_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    monkeypatch.setitem(sys.modules, "pandas", None)
    for traced in (t, t.layer(0)):
        with pytest.raises(ImportError, match="a frame needs pandas: pip install pandas$"):
            traced.to_pandas()


def test_bad_requests() -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    with pytest.raises(
        KeyError, match="no quantity 'z' in this trace: it has input_sum, hidden_sum, i, f, g, o, c, h"
    ):
        t["z"]
    with pytest.raises(IndexError, match="there is no unit 3: there are 3"):
        t.explain("h", 0, 3)
    with pytest.raises(IndexError, match="there is no row 1: there are 1"):
        t.explain("h", 0, 0, batch=1)
    with pytest.raises(TypeError, match="the time step should be a whole number, got 1.5"):
        t.explain("h", 1.5, 0)
    with pytest.raises(ValueError, match="a table needs at least one quantity"):
        t.table(names=[])
    with pytest.raises(ValueError, match="direction should be 'forward', got 'backward'"):
        t.layer(0, "backward")
    with pytest.raises(IndexError, match="there is no layer 1: there are 1"):
        t.layer(1)
    with pytest.raises(TypeError, match=r"one of unrolled's or torch.nn.RNN.*, got Linear"):
        ur.trace(nn.Linear(2, 3), torch.randn(4, 2))
    model = nn.Sequential(nn.Embedding(9, 2), nn.LSTM(2, 3))
    with pytest.raises(TypeError, match=r"got Sequential: .*unrolled.record\(model\).*rec\['1'\]$"):
        ur.trace(model, torch.arange(4))
    for ids in (torch.arange(4), pack_sequence([torch.arange(4)])):
        with pytest.raises(ValueError, match=r"reads features, got .* torch.int64.*unrolled.record\(model\)"):
            ur.trace(model[1], ids)
    with pytest.raises(ValueError, match="Expected 2, got 5"):
        ur.trace(nn.LSTM(2, 3), torch.randn(4, 5))

    class Own(nn.LSTM):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(2 * x)

    with pytest.raises(TypeError, match="Own overrides the forward of torch.nn.LSTM.* its parameters$"):
        ur.trace(Own(2, 3), torch.randn(4, 2))

    class Ours(ur.LSTM):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(2 * x)

    with pytest.raises(TypeError, match="Ours overrides the forward of unrolled.LSTM"):
        ur.trace(Ours(2, 3), torch.randn(4, 2))
    assert ur.trace(type("Named", (ur.LSTM,), {})(2, 3), torch.randn(4, 2)).check() < 1e-6


def test_positions_may_come_from_argmax() -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    unit = t["h"][-1, 0].argmax()
    assert t.explain("h", -1, unit) == t.explain("h", 3, int(unit))
    assert t.explain("h", -1, unit.numpy()) == t.explain("h", 3, int(unit))


def test_a_warning_of_the_module_is_not_given_again() -> None:
    with pytest.warns(UserWarning, match="dropout option"):
        module = nn.LSTM(2, 3, dropout=0.5)
    assert ur.trace(module, torch.randn(4, 2)).check() < 1e-6  # any other warning is an error here


def test_check_sees_nan_in_either() -> None:
    layer = ur.LSTM(2, 3)
    t = ur.trace(layer, torch.full((4, 2), torch.nan))
    assert t.check() == 0.0  # NaN in the same places
    t.output = torch.zeros_like(t.output)
    assert math.isnan(t.check())
    t = ur.trace(layer, torch.randn(4, 2))
    t.output[3, 1] += 0.5
    assert abs(t.check() - 0.5) < 1e-6
    assert ur.trace(layer, torch.randn(4, 0, 2)).check() == 0.0


def test_traces_what_parametrizations_and_nan_give() -> None:
    module = nn.GRU(2, 3)
    nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    with torch.no_grad():
        module.bias_ih_l0[1] = torch.nan
    t = ur.trace(module, torch.randn(4, 2))
    torch.testing.assert_close(t.output, module(t.input)[0], equal_nan=True)
    assert "nan" in t.explain("input_sum", 0, 1)
    assert t["r"][0, 0, 1].isnan()


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_what_is_done_to_the_module_afterwards_changes_nothing(make: type[nn.Module]) -> None:
    module, x = make(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    t = ur.trace(module, x)
    expected = t.backward(torch.sum).gradient("h").clone()
    module.eval()
    module.double()
    module.dropout = 0.1
    assert torch.equal(t.backward(torch.sum).gradient("h"), expected)
    assert t.check() < 1e-6
    assert t.recurrent.training


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_a_forward_that_was_put_upon_one_module_alone(make: type[nn.Module]) -> None:
    module = make(3, 4)
    module.forward = functools.partial(lambda module, x: type(module).forward(module, 2 * x), module)
    with pytest.raises(TypeError, match="its own forward"):
        ur.trace(module, torch.randn(4, 3))
    del module.forward
    module.forward = module.forward  # the one of its class
    assert ur.trace(module, torch.randn(4, 3)).check() < 1e-6


@pytest.mark.parametrize("make", [nn.LSTM, ur.LSTM])
def test_a_parametrization_that_changes_with_every_use(make: type[nn.Module]) -> None:
    module, x = make(3, 4), torch.randn(5, 2, 3)
    nn.utils.parametrizations.spectral_norm(module, "weight_hh_l0", n_power_iterations=1)
    module.parametrizations.weight_hh_l0[0]._u.copy_(torch.eye(16)[0])  # far from where it goes
    before = {name: value.clone() for name, value in module.state_dict().items()}
    t = ur.trace(module, x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert_close(t.output, module.eval()(x)[0].detach(), 1e-6)


def test_a_step_that_takes_just_so_many_rows() -> None:
    class MaskWrapper(ur.Cell):
        weight_hh = ur.Param("hidden", "hidden")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            sums = x + linear(h, self.weight_hh)
            mask = torch.ones(2, 3)
            scale = sums.abs().mean(0)
            h = torch.tanh(sums / scale) * mask
            return h

    layer, x = ur.Recurrent(MaskWrapper, 3, 3), torch.randn(4, 2, 3)
    with ur.engine("reference"):
        output = layer(x)[0].detach()
    t = ur.trace(layer, x)
    assert t.names == ("sums", "mask", "h")
    assert torch.equal(t["h"], output)

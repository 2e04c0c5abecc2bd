"""`Trace.health` on layers with NaN, stuck gates, saturated and dead units, in every layout."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.broken_layers import Formula, broken, inputs, only, report
from unrolled.tracing.findings import gate_value, listed, number, percent

CELLS = ur.cells


class Exponential(Formula):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        e = torch.exp(2000 * self.sums(x, h))
        h = torch.tanh(e)
        return h


class Logarithm(Formula):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        a = torch.log(self.sums(x, h))
        h = torch.tanh(a)
        return h


class Quotient(Formula):
    def step(self, x: Tensor, h: Tensor) -> Tensor:
        a = self.sums(x, h)
        q = a / torch.zeros_like(a)
        h = torch.tanh(q)
        return h


class HardGate(Formula):
    """A gate with hard sigmoid, and an unknown name."""

    bias = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        keep = torch.nn.functional.hardsigmoid(self.sums(x, h) + self.bias)
        h = torch.lerp(torch.tanh(linear(x, self.weight_ih)), h, keep)
        return h


class OneGate(Formula):
    """One gate for all units, as a quantity with one number per row."""

    bias = ur.Param("1")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        keep = torch.sigmoid(x.mean(-1) + self.bias)
        gate = keep.unsqueeze(-1)
        h = gate * h + torch.tanh(self.sums(x, h))
        return h


class RootOfSquares(Formula):
    """The derivative of the root is infinite at 0."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        size = (x.square().sum(-1, keepdim=True) + 0 * h.square().sum(-1, keepdim=True)).sqrt()
        h = torch.tanh(linear(h, self.weight_hh) + size)
        return h


# --- NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_input(value: float) -> None:
    x = inputs(batch=60)
    x[7, 57, 2] = value
    finding = only(report(broken(CELLS.GRU, lambda layer: None), x), "not finite")
    assert (finding.severity, finding.quantity) == ("error", "x")
    assert (finding.steps, finding.rows, finding.units) == ((7,), (57,), (2,))
    word = "NaN" if math.isnan(value) else "infinity"
    assert f"The input has {word}: the first is x[2] at step 7 in row 57." in finding.message
    assert finding.values["steps"] == (30 - 7 if math.isnan(value) else finding.values["steps"])


@pytest.mark.parametrize(("shape", "which"), [((6, 2), ""), ((6, 1, 2), ""), ((6, 3, 2), " of the row")])
def test_nan_names_the_row_only_if_there_are_several(shape: tuple[int, ...], which: str) -> None:
    x = torch.randn(shape)
    x[2].view(-1)[-1] = math.nan
    (finding,) = [one for one in ur.trace(nn.LSTM(2, 3), x).health().findings if one.severity == "error"]
    assert (
        f"In all, 67 % of the steps{which} have NaN or infinity, and so does the output." in finding.message
    )


@pytest.mark.parametrize("cell", [CELLS.LSTM, CELLS.MinGRU, CELLS.SLSTM])
def test_parameter(cell: Any) -> None:
    found = report(broken(cell, lambda layer: layer.weight_ih_l0[3, 2].fill_(math.nan)))
    finding = only(found, "not finite")
    assert found[0] is finding
    assert finding.parameter == ("weight_ih", 3)
    assert (
        "The parameter weight_ih isn't finite: weight_ih[3, 2] is NaN. 100 % of the steps" in finding.message
    )
    assert any("fewer than two steps have finite numbers" in text for text in found.not_checked)


@pytest.mark.parametrize(
    ("cell", "quantity", "origin"),
    [
        (Exponential, "e", "exp("),
        (Logarithm, "a", "which isn't defined"),
        (Quotient, "q", "which is infinite"),
    ],
)
def test_operation(cell: Any, quantity: str, origin: str) -> None:
    layer, x = broken(cell, lambda layer: None), inputs(batch=8)
    finding = only(report(layer, x), "not finite")
    assert finding.quantity == quantity
    assert origin in finding.message
    values = ur.trace(layer, x)[quantity]
    place = re.search(rf"{quantity}\[(\d+)\] at step (\d+) in row (\d+)", finding.message)
    assert place is not None
    unit, step, row = map(int, place.groups())
    assert ((unit,), (step,)) == (finding.units, finding.steps)
    assert not values[step, row, unit].isfinite()
    assert values[:step].isfinite().all()
    assert finding.rows == tuple((~values.isfinite()).any(2).any(0).nonzero().flatten().tolist())


def test_overflow_in_a_weighted_sum() -> None:
    layer = broken(CELLS.LSTM, lambda layer: layer.weight_ih_l0[12:18].mul_(1e38), dtype=torch.float32)
    x = inputs(dtype=torch.float32) * 20
    finding = only(report(layer, x), "not finite")
    assert finding.quantity == "input_sum"
    assert "an overflow, since the largest number of float32 is 3.4e+38" in finding.message
    assert 12 <= finding.units[0] < 18


def test_state_and_several_layers() -> None:
    layer = broken(CELLS.GRU, lambda layer: None, num_layers=2, bidirectional=True)
    state = torch.zeros(4, 5, 6).double()
    state[1, 3, 4] = math.nan
    found = ur.trace(layer, inputs(), state).health()
    first, *others = [one for one in found if one.kind == "not finite"]
    assert (first.layer, first.direction, first.rows) == (0, "backward", (3,))
    assert "The initial state has NaN in h[4] in row 3." in first.message
    assert str(found).splitlines()[1].startswith("error: layer 0, backward: The initial state")
    assert {(one.layer, one.severity) for one in others} == {(1, "note")}  # what layer 0 passed on
    assert all("It is the output of layer 0." in one.message for one in others)


def test_gradient() -> None:
    x = inputs()
    x[4, 1] = 0
    found = report(broken(RootOfSquares, lambda layer: None), x, lambda output: output.square().sum())
    finding = only(found, "gradient not finite")
    assert finding.rows == (1,)
    assert finding.steps[0] <= 4
    assert "All values of the forward pass are finite." in finding.message


# --- gates and units


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_the_example_of_the_page() -> None:
    """The sentence names the gate, the numbers, the effect and the cause."""
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3)
    with torch.no_grad():
        lstm.bias_ih_l0[4] = -12
    trace = ur.trace(lstm, torch.tensor([[1, 0.5], [-1, 2], [0.5, -1.5], [0, 0]]))
    (finding,) = trace.health()
    highest = trace["f"][:, 0, 1].max().item()
    assert finding.message == (
        f"Forget gate f[1] stays shut: at most {highest:.6f} in all 4 steps, so unit 1 forgets c at every "
        "step. The cause is a bias: b_if[1] = −12.00."
    )
    assert (finding.kind, finding.severity, finding.units) == ("gate shut", "warning", (1,))
    assert finding.values["highest"] == pytest.approx(highest)
    assert (finding.steps, finding.parameter) == ((0, 1, 2, 3), ("bias_ih", 4))


@pytest.mark.parametrize(
    ("cell", "change", "kind", "quantity", "units", "words"),
    [
        (CELLS.LSTM, lambda one: one.bias_hh_l0[0:6].fill_(-9), "gate shut", "i", (0, 1, 2, 3, 4, 5),
         ("Input gate i stays shut in all units:", "so nothing of g gets through", "b_hi[0] = −9.00")),
        (CELLS.LSTM, lambda one: one.bias_ih_l0[20].fill_(-20), "gate shut", "o", (2,),
         ("Output gate o[2] stays shut", "nothing of tanh(c) gets through")),
        (CELLS.LSTM, lambda one: one.bias_ih_l0[8:10].fill_(20), "gate open", "f", (2, 3),
         ("Forget gate f stays open in 2 of 6 units (2 and 3):", "it can't learn to shut",
          "In unit 2, the cause is a bias:")),
        (CELLS.GRU, lambda one: one.bias_ih_l0[7].fill_(12), "gate open", "z", (1,),
         ("Update gate z[1] stays open", "so nothing of n gets through", "b_iz[1] = 12.00")),
        (CELLS.GRU, lambda one: one.bias_hh_l0[1].fill_(-12), "gate shut", "r", (1,),
         ("Reset gate r[1] stays shut", "nothing of hidden_n gets through", "b_hr[1] = −12.00")),
        (CELLS.MinGRU, lambda one: one.bias_ih_l0[2].fill_(-12), "gate shut", "z", (2,),
         ("so nothing of candidate gets through", "The cause is a bias")),
        (CELLS.JANET, lambda one: one.bias_ih_l0[2].fill_(-12), "gate shut", "f", (2,),
         ("so unit 2 forgets h at every step",)),
        (HardGate, lambda one: one.bias_l0[3].fill_(-40), "gate shut", "keep", (3,),
         ("Gate keep[3] stays shut: at most 0 in all 30 steps of 5 rows", "unit 3 forgets h",
          "bias[3] = −40.00")),
    ],
)  # fmt: skip
def test_stuck_gate(
    cell: Any, change: Any, kind: str, quantity: str, units: tuple[int, ...], words: tuple[str, ...]
) -> None:
    layer = broken(cell, change)
    found = report(layer)
    finding = only(found, kind)
    assert (finding.quantity, finding.units) == (quantity, units)
    for text in words:
        assert text in finding.message
    values = ur.trace(layer, inputs())[quantity][..., list(units)]
    extreme = values.min() if kind == "gate open" else values.max()
    assert extreme.item() in finding.values.values()
    assert f"{gate_value(extreme.item())} in all 30 steps" in finding.message


def test_one_gate_for_all_units() -> None:
    layer = broken(OneGate, lambda one: one.bias_l0.fill_(-30))
    found = report(layer, loss=lambda y: y.sum())
    message = only(found, "gate shut").message
    assert message.startswith("Gate gate stays shut: at most ")  # not keep as well, which has the same number
    assert message.endswith("so the layer forgets h at every step. The cause is a bias: bias[0] = −30.00.")
    assert "all gradients are finite" in found.checked


def test_stuck_by_weights_and_large_inputs() -> None:
    layer = broken(CELLS.LSTM, lambda one: one.weight_ih_l0[7].fill_(-6))
    finding = only(report(layer, inputs().abs() + 0.5), "gate shut")
    assert (finding.units, finding.parameter) == ((1,), ("weight_ih", 7))
    assert "Most of it comes from the weighted sum of input with W_if" in finding.message


def test_a_sum_that_is_larger_than_the_whole_pre_activation() -> None:
    layer = broken(
        CELLS.LSTM,
        lambda one: (one.weight_ih_l0[7].fill_(-6), one.bias_ih_l0.zero_(), one.bias_ih_l0[7].fill_(2)),
    )
    message = only(report(layer, inputs().abs() + 0.5), "gate shut").message
    part, whole = re.search(r"W_if: −([\d.]+), and −([\d.]+) with all other terms, at step", message).groups()
    assert float(part) > float(whole)


class Scaled(Formula):
    """Of two sigmoids, only ``z`` multiplies something that isn't constant."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        a = torch.sigmoid(self.sums(x, h))
        z = torch.sigmoid(linear(x, self.weight_ih))
        h = 0.5 * h + 0.1 * z * torch.tanh(a) + 0.1 * a
        return h


@pytest.mark.parametrize(("cell", "gates"), [(CELLS.SCRN, set()), (CELLS.NAS, set()), (Scaled, {"z"})])
def test_a_sigmoid_that_scales_nothing_is_no_gate(cell: Any, gates: set[str]) -> None:
    layer = broken(cell, lambda one: [parameter.mul_(100).abs_() for parameter in one.parameters()])
    found = report(layer, inputs().abs() + 0.5)
    assert {one.quantity for one in found if one.kind.startswith("gate")} == gates
    assert any(one.kind == "saturated" for one in found)


def test_share_of_the_steps() -> None:
    """A gate that opens at one of 300 steps is still stuck, at 6 of them not."""
    layer = broken(CELLS.GRU, lambda one: (one.weight_ih_l0.zero_(), one.weight_ih_l0[6, 0].fill_(1)))
    x = torch.full((300, 1, 4), -9.0).double()
    x[100] = 0
    finding = only(report(layer, x), "gate shut")
    assert re.search("below 0.012[67] in 99 % of all 300 steps", finding.message)
    assert "of input with W_iz: −9.00 of −" in finding.message
    assert finding.values["share"] == pytest.approx(299 / 300)
    x[100:106] = 0
    assert not [one for one in report(layer, x) if one.kind == "gate shut"]


def test_saturated_units() -> None:
    layer = broken(CELLS.RNN, lambda one: one.weight_ih_l0[1:3].mul_(1000))
    found = report(layer)
    finding = only(found, "saturated")
    assert (finding.quantity, finding.units) == ("h", (1, 2))
    outside = (ur.trace(layer, inputs())["h"][..., [1, 2]].abs() > 0.9747).double().mean((0, 1))
    assert finding.values["share"] == pytest.approx(outside.min().item(), abs=0.01)
    assert "There tanh is flat" in finding.message
    assert "with W_ih" in finding.message
    flipping = broken(CELLS.LSTM, lambda one: one.weight_ih_l0[4].mul_(1000))  # a gate at both ends in turn
    assert only(report(flipping), "saturated").quantity == "i"


@pytest.mark.parametrize(
    ("cell", "change", "options", "value"),
    [
        (CELLS.RNN, lambda one: one.bias_ih_l0[3].fill_(-30), {"nonlinearity": "relu"}, 0.0),
        (CELLS.RNN, lambda one: [part[3].zero_() for part in one.parameters()], {}, 0.0),
        (CELLS.RNN, lambda one: [part[3].fill_(0.0 if part.dim() > 1 else 0.7) for part in one.parameters()],
         {}, math.tanh(1.4)),
    ],
)  # fmt: skip
def test_dead_unit(cell: Any, change: Any, options: dict[str, Any], value: float) -> None:
    finding = only(report(broken(cell, change, **options)), "dead")
    assert (finding.quantity, finding.units) == ("h", (3,))
    assert finding.values["value"] == pytest.approx(value)
    assert finding.message == f"Unit 3 of h is dead: it is {number(value)} in all 30 steps of 5 rows."


def test_dead_units_need_different_inputs_and_enough_steps() -> None:
    constant = report(broken(CELLS.GRU, lambda one: None), torch.ones(9, 2, 4).double())
    assert any(text.endswith("all steps have the same input") for text in constant.not_checked)
    relu = broken(CELLS.RNN, lambda one: one.bias_ih_l0[3].fill_(-30), nonlinearity="relu")
    short = report(relu, inputs(4, 1))
    assert not short.findings
    assert any("it needs 64 steps to call them dead" in text for text in short.not_checked)


# --- layouts, selections and display


def test_packed_inputs_and_padding() -> None:
    layer = broken(CELLS.LSTM, lambda one: one.bias_ih_l0[7].fill_(-12), bidirectional=True)
    rows = [inputs(length, 1)[:, 0] for length in (3, 9, 6)]
    rows[2][5, 1] = math.nan
    found = report(layer, pack_sequence(rows, enforce_sorted=False))
    assert [(one.kind, one.direction, one.rows) for one in found if one.severity == "error"] == [
        ("not finite", "forward", (2,)), ("not finite", "backward", (2,)),
    ]  # fmt: skip
    gate = only(found, "gate shut")
    assert (gate.direction, gate.units) == ("forward", (1,))
    assert "layer 0, forward: Forget gate f[1] stays shut" in str(found)  # there are two directions
    assert "in all steps of 3 rows" in gate.message
    padded = report(
        broken(CELLS.RNN, lambda one: None), pack_sequence([inputs(9, 1)[:, 0], inputs(2, 1)[:, 0]])
    )
    assert not padded.findings  # zeros after the end of a row aren't dead units


def test_selections() -> None:
    layer = broken(CELLS.LSTM, lambda one: one.bias_ih_l0[8].fill_(-12))
    with ur.record(layer, names=["f"], units=[1, 2], steps=slice(0, 10)) as rec:
        layer(inputs())
    found = rec[""].health()
    assert only(found, "gate shut").units == (2,)
    assert only(found, "gate shut").steps == tuple(range(10))
    text = "\n".join(found.not_checked)
    assert "the other steps: only 10 of 30 were recorded" in text
    assert "the other units: only 2 of 6 were recorded" in text
    assert "whether input and past are used" in text
    with ur.record(layer, rows=[1, 3], steps=[2, 5, 20], gradients=True) as rec:
        layer(inputs())[0].sum().backward()
    found = rec[""].health()
    assert only(found, "gate shut").units == (2,)
    assert "states that grow" in "\n".join(found.not_checked)
    assert any("uses its input and its past" in text for text in found.checked)


def test_report() -> None:
    layer = broken(CELLS.LSTM, lambda one: (one.bias_ih_l0[8].fill_(-12), one.weight_hh_l0[:6].zero_()))
    x = inputs()
    x[3, 2, 1] = math.nan
    found = report(layer, x)
    assert [one.severity for one in found] == ["error", "warning", "note"]
    assert len(found) == 3
    assert found[1] in found
    assert str(found).splitlines()[0] == "1 error, 1 warning, 1 note."
    assert repr(found) == "<HealthReport: 1 error, 1 warning, 1 note>"
    page = found._repr_html_()
    assert all(str(one) in page for one in found if "'" not in str(one))
    from rich.console import Console

    console = Console(width=1000)
    with console.capture() as printed:
        console.print(found)
    assert [line.rstrip() for line in printed.get().splitlines()] == str(found).splitlines()
    assert report(broken(CELLS.GRU, lambda one: None)).headline == "No problem found"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.0000168), "0.000017"), (number(-12.0), "−12"), (number(3.4e38), "3.4e+38"),
        (number(math.nan), "NaN"), (number(-math.inf), "−infinity"), (number(1e-9), "1e-09"),
        (number(0.0), "0"), (gate_value(0.99997), "0.999970"), (gate_value(0.012689), "0.0127"),
        (percent(0.9999), "99 %"), (percent(0.001), "under 1 %"), (percent(1.0), "100 %"),
        (listed([3]), "3"), (listed([0, 1, 2, 5]), "0–2 and 5"),
        (listed(range(0, 40, 2)), "0, 2, 4, 6, 8 and more"),
    ],
)  # fmt: skip
def test_numbers_and_lists(text: str, expected: str) -> None:
    assert text == expected

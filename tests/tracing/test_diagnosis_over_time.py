"""`Trace.health` on layers whose states and gradients grow or vanish, or that ignore what they should use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.broken_layers import Formula, broken, inputs, last_sum, only, report
from unrolled.tracing.findings import number
from unrolled.tracing.influence import explained_variance

CELLS = ur.cells


class UnusedBias(Formula):
    bias = ur.Param("2*hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        used, _ = self.bias.chunk(2)
        h = torch.tanh(self.sums(x, h) + used)
        return h


def test_growing_state() -> None:
    layer = broken(
        CELLS.RNN, lambda one: one.weight_hh_l0.copy_(1.5 * torch.eye(6)), nonlinearity="relu", bias=False
    )
    finding = only(report(layer, inputs().abs()), "growing state")
    norms = ur.trace(layer, inputs().abs())["h"].square().sum(-1).mean(1).sqrt()
    assert finding.values["first"] == pytest.approx(norms[0].item())
    assert finding.values["last"] == pytest.approx(norms[-1].item())
    assert finding.values["growth"] == pytest.approx(1.5, rel=0.01)
    assert finding.steps == (0, 29)
    integrator = broken(CELLS.RNN, lambda one: one.weight_hh_l0.copy_(torch.eye(6)), nonlinearity="relu")
    kinds = {one.kind for one in report(integrator, inputs(200).abs())}
    assert "growing state" not in kinds  # a sum grows, but not exponentially


def amplifying(factor: float = 2.5, **options: Any) -> ur.Recurrent:
    """An RNN whose states are multiplied by a factor at every step, in float32."""

    def set_weights(layer: Any) -> None:
        for name, parameter in layer.named_parameters():
            if name.startswith("weight_hh"):
                parameter.copy_(factor * torch.eye(6))

    return broken(CELLS.RNN, set_weights, nonlinearity="relu", dtype=torch.float32, **options)


@pytest.mark.parametrize(("steps", "batch", "reverse"), [(40, 1, False), (200, 1, True), (200, 3, False)])
def test_a_state_is_judged_up_to_its_overflow(steps: int, batch: int, reverse: bool) -> None:
    trace = ur.trace(amplifying(bidirectional=reverse), inputs(steps, batch, torch.float32).abs())
    report, direction = trace.health(), "backward" if reverse else "forward"
    finding = next(one for one in report if one.kind == "growing state" and one.direction == direction)
    states = trace.layer(0, direction)["h"]
    name, (step, row, unit) = finding.locations[0]
    size = states[step, row].abs().max()
    assert (name, states[step, row, unit]) == ("h", size)
    assert f"The largest number at step {step} is h[{unit}] = {number(size.item())}" in finding.message
    assert "weight_hh: its spectral radius is 2.5" in finding.message
    norms = states.double().norm(dim=-1)
    rows = range(batch) if steps == 40 else [row]
    expected = [float(norms[one, rows].square().mean().sqrt()) for one in finding.steps]
    assert [finding.values["first"], finding.values["last"]] == pytest.approx(expected)
    after = step - 1 if reverse else step + 1
    assert after == steps or not states[after, row].isfinite().all()
    text = str(report)
    assert "no state grows" not in text
    assert "ignores its input" not in text
    assert "whether input and past are used" in text.split("not checked: ", 1)[1]


def test_the_rows_of_a_norm_are_named() -> None:
    trace = ur.trace(amplifying(), inputs(40, 3, torch.float32))
    finding = only(trace.health(), "growing state")
    assert "its norm (root mean square over 3 rows) goes from" in finding.message
    assert [row for _, (_, row, _) in finding.locations] == trace["h"][-1].amax(-1).argsort(
        descending=True
    ).tolist()
    one_bad = inputs(200, 3, torch.float32) * torch.tensor([0.0, 1, 0])[:, None]
    layer = amplifying()
    torch.nn.init.zeros_(layer.bias_ih_l0)
    torch.nn.init.zeros_(layer.bias_hh_l0)
    assert "its norm in row 1 goes from" in only(ur.trace(layer, one_bad).health(), "growing state").message


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_of_other_lengths_than_the_one_that_overflows(reverse: bool) -> None:
    layer = amplifying(bidirectional=reverse)
    rows = [inputs(steps, 1, torch.float32)[:, 0].abs() for steps in (30, 200, 9, 60)]
    trace = ur.trace(layer, pack_sequence(rows, enforce_sorted=False))
    direction = "backward" if reverse else "forward"
    finding = next(one for one in trace.health() if (one.kind, one.direction) == ("growing state", direction))
    assert "(root mean square over 3 rows)" in finding.message
    assert "It also grows in row 1." in finding.message
    assert finding.steps == ((59, 0) if reverse else (0, 59))
    for name, (step, row, unit) in finding.locations:
        states = trace.layer(0, direction)[name][step, row]
        assert states[unit] == states.abs().max() > 1000
        assert states.isfinite().all()


def test_what_isnt_finite_is_not_judged() -> None:
    layer = broken(CELLS.RNN, lambda one: one.weight_hh_l0[3, 2].fill_(math.nan))
    report = ur.trace(layer, inputs(10)).backward(torch.zeros(10, 5, 6).double()).health()
    assert {one.kind for one in report} == {"not finite", "gradient not finite"}  # not "no gradient"
    assert "states that grow: not all steps of h have finite numbers" in report.not_checked
    assert "the gradient through time: not all gradients are finite" in report.not_checked
    x = inputs(20, 1)
    x[10] = math.nan
    report = ur.trace(broken(CELLS.RNN, lambda one: None), x).health()
    assert "no state grows exponentially" not in report.checked
    some = ur.trace(broken(CELLS.RNN, lambda one: None), torch.cat([x, inputs(20, 2)], 1)).health()
    assert "no state grows exponentially" in some.checked  # as far as the other rows tell


def test_a_batch_without_rows() -> None:
    trace = ur.trace(broken(CELLS.RNN, lambda one: None), inputs(5, 0)).backward(torch.sum)
    assert "the gradient through time, states that grow: the batch has no rows" in trace.health().not_checked


@pytest.mark.parametrize("loss", [torch.zeros(5, 2, 6).double(), lambda y: y.sum()])
def test_the_advice_for_gradients_works(loss: Any) -> None:
    trace = ur.trace(broken(CELLS.RNN, lambda one: None), inputs(5, 2))
    advice = "call trace.backward(target) or trace.backward(lambda y: y.sum()) first"
    assert f"the gradient through time: {advice}" in trace.health().not_checked
    assert "the gradient through time" not in str(trace.backward(loss).health().not_checked)


@pytest.mark.parametrize("reverse", [False, True])
def test_exploding_gradient(reverse: bool) -> None:
    layer = broken(CELLS.RNN, lambda one: None, nonlinearity="relu", bidirectional=reverse)
    x, steps = inputs(20).abs() + 1, (0, 19)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "weight_hh" in name:
                parameter.copy_(1.8 * torch.eye(6))
            elif "weight_ih" in name:
                parameter.abs_()
    found = report(layer, x, (lambda o: o[0, :, 6:].sum()) if reverse else last_sum)
    finding = only(found, "gradient explodes")
    assert finding.direction == ("backward" if reverse else "forward")
    assert finding.values["growth"] == pytest.approx(1.8)
    assert finding.values["first"] / finding.values["last"] == pytest.approx(1.8**19)
    start, end = steps if reverse else steps[::-1]
    assert f"at step {start} to" in finding.message
    assert f"at step {end}, by a factor of 1.8 per step" in finding.message
    threshold = math.ceil(math.log(100 * 20) / math.log(1.8))
    assert finding.steps == (threshold if reverse else 19 - threshold,)


def test_a_loss_that_grows_along_the_sequence_is_no_explosion() -> None:
    layer = broken(CELLS.RNN, lambda one: one.weight_hh_l0.copy_(0.2 * torch.eye(6)))
    sizes = 3.0 ** -torch.arange(20).double()[:, None, None]
    trace = ur.trace(layer, inputs(20)).backward(lambda output: (sizes * output).sum())
    norms = trace.gradient("h").norm(dim=-1).mean(1)
    assert norms[0] / norms[-1] > 1e6
    assert not [one for one in trace.health() if "gradient" in one.kind]


def test_vanishing_gradient() -> None:
    layer = broken(CELLS.RNN, lambda one: one.weight_hh_l0.copy_(0.2 * torch.eye(6)), nonlinearity="relu")
    with torch.no_grad():
        layer.weight_ih_l0.abs_()
    x = inputs(20).abs() + 1
    finding = only(report(layer, x, last_sum), "gradient vanishes")
    assert finding.values["growth"] == pytest.approx(0.2)
    assert finding.steps == (19 - math.ceil(math.log(1e-4) / math.log(0.2)),)
    everywhere = report(layer, x, lambda y: y.sum())
    assert not everywhere.findings  # the loss of every step has its own gradient
    nothing = report(layer, x, lambda output: (0 * output).sum())
    assert "the loss doesn't depend on this layer" in only(nothing, "no gradient").message


@pytest.mark.parametrize("cell", [CELLS.RNN, CELLS.LSTM, CELLS.MinGRU])
@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_ignored_input(cell: Any, scale: float) -> None:
    layer = broken(cell, lambda one: one.weight_ih_l0.mul_(scale))
    state = tuple(torch.randn(1, 5, 6).double() for _ in layer.cell.state)
    found = ur.trace(layer, inputs(10), state if len(state) > 1 else state[0]).health()
    finding = only(found, "ignores input")
    assert finding.values["share"] < 1e-6
    assert finding.values["share"] == 0 or scale
    largest = number(layer.weight_ih_l0.abs().max().item())
    cause = f"the largest number of weight_ih is {largest}" if scale else "all numbers of weight_ih are 0"
    assert f"The cause is that {cause}." in finding.message


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_explained_variance(decay: float) -> None:
    """For h = decay·h + x with random inputs, the variance of h is var(x) / (1 − decay²)."""
    generator = torch.Generator().manual_seed(0)
    x, other_x, h, other_h = torch.randn(4, 100_000, 1, generator=generator).double()
    h, other_h = (state / (1 - decay**2) ** 0.5 for state in (h, other_h))
    of_input = explained_variance([decay * h + x], [decay * h + other_x])
    of_past = explained_variance([decay * h + x], [decay * other_h + x])
    assert of_input == pytest.approx(1 - decay**2, rel=0.02)
    assert of_past == pytest.approx(decay**2, rel=0.02)


def test_ignored_past() -> None:
    layer = broken(CELLS.RNN, lambda one: one.weight_hh_l0.zero_())
    found = report(layer)
    assert "all numbers of weight_hh are 0" in only(found, "ignores past").message
    assert only(found, "zero weights").quantity == "weight_hh"
    both = broken(CELLS.LSTM, lambda one: (one.weight_hh_l0.zero_(), one.bias_ih_l0[6:12].fill_(-40)))
    assert {"gate shut", "ignores past"} <= {one.kind for one in report(both)}


def test_unused_parameters() -> None:
    finding = only(report(broken(UnusedBias, lambda one: None)), "unused parameter")
    assert (finding.severity, finding.parameter) == ("note", ("bias", 6))
    assert "The bias bias[6:12] has no effect: with other numbers in it" in finding.message
    block = only(report(broken(CELLS.LSTM, lambda one: one.weight_hh_l0[6:12].zero_())), "zero weights")
    assert (block.message, block.parameter) == (
        "The weights W_hf are all zero, so nothing passes through them.", ("weight_hh", 6),
    )  # fmt: skip

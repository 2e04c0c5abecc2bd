"""`Trace.health` on layers whose states and gradients grow or vanish, or that ignore what they should use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

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
    everywhere = report(layer, x, lambda output: output.sum())
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

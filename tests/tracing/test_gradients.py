"""Gradients through time against loops by hand, finite differences and torch.nn, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_trace import by_hand
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import assert_close
from unrolled.tracing.backward import loss_from_gradients
from unrolled.tracing.gradient_flow import Flow, flow, spectral_radii


@pytest.mark.parametrize("kind", ["rnn-tanh", "gru", "lstm"])
def test_every_quantity_against_a_loop_by_hand(kind: str) -> None:
    make = {"rnn-tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind]
    module = make(3, 4, dtype=torch.float64)
    x, weights = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 4).double()
    t = ur.trace(module, x).backward(lambda output: (output * weights).sum().sin())

    states = tuple(torch.zeros(2, 4).double().requires_grad_() for _ in range(2 if kind == "lstm" else 1))
    named, outputs = [], []
    for step in range(5):
        found = by_hand(kind, lambda name: getattr(module, name + "_l0"), x[step], states)
        found = {name: value for name, value in found.items() if value.requires_grad}
        for value in found.values():
            value.retain_grad()
        states = (found["h"], found["c"]) if "c" in found else (found["h"],)
        named.append(found)
        outputs.append(found["h"])
    (torch.stack(outputs) * weights).sum().sin().backward()
    for name in t.names:
        if name in named[0]:
            expected = torch.stack([found[name].grad for found in named])
            assert_close(t.gradient(name), expected, 1e-12)
    assert module.weight_hh_l0.grad is not None  # of the loop: the trace left the module's own alone
    assert set(t.layers[0].gradients) == set(t.names)


def test_all_layers_directions_and_packed_rows_by_finite_differences() -> None:
    module = ur.LSTM(2, 3, num_layers=2, bidirectional=True, dropout=0.5, dtype=torch.float64)
    x = pack_sequence([torch.randn(n, 2).double() for n in (2, 4, 3)], enforce_sorted=False)
    torch.manual_seed(5)
    t = ur.trace(module, x).backward(lambda output: output.data.square().sum())
    for part in t.layers:
        h = part.gradient("h")
        assert h.shape == part["h"].shape
        past = torch.arange(4).unsqueeze(1) >= part.lengths
        assert not h[past].any()
    # a change of c before the step that runs first reaches the loss through f·c
    part, move = t.layer(0, "backward"), 1e-6
    state = [torch.zeros(4, 3, 3).double() for _ in range(2)]
    losses = []
    for sign in (1, -1):
        state[1][1, 1, 2] = sign * move
        torch.manual_seed(5)
        losses.append(module(x, tuple(state))[0].data.square().sum().item())
    by_differences = (losses[0] - losses[1]) / (2 * move)
    assert by_differences == pytest.approx(float((part.gradient("c") * part["f"])[3, 1, 2]), rel=1e-6)


def test_losses_of_every_kind() -> None:
    module = ur.LSTM(2, 3, batch_first=True)
    x = torch.randn(2, 5, 2)
    target = torch.randn(2, 5, 3)
    t = ur.trace(module, x)
    by_target = t.backward(target).gradient("h").clone()
    by_function = t.backward(lambda output: nn.functional.mse_loss(output, target)).gradient("h")
    assert_close(by_target, by_function, 1e-6)
    last = t.backward(lambda output, state: state[1].sum()).gradient("c")
    assert (last[-1] == 1).all()
    assert t.backward(torch.sum).gradient("h")[-1].eq(1).all()
    ones = t.backward(loss_from_gradients(None, (None, torch.ones(1, 2, 3)))).gradient("c")
    assert_close(ones, last, 1e-6)


def test_it_is_of_the_parameters_that_were() -> None:
    module = ur.GRU(2, 3)
    t = ur.trace(module, torch.randn(4, 1, 2))
    before = t.backward(torch.sum).gradient("h").clone()
    with torch.no_grad():
        module.weight_hh_l0.mul_(3)
    assert torch.equal(t.backward(torch.sum).gradient("h"), before)
    with torch.inference_mode():
        inside = ur.trace(module, torch.randn(4, 1, 2))
        assert inside.backward(torch.sum).gradient("h").shape == (4, 1, 3)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        ("mse", TypeError, "a function of the output or a tensor, the target, got str"),
        (torch.zeros(3), ValueError, r"the output's shape \(4, 1, 3\), got a tensor of the shape \(3,\)$"),
        (torch.zeros(()), ValueError, r"already, record\(model, gradients=True\)$"),
        (lambda output: output, ValueError, r"got a tensor of shape \(4, 1, 3\)"),
        (lambda output: 3.0, ValueError, "got float"),
        (lambda output: torch.ones(()), ValueError, "got one that doesn't"),
        (lambda output: torch.ones((), requires_grad=True), ValueError, "got one that doesn't"),
        (lambda output: output.sum() * 1j, ValueError, "got a complex one"),
        (nn.functional.mse_loss, TypeError, "give lambda output"),
        (nn.MSELoss(), TypeError, "give lambda output"),
    ],
)
def test_bad_losses(loss: Any, error: type[Exception], words: str) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(4, 1, 2))
    with pytest.raises(ValueError, match="call backward .* a function of the .* or record with"):
        t.gradient("h")
    with pytest.raises(error, match=words):
        t.backward(loss)
    t.backward(torch.sum)
    with pytest.raises(ValueError, match="x is the input: there are gradients of input_sum"):
        t.gradient("x")
    with pytest.raises(KeyError, match="no quantity 'y'"):
        t.gradient("y")


def test_spectral_radii() -> None:
    layer = ur.GRU(2, 3)
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 0.1]])
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.cat([turn * 2, torch.diag(torch.tensor([0.5, -3, 1])), turn * 0]))
    found = spectral_radii(ur.trace(layer, torch.randn(1, 1, 2)).layers[0].cell)
    assert list(found) == ["weight_hh"]
    assert found["weight_hh"] == pytest.approx([2, 3, 0], abs=1e-6)
    lstm = ur.LSTM(3, 3)
    (radii,) = spectral_radii(ur.trace(lstm, torch.randn(1, 1, 3)).layers[0].cell).values()
    blocks = lstm.weight_hh_l0.detach().double().numpy().reshape(4, 3, 3)
    assert radii == pytest.approx([abs(np.linalg.eigvals(block)).max() for block in blocks], rel=1e-6)
    with torch.no_grad():
        lstm.weight_hh_l0.copy_(torch.cat([torch.ones(3, 3).triu(1), turn * 1e-30, turn * 0, turn * 1e30]))
    (radii,) = spectral_radii(ur.trace(lstm, torch.randn(1, 1, 3)).layers[0].cell).values()
    assert radii == pytest.approx([0, 1e-30, 0, 1e30], rel=1e-6, abs=0)
    projected = ur.trace(ur.LSTM(4, 4, proj_size=2), torch.randn(1, 1, 4))
    assert not spectral_radii(projected.layers[0].cell)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = math.nan
    assert not spectral_radii(ur.trace(layer, torch.randn(1, 1, 2)).layers[0].cell)


class Scaled(ur.Cell):
    """Multiplies the state by what it reads: ∂loss/∂h of a step is that of the next one times its x."""

    def step(self, x, h):
        h = x * h + 1
        return h


def way_back(x: list[float], loss: Any = lambda output: output[-1].sum()) -> Flow:
    layer = ur.Recurrent(Scaled, 1, 1, dtype=torch.float64)
    t = ur.trace(layer, torch.tensor(x, dtype=torch.float64).unsqueeze(1)).backward(loss)
    return flow(t.layers[0], "h")


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.5, "fades by a factor of 0.5 a step on its way back: from 1 at step 7 to 0.00781 at step 0"),
        (-0.5, "fades by a factor of 0.5 a step on its way back: from 1 at step 7 to 0.00781 at step 0"),
        (2.0, "grows by a factor of 2 a step on its way back: from 1 at step 7 to 128 at step 0"),
        (
            -0.95,
            "neither fades nor grows on its way back, with a factor of 0.95 a step: from 1 at step 7 to "
            "0.698 at step 0",
        ),
    ],
)
def test_a_linear_recurrence_has_its_factor(factor: float, words: str) -> None:
    found = way_back([factor] * 8)
    assert found.norms == pytest.approx([abs(factor) ** (7 - step) for step in range(8)], rel=1e-14)
    assert found.factor == pytest.approx(abs(factor), rel=1e-14)
    assert found.trend == words.split()[0]
    assert found.steepest is None
    assert found.words == f"the gradient of h {words}"


@pytest.mark.parametrize(
    ("x", "trend", "factor", "steepest", "words"),
    [
        ([2, 0.1, 0.5], "fades", 0.1 ** (1 / 3), (1, 0.1), "steepest fall, by a factor of 0.1, is at step 1"),
        ([4, 0.5, 2], "grows", 4 ** (1 / 3), (0, 4), "steepest rise, by a factor of 4, is at step 0"),
        ([4, 0.2, 1], "neither", 0.8 ** (1 / 3), (1, 0.2), "steepest fall, by a factor of 0.2, is at step 1"),
        ([0.95] * 20, "fades", 0.95, None, "h fades by a factor of 0.95 a step"),
        ([1.05] * 20, "grows", 1.05, None, "h grows by a factor of 1.05 a step"),
        ([0.8], "fades", 0.8, None, "from 1 at step 1 to 0.8 at step 0"),
        ([1.2], "grows", 1.2, None, "from 1 at step 1 to 1.2 at step 0"),
        ([], None, None, None, "the gradient of h is 1 at step 0"),
        ([0], "fades", None, None, "the gradient of h is 1 at step 1; it is exactly 0 at step 0"),
        ([2, 0, 1], "fades", 1, None,
         "h changes by a factor of 1 a step on its way back: from 1 at step 3 to 1 at step 2; "
         "it is exactly 0 from step 1 back"),
        ([2, math.nan, 0.5], "fades", 0.5, None, "to 0.5 at step 2; it is NaN from step 1 back"),
        ([1, math.inf, 1], "grows", 1, None,
         "h changes by a factor of 1 a step on its way back: from 1 at step 3 to 1 at step 2; "
         "it is infinite from step 1 back"),
        ([0, math.inf, 2, 3], "grows", 6**0.5, (3, 3), "is infinite at step 1; it is NaN at step 0; "),
        ([1e-200, 1e-110, 1e-10], "fades", 1e-320 ** (1 / 3), (0, 1e-200), "to 1e-320 at step 0; the stee"),
        ([1e200, 1e100], "grows", 1e150, (0, 1e200), "h grows by a factor of 1e+150 a step"),
    ],
)  # fmt: skip
def test_what_becomes_of_it(
    x: list[float],
    trend: str | None,
    factor: float | None,
    steepest: tuple[int, float] | None,
    words: str,
) -> None:
    found = way_back([9, *x])  # what the first step reads doesn't stand between two states
    assert found.trend == trend
    assert found.factor == (None if factor is None else pytest.approx(factor, rel=1e-3, abs=0))
    assert found.steepest == (None if steepest is None else pytest.approx(steepest, rel=1e-3, abs=0))
    assert words in found.words
    assert ("steepest" in found.words) == (steepest is not None)


def test_steps_that_no_gradient_reaches() -> None:
    found = way_back([9, 2, 1, 3, 0.5], lambda output: output[3].sum() + 4 * output[1].sum())
    assert found.norms == (2 * 7, 1 * 3 + 4, 3, 1, 0)
    assert found.words == (
        "the gradient of h grows by a factor of 2.41 a step on its way back: from 1 at step 3 to 14 at step "
        "0; it is exactly 0 at step 4; the steepest rise, by a factor of 3, is at step 2"
    )
    found = way_back([9, 2, 0, 1], lambda output: output[2].sum())
    assert found.words == "the gradient of h is 1 at step 2; it is exactly 0 at step 3 and from step 1 back"
    found = way_back([9, 0, 1, 0, 1, 0, 1], lambda output: (output[1] + output[3] + output[5]).sum())
    assert found.words.endswith("; it is exactly 0 at 4 of the 7 steps")
    found = way_back([9, 2, 1], lambda output: output.sum() * 0)
    assert found.words == "the gradient of h is exactly 0 at every step"
    assert found.trend is None
    # no neighbour falls on the way from 0.1 over 0 to 0.04
    found = way_back([9, 2, 0, 2], lambda output: (0.1 * output[3] + 0.01 * output[1]).sum())
    assert found.norms == pytest.approx((0.02, 0.01, 0.2, 0.1))
    assert (found.trend, found.steepest) == ("fades", (1, pytest.approx(0.05)))


def test_a_rise_beyond_float64() -> None:
    found = way_back([9, 1, 1, 1], lambda output: (1e-320 * output[3] + output[1]).sum())
    assert found.steepest == (1, math.inf)


def test_the_way_back_of_a_reversed_direction_and_of_a_shorter_row() -> None:
    layer = ur.Recurrent(Scaled, 1, 1, bidirectional=True, dtype=torch.float64)
    rows = [torch.tensor(x).double().unsqueeze(1) for x in ([3.0, 3, 3, 9, 3], [0.5, 2.0, 9])]
    t = ur.trace(layer, pack_sequence(rows)).backward(lambda output: output.data[:2, 1].sum())
    backward = t.layer(0, "backward")
    assert flow(backward, "h", 0).norms == (1, 3, 9, 27, 243)
    found = flow(backward, "h", -1)
    assert found.norms == (1, 0.5, 1)
    assert found.words == (
        "the gradient of h neither fades nor grows on its way back, with a factor of 1 a step: from 1 at "
        "step 0 to 1 at step 2; the steepest fall, by a factor of 0.5, is at step 1"
    )
    rows[1][0] = 0
    t = ur.trace(layer, pack_sequence(rows)).backward(lambda output: output.data[:2, 1].sum())
    assert flow(t.layer(0, "backward"), "h", 1).words.endswith("it is exactly 0 from step 1 on")
    assert flow(t.layer(0, "forward"), "h", 1).words.endswith("is exactly 0 at every step")
    with pytest.raises(IndexError, match="there is no row 2: there are 2"):
        flow(backward, "h", 2)


def test_norms_are_over_all_numbers_of_a_quantity() -> None:
    t = ur.trace(ur.LSTM(2, 3, dtype=torch.float64), torch.randn(5, 2).double()).backward(torch.sum)
    for name in t.names:
        squares = t.gradient(name)[:, 0].square().sum(-1)
        assert flow(t.layers[0], name).norms == pytest.approx(squares.sqrt().tolist(), rel=1e-12)


def test_losses_that_can_not_be_or_change_what_they_are_given() -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(5, 2, 2))
    for loss, words in (
        (lambda output, state, target_of: output.sum(), "this one takes 3 arguments"),
        (lambda: torch.zeros(()), "this one takes no arguments"),
    ):
        with pytest.raises(TypeError, match=words):
            t.backward(loss)
    with pytest.raises(ValueError, match="the target should be of real numbers"):
        t.backward(torch.zeros(5, 2, 3, dtype=torch.complex64))
    expected = t.backward(lambda _, state: (2 * state[0]).sum()).gradient("h").clone()
    assert torch.equal(t.backward(lambda _, state: state[0].mul_(2).sum()).gradient("h"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(t.backward(lambda _, state: (2 * state[0]).sum()).gradient("h"), expected)
        assert t.check() < 1e-6
        with pytest.raises(ValueError, match="a trace doesn't follow autocast: call trace outside of it"):
            ur.trace(t.module, t.input)


def test_complex_numbers() -> None:
    layer = ur.Recurrent(Scaled, 1, 1, dtype=torch.complex128)
    x, target = torch.randn(4, 2, 1, dtype=torch.complex128), torch.randn(4, 2, 1, dtype=torch.complex128)
    with ur.record(layer, gradients=True) as rec:
        (layer(x.clone().requires_grad_())[0] - target).abs().square().mean().backward()
    states = [torch.ones(2, 1, dtype=torch.complex128, requires_grad=True)]
    for step in range(1, 4):
        states.append(x[step] * states[-1] + 1)
        states[-1].retain_grad()
    (torch.stack(states) - target).abs().square().mean().backward()
    expected = torch.stack([h.grad for h in states if h.grad is not None])
    for found in (rec[""], ur.trace(layer, x).backward(target)):
        assert_close(torch.view_as_real(found.gradient("h")), torch.view_as_real(expected), 1e-12)

"""Gradients through time compared with loops by hand, finite differences and torch.nn, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from helpers.layer_pairs import assert_close
from helpers.step_by_hand import step_by_hand
from unrolled.tracing.backward import loss_from_gradients
from unrolled.tracing.gradient_flow import GradientFlow, gradient_flow, spectral_radii


@pytest.mark.parametrize("kind", ["rnn-tanh", "gru", "lstm"])
def test_gradients_match_a_loop_by_hand(kind: str) -> None:
    make = {"rnn-tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind]
    module = make(3, 4, dtype=torch.float64)
    x, weights = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 4).double()
    t = ur.trace(module, x).backward(lambda output: (output * weights).sum().sin())

    states = tuple(torch.zeros(2, 4).double().requires_grad_() for _ in range(2 if kind == "lstm" else 1))
    named, outputs = [], []
    for step in range(5):
        quantities = step_by_hand(kind, lambda name: getattr(module, name + "_l0"), x[step], states)
        quantities = {name: value for name, value in quantities.items() if value.requires_grad}
        for value in quantities.values():
            value.retain_grad()
        states = (quantities["h"], quantities["c"]) if "c" in quantities else (quantities["h"],)
        named.append(quantities)
        outputs.append(quantities["h"])
    (torch.stack(outputs) * weights).sum().sin().backward()
    for name in t.names:
        if name in named[0]:
            expected = torch.stack([quantities[name].grad for quantities in named])
            assert_close(t.gradient(name), expected, 1e-12)
    assert (
        module.weight_hh_l0.grad is not None
    )  # from the loop: the trace doesn't change the module's gradients
    assert set(t.layers[0].gradients) == set(t.names)


def test_layers_directions_and_packed_rows_match_finite_differences() -> None:
    module = ur.LSTM(2, 3, num_layers=2, bidirectional=True, dropout=0.5, dtype=torch.float64)
    x = pack_sequence([torch.randn(n, 2).double() for n in (2, 4, 3)], enforce_sorted=False)
    torch.manual_seed(5)
    t = ur.trace(module, x).backward(lambda output: output.data.square().sum())
    for part in t.layers:
        h = part.gradient("h")
        assert h.shape == part["h"].shape
        padding = torch.arange(4).unsqueeze(1) >= part.lengths
        assert not h[padding].any()
    # A change of c before the first step that runs reaches the loss through f·c.
    part, delta = t.layer(0, "backward"), 1e-6
    state = [torch.zeros(4, 3, 3).double() for _ in range(2)]
    losses = []
    for sign in (1, -1):
        state[1][1, 1, 2] = sign * delta
        torch.manual_seed(5)
        losses.append(module(x, tuple(state))[0].data.square().sum().item())
    by_differences = (losses[0] - losses[1]) / (2 * delta)
    assert by_differences == pytest.approx(float((part.gradient("c") * part["f"])[3, 1, 2]), rel=1e-6)


def test_kinds_of_losses() -> None:
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


def test_gradient_uses_the_recorded_parameters() -> None:
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
        ("mse", TypeError, "a function of the output or a target tensor, got str"),
        (torch.zeros(3), ValueError, r"the output's shape \(4, 1, 3\), but got a tensor of shape \(3,\)$"),
        (torch.zeros(()), ValueError, r"already computed, use record\(model, gradients=True\)$"),
        (lambda output: output, ValueError, r"a scalar tensor, got one of shape \(4, 1, 3\)"),
        (lambda output: 3.0, ValueError, "a scalar tensor, got float"),
        (lambda output: torch.ones(()), ValueError, "must depend on the layer's output, but it doesn't"),
        (
            lambda output: torch.ones((), requires_grad=True),
            ValueError,
            "must depend on the layer's output, but it doesn't",
        ),
        (lambda y: y.sum() * 1j, ValueError, "a real number, got a complex one"),
        (nn.functional.mse_loss, TypeError, "use lambda output"),
        (nn.MSELoss(), TypeError, "use lambda output"),
    ],
)
def test_invalid_losses(loss: Any, error: type[Exception], words: str) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(4, 1, 2))
    with pytest.raises(ValueError, match=r"call trace.backward\(target\) or .* first, or use record"):
        t.gradient("h")
    with pytest.raises(error, match=words):
        t.backward(loss)
    t.backward(torch.sum)
    with pytest.raises(ValueError, match="x is the input, which has no gradient here: choose from input_sum"):
        t.gradient("x")
    with pytest.raises(KeyError, match="no quantity 'y'"):
        t.gradient("y")


def test_spectral_radii() -> None:
    layer = ur.GRU(2, 3)
    angle = torch.tensor(0.7)
    rotation = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 0.1]])
    with torch.no_grad():
        layer.weight_hh_l0.copy_(
            torch.cat([rotation * 2, torch.diag(torch.tensor([0.5, -3, 1])), rotation * 0])
        )
    radii = spectral_radii(ur.trace(layer, torch.randn(1, 1, 2)).layers[0].cell)
    expected = {"weight_hh[r]": 2, "weight_hh[z]": 3, "weight_hh[n]": 0}
    assert radii == pytest.approx(expected, abs=1e-6)
    lstm = ur.LSTM(3, 3)
    radii = spectral_radii(ur.trace(lstm, torch.randn(1, 1, 3)).layers[0].cell)
    assert list(radii) == [f"weight_hh[{gate}]" for gate in "ifgo"]
    blocks = lstm.weight_hh_l0.detach().double().numpy().reshape(4, 3, 3)
    assert list(radii.values()) == pytest.approx(
        [abs(np.linalg.eigvals(block)).max() for block in blocks], rel=1e-6
    )
    with torch.no_grad():
        lstm.weight_hh_l0.copy_(
            torch.cat([torch.ones(3, 3).triu(1), rotation * 1e-30, rotation * 0, rotation * 1e30])
        )
    radii = spectral_radii(ur.trace(lstm, torch.randn(1, 1, 3)).layers[0].cell)
    assert list(radii.values()) == pytest.approx([0, 1e-30, 0, 1e30], rel=1e-6, abs=0)
    projected = ur.trace(ur.LSTM(4, 4, proj_size=2), torch.randn(1, 1, 4))
    assert not spectral_radii(projected.layers[0].cell)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = math.nan
    assert not spectral_radii(ur.trace(layer, torch.randn(1, 1, 2)).layers[0].cell)


class ScaledState(ur.Cell):
    """Multiplies the state by its input, so that ∂loss/∂h is that of the next step times the next input."""

    def step(self, x, h):
        h = x * h + 1
        return h


def flow_of_scaled_state(x: list[float], loss: Any = lambda output: output[-1].sum()) -> GradientFlow:
    layer = ur.Recurrent(ScaledState, 1, 1, dtype=torch.float64)
    t = ur.trace(layer, torch.tensor(x, dtype=torch.float64).unsqueeze(1)).backward(loss)
    return gradient_flow(t.layers[0], "h")


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.5, "shrinks by a factor of 0.5 per step backward in time: from 1 at step 7 to 0.00781 at step 0"),
        (-0.5, "shrinks by a factor of 0.5 per step backward in time: from 1 at step 7 to 0.00781 at step 0"),
        (2.0, "grows by a factor of 2 per step backward in time: from 1 at step 7 to 128 at step 0"),
        (
            -0.95,
            "is stable backward in time, with a factor of 0.95 per step: from 1 at step 7 to 0.698 at step 0",
        ),
    ],
)
def test_factor_of_a_linear_recurrence(factor: float, words: str) -> None:
    flow = flow_of_scaled_state([factor] * 8)
    assert flow.norms == pytest.approx([abs(factor) ** (7 - step) for step in range(8)], rel=1e-14)
    assert flow.factor == pytest.approx(abs(factor), rel=1e-14)
    assert flow.trend == words.removeprefix("is ").split()[0]
    assert flow.steepest is None
    assert flow.summary == f"the gradient of h {words}"


@pytest.mark.parametrize(
    ("x", "trend", "factor", "steepest", "words"),
    [
        ([2, 0.1, 0.5], "shrinks", 0.1 ** (1 / 3), (1, 0.1),
         "largest drop, by a factor of 0.1, is at step 1"),
        ([4, 0.5, 2], "grows", 4 ** (1 / 3), (0, 4), "largest rise, by a factor of 4, is at step 0"),
        ([4, 0.2, 1], "stable", 0.8 ** (1 / 3), (1, 0.2), "largest drop, by a factor of 0.2, is at step 1"),
        ([0.95] * 20, "shrinks", 0.95, None, "h shrinks by a factor of 0.95 per step"),
        ([1.05] * 20, "grows", 1.05, None, "h grows by a factor of 1.05 per step"),
        ([0.8], "shrinks", 0.8, None, "from 1 at step 1 to 0.8 at step 0"),
        ([1.2], "grows", 1.2, None, "from 1 at step 1 to 1.2 at step 0"),
        ([], None, None, None, "the gradient of h is 1 at step 0"),
        ([0], "shrinks", None, None, "the gradient of h is 1 at step 1; it is exactly 0 at step 0"),
        ([2, 0, 1], "shrinks", 1, None,
         "h changes by a factor of 1 per step backward in time: from 1 at step 3 to 1 at step 2; "
         "it is exactly 0 from step 1 backward"),
        ([2, math.nan, 0.5], "shrinks", 0.5, None, "to 0.5 at step 2; it is NaN from step 1 backward"),
        ([1, math.inf, 1], "grows", 1, None,
         "h changes by a factor of 1 per step backward in time: from 1 at step 3 to 1 at step 2; "
         "it is infinite from step 1 backward"),
        ([0, math.inf, 2, 3], "grows", 6**0.5, (3, 3), "is infinite at step 1; it is NaN at step 0; "),
        ([1e-200, 1e-110, 1e-10], "shrinks", 1e-320 ** (1 / 3), (0, 1e-200), "to 1e-320 at step 0; the larg"),
        ([1e200, 1e100], "grows", 1e150, (0, 1e200), "h grows by a factor of 1e+150 per step"),
    ],
)  # fmt: skip
def test_trend_factor_and_largest_change(
    x: list[float],
    trend: str | None,
    factor: float | None,
    steepest: tuple[int, float] | None,
    words: str,
) -> None:
    flow = flow_of_scaled_state([9, *x])  # the first input isn't between two states, so it has no effect
    assert flow.trend == trend
    assert flow.factor == (None if factor is None else pytest.approx(factor, rel=1e-3, abs=0))
    assert flow.steepest == (None if steepest is None else pytest.approx(steepest, rel=1e-3, abs=0))
    assert words in flow.summary
    assert ("largest" in flow.summary) == (steepest is not None)


def test_steps_without_gradient() -> None:
    flow = flow_of_scaled_state([9, 2, 1, 3, 0.5], lambda output: output[3].sum() + 4 * output[1].sum())
    assert flow.norms == (2 * 7, 1 * 3 + 4, 3, 1, 0)
    assert flow.summary == (
        "the gradient of h grows by a factor of 2.41 per step backward in time: from 1 at step 3 to 14 at "
        "step 0; it is exactly 0 at step 4; the largest rise, by a factor of 3, is at step 2"
    )
    flow = flow_of_scaled_state([9, 2, 0, 1], lambda output: output[2].sum())
    assert (
        flow.summary == "the gradient of h is 1 at step 2; it is exactly 0 at step 3 and from step 1 backward"
    )
    flow = flow_of_scaled_state(
        [9, 0, 1, 0, 1, 0, 1], lambda output: (output[1] + output[3] + output[5]).sum()
    )
    assert flow.summary.endswith("; it is exactly 0 at 4 of the 7 steps")
    flow = flow_of_scaled_state([9, 2, 1], lambda y: y.sum() * 0)
    assert flow.summary == "the gradient of h is exactly 0 at every step"
    assert flow.trend is None
    # The gradient shrinks across a zero, although it grows between neighboring steps.
    flow = flow_of_scaled_state([9, 2, 0, 2], lambda output: (0.1 * output[3] + 0.01 * output[1]).sum())
    assert flow.norms == pytest.approx((0.02, 0.01, 0.2, 0.1))
    assert (flow.trend, flow.steepest) == ("shrinks", (1, pytest.approx(0.05)))


def test_a_rise_beyond_float64() -> None:
    flow = flow_of_scaled_state([9, 1, 1, 1], lambda output: (1e-320 * output[3] + output[1]).sum())
    assert flow.steepest == (1, math.inf)


def test_flow_of_backward_direction_and_shorter_row() -> None:
    layer = ur.Recurrent(ScaledState, 1, 1, bidirectional=True, dtype=torch.float64)
    rows = [torch.tensor(x).double().unsqueeze(1) for x in ([3.0, 3, 3, 9, 3], [0.5, 2.0, 9])]
    t = ur.trace(layer, pack_sequence(rows)).backward(lambda output: output.data[:2, 1].sum())
    backward = t.layer(0, "backward")
    assert gradient_flow(backward, "h", 0).norms == (1, 3, 9, 27, 243)
    flow = gradient_flow(backward, "h", -1)
    assert flow.norms == (1, 0.5, 1)
    assert flow.summary == (
        "the gradient of h is stable backward in time, with a factor of 1 per step: from 1 at step 0 to 1 at "
        "step 2; the largest drop, by a factor of 0.5, is at step 1"
    )
    rows[1][0] = 0
    t = ur.trace(layer, pack_sequence(rows)).backward(lambda output: output.data[:2, 1].sum())
    assert gradient_flow(t.layer(0, "backward"), "h", 1).summary.endswith(
        "it is exactly 0 from step 1 onward"
    )
    assert gradient_flow(t.layer(0, "forward"), "h", 1).summary.endswith("is exactly 0 at every step")
    with pytest.raises(IndexError, match="row 2 is out of range: there are 2"):
        gradient_flow(backward, "h", 2)


def test_norms_include_all_units() -> None:
    t = ur.trace(ur.LSTM(2, 3, dtype=torch.float64), torch.randn(5, 2).double()).backward(torch.sum)
    for name in t.names:
        squares = t.gradient(name)[:, 0].square().sum(-1)
        assert gradient_flow(t.layers[0], name).norms == pytest.approx(squares.sqrt().tolist(), rel=1e-12)


def test_losses_with_wrong_arguments_or_in_place_changes() -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(5, 2, 2))
    for loss, words in (
        (lambda output, state, target_of: output.sum(), "this one takes 3 arguments"),
        (lambda: torch.zeros(()), "this one takes no arguments"),
    ):
        with pytest.raises(TypeError, match=words):
            t.backward(loss)
    with pytest.raises(ValueError, match="the target must be real"):
        t.backward(torch.zeros(5, 2, 3, dtype=torch.complex64))
    expected = t.backward(lambda _, state: (2 * state[0]).sum()).gradient("h").clone()
    assert torch.equal(t.backward(lambda _, state: state[0].mul_(2).sum()).gradient("h"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(t.backward(lambda _, state: (2 * state[0]).sum()).gradient("h"), expected)
        assert t.check() < 1e-6
        with pytest.raises(ValueError, match="trace doesn't support autocast: call it outside of autocast"):
            ur.trace(t.module, t.input)


def test_complex_numbers() -> None:
    layer = ur.Recurrent(ScaledState, 1, 1, dtype=torch.complex128)
    x, target = torch.randn(4, 2, 1, dtype=torch.complex128), torch.randn(4, 2, 1, dtype=torch.complex128)
    with ur.record(layer, gradients=True) as rec:
        (layer(x.clone().requires_grad_())[0] - target).abs().square().mean().backward()
    states = [torch.ones(2, 1, dtype=torch.complex128, requires_grad=True)]
    for step in range(1, 4):
        states.append(x[step] * states[-1] + 1)
        states[-1].retain_grad()
    (torch.stack(states) - target).abs().square().mean().backward()
    expected = torch.stack([h.grad for h in states if h.grad is not None])
    for trace in (rec[""], ur.trace(layer, x).backward(target)):
        assert_close(torch.view_as_real(trace.gradient("h")), torch.view_as_real(expected), 1e-12)

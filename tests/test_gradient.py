"""Gradients through time against loops by hand, finite differences and torch.nn, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import unrolled as ur
from kinds import assert_close
from test_trace import by_hand
from unrolled.gradient import pulling, spectral_radii


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
    ones = t.backward(pulling(None, (None, torch.ones(1, 2, 3)))).gradient("c")
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
        (torch.zeros(3), ValueError, r"shape of the output, \(4, 1, 3\), got \(3,\)"),
        (lambda output: output, ValueError, r"got a tensor of shape \(4, 1, 3\)"),
        (lambda output: 3.0, ValueError, "got float"),
        (lambda output: torch.ones(()), ValueError, "got one that doesn't"),
    ],
)
def test_bad_losses(loss: Any, error: type[Exception], words: str) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(4, 1, 2))
    with pytest.raises(ValueError, match=r"call backward\(loss\)"):
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
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = math.nan
    assert not spectral_radii(ur.trace(layer, torch.randn(1, 1, 2)).layers[0].cell)

"""NaN and infinity in an episode stay out of the gradients of the other episodes of the row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample

pytestmark = NEEDS_COMPILER

LAYERS = {
    "RNN": (lambda **kwargs: ur.RNN(3, 4, **kwargs), nn.RNN),
    "LSTM": (lambda **kwargs: ur.LSTM(3, 4, **kwargs), nn.LSTM),
    "GRU": (lambda **kwargs: ur.GRU(3, 4, **kwargs), nn.GRU),
}
# For each row: its episodes as (first step, end, whether it contains NaN).
ROWS = [[(0, 3, True), (3, 8, False)], [(0, 2, False), (2, 5, True), (5, 8, False)], [(0, 8, False)]]
TIME = 8


def inputs(value: float, feature: int | None = 1) -> tuple[Tensor, Tensor]:
    """An input with a value in the second step of the marked episodes, and its resets."""
    x, resets = torch.randn(TIME, len(ROWS), 3), torch.zeros(TIME, len(ROWS), dtype=torch.bool)
    for row, episodes in enumerate(ROWS):
        for first, _, is_bad in episodes:
            resets[first, row] = first > 0
            if is_bad:
                x[first + 1, row, slice(None) if feature is None else feature] = value
    return x, resets


def good_outputs(output: Tensor) -> Tensor:
    return torch.cat([output[a:b, k] for k, row in enumerate(ROWS) for a, b, bad in row if not bad])


def separate_gradients(twin: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """The gradients of torch's layer, called with one episode at a time."""
    parts = [twin(x[a:b, k : k + 1])[0][:, 0] for k, row in enumerate(ROWS) for a, b, bad in row if not bad]
    return list(torch.autograd.grad(torch.cat(parts).square().sum(), [*twin.parameters(), x]))


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("arguments", sample([{}, {"num_layers": 2}, {"bidirectional": True}]), ids=str)
@pytest.mark.parametrize("kind", sample(LAYERS, ["GRU"]))
def test_gradients_are_those_of_the_episodes_alone(
    kind: str, arguments: dict[str, Any], value: float, engine: str
) -> None:
    create, torch_class = LAYERS[kind]
    layer = create(**arguments)
    twin = torch_class(3, 4, **arguments)
    twin.load_state_dict(layer.state_dict())
    x, resets = inputs(value)
    expected = separate_gradients(twin, x.requires_grad_())
    with ur.engine(engine):
        output, final = layer(x, resets=resets)
        loss = good_outputs(output).square().sum()
        gradients = torch.autograd.grad(loss, [*layer.parameters(), x])
        with torch.no_grad():
            plain_output, plain_final = layer(x, resets=resets)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, plain_output, equal_nan=True)
    torch.testing.assert_close(final, plain_final, equal_nan=True)


@pytest.mark.parametrize("all_states", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.slow
def test_rows_of_different_lengths(bidirectional: bool, all_states: bool) -> None:
    layer = ur.LSTM(3, 4, bidirectional=bidirectional)
    twin = nn.LSTM(3, 4, bidirectional=bidirectional)
    twin.load_state_dict(layer.state_dict())
    x, resets = inputs(math.nan)
    x, lengths = torch.cat((x, torch.full_like(x[:2], math.nan))), torch.tensor([8, 8, 8])
    resets = torch.cat((resets, torch.zeros_like(resets[:2])))
    x.requires_grad_()
    expected = separate_gradients(twin, x)
    output, _, *_ = layer(x, lengths=lengths, resets=resets, all_states=all_states)
    gradients = torch.autograd.grad(good_outputs(output).square().sum(), [*layer.parameters(), x])
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)
    uneven = layer(x, lengths=[8, 6, 3], resets=resets)[0]
    gradients = torch.autograd.grad(uneven[3:6, 0].sum() + uneven[:3, 2].sum(), list(layer.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_an_initial_state_of_nan_that_a_reset_replaces() -> None:
    layer, twin = ur.GRU(3, 4), nn.GRU(3, 4)
    twin.load_state_dict(layer.state_dict())
    x, state = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    state[:, 0] = math.nan
    state.requires_grad_()
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[2, 0] = True
    output, _ = layer(x, state, resets=resets, reset_state="initial")
    assert output[:2, 0].isnan().all()
    loss = output[2:, 0].square().sum() + output[:, 1].square().sum()
    gradients = torch.autograd.grad(loss, [*layer.parameters(), state])
    alone = twin(x[2:, :1])[0].square().sum() + twin(x[:, 1:], state[:, 1:])[0].square().sum()
    expected = torch.autograd.grad(alone, [*twin.parameters(), state])
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", sample(["native", "reference"]))
@pytest.mark.parametrize("lengths", [None, [6, 5]])
def test_an_infinite_cell_state_that_leaves_the_output_finite(engine: str, lengths: list[int] | None) -> None:
    layer, twin = ur.LSTM(3, 4, bidirectional=True), nn.LSTM(3, 4, bidirectional=True)
    twin.load_state_dict(layer.state_dict())
    x, zeros = torch.randn(6, 2, 3), torch.zeros(2, 2, 4)
    c = zeros.clone()
    c[0, 0], c[1, 1] = math.inf, -math.inf
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3] = True
    with ur.engine(engine):
        output, _ = layer(x, (zeros, c), resets=resets, reset_state=(zeros, zeros), lengths=lengths)
    assert output[:3, 0, :4].isfinite().all()  # as tanh(inf) is 1
    loss = output[3:, 0, :4].square().sum() + output[:3, 1, 4:].square().sum()
    forward, backward = twin(x[3:, :1])[0], twin(x[:3, 1:])[0]
    alone = forward[..., :4].square().sum() + backward[..., 4:].square().sum()
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    expected = torch.autograd.grad(alone, list(twin.parameters()))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


def test_nan_in_the_last_episode_reaches_the_gradients() -> None:
    """The loss may depend on it, so it isn't hidden."""
    layer, (x, resets) = ur.GRU(3, 4), inputs(math.nan)
    x[6, 0] = math.nan
    layer(x, resets=resets)[0].sum().backward()
    assert all(bool(parameter.grad.isnan().any()) for parameter in layer.parameters())  # type: ignore[union-attr]

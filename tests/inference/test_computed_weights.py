"""Weights that are computed in each call, and modes that change between calls: never old numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER

KINDS = {"LSTM": ur.LSTM, "GRU": ur.GRU, "RNN": ur.RNN}


class WeightDrop(nn.Module):
    """Sets a dropped weight at each call, as implementations of AWD-LSTM do."""

    def __init__(self, layer: nn.Module, name: str, as_attribute: bool) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        self.raw = nn.Parameter(layer._parameters.pop(name).data)  # type: ignore[union-attr]
        self.as_attribute = as_attribute

    def forward(self, x: Tensor, *state: Any) -> Any:
        target = vars(self.layer) if self.as_attribute else self.layer._parameters
        target[self.name] = nn.functional.dropout(self.raw, 0.5, self.training)
        return self.layer(x, *state)


class Noise(nn.Module):
    """A parametrization that draws in training."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.3 * torch.randn_like(weight) if self.training else 2 * weight


def weight_drop(layer: nn.Module) -> nn.Module:
    return WeightDrop(layer, "weight_hh_l0", as_attribute=True)


def weight_drop_of_inputs(layer: nn.Module) -> nn.Module:
    return WeightDrop(layer, "weight_ih_l0", as_attribute=True)


def weight_drop_among_parameters(layer: nn.Module) -> nn.Module:
    """As fastai does."""
    return WeightDrop(layer, "weight_hh_l0", as_attribute=False)


def noisy_parametrization(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight_hh_l0", Noise())


def weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer, "weight_hh_l0")


def spectral_norm(layer: nn.Module) -> nn.Module:
    """It takes a step of the power iteration in each training call."""
    return parametrizations.spectral_norm(layer, "weight_hh_l0")


def hook(layer: nn.Module) -> nn.Module:
    """A forward pre-hook that changes a parameter in place."""

    def scale(module: nn.Module, _: Any) -> None:
        if module.training:
            with torch.no_grad():
                module.weight_hh_l0.mul_(0.9)  # type: ignore[operator,union-attr]

    layer.register_forward_pre_hook(scale)
    return layer


def dropout(layer: nn.Module) -> nn.Module:
    layer.dropout = 0.4  # type: ignore[assignment]
    return layer


WRAPPERS = [
    *(weight_drop, weight_drop_of_inputs, weight_drop_among_parameters),
    *(noisy_parametrization, weight_norm, spectral_norm, dropout),
]


def model_and_copy(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = wrap(KINDS[kind](4, 6, 1 + (wrap is dropout)))
    return model, copy.deepcopy(model)


def outputs(model: nn.Module, xs: list[Tensor], modes: list[bool], context: Any) -> list[Tensor]:
    """The outputs of a model for inputs one after another, each in a mode: training or evaluation."""
    torch.manual_seed(7)
    results = []
    with torch.no_grad(), context:
        for x, training in zip(xs, modes, strict=False):
            results.append(model.train(training)(x)[0])
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [*WRAPPERS, hook])
def test_frozen_never_uses_old_weights(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, copied = model_and_copy(kind, wrap)
    xs = [torch.randn(3, 2, 4) for _ in range(6)]
    modes = [True, True, False, False]
    if wrap is not weight_drop_among_parameters:  # which in evaluation sets a parameter: then it has changed
        modes += [True, False]
    expected = outputs(copied, xs, modes, nullcontext())
    if wrap is hook:
        with pytest.raises(RuntimeError, match="weight_hh_l0 was changed inside unrolled.frozen"):
            outputs(model, xs, modes, ur.frozen(model))
        return
    for output, other in zip(outputs(model, xs, modes, ur.frozen(model)), expected, strict=True):
        assert torch.equal(output, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [*WRAPPERS, hook])
def test_a_stream_never_uses_old_weights(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, copied = model_and_copy(kind, wrap)
    xs = [torch.randn(1, 2, 4) for _ in range(8)]
    modes = [True, True, False, False, True, False, True, False]
    torch.manual_seed(7)
    expected, state = [], ()
    with torch.no_grad():
        for x, training in zip(xs, modes, strict=True):
            output, final = copied.train(training)(x, *state)
            state = (final,)
            expected.append(output)
    torch.manual_seed(7)
    stream = ur.Stream(model)
    for x, training, other in zip(xs, modes, expected, strict=True):
        model.train(training)
        output = stream(x)
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(output, other, atol=1e-6, rtol=0)


class ModeCell(ur.Cell):
    """A cell whose step depends on the mode, as batch renormalization and zoneout do."""

    state = ("h",)
    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        total = nn.functional.linear(x, self.w) + nn.functional.linear(h, self.u)
        return torch.tanh(total) if self.training else torch.sigmoid(total)


def test_a_frozen_step_that_depends_on_the_mode() -> None:
    layer, x = ur.Recurrent(ModeCell, 4, 5), torch.randn(2, 3, 4)
    with torch.no_grad(), ur.frozen(layer):
        for training in (True, False, True, False):
            output = layer.train(training)(x)[0]
            with ur.engine("reference"):
                torch.testing.assert_close(output, layer(x)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("in_model", [False, True])
def test_a_streamed_step_that_depends_on_the_mode(in_model: bool) -> None:
    layer, x = ur.Recurrent(ModeCell, 4, 5), torch.randn(2, 3, 4)
    stream = ur.Stream(nn.Sequential(layer) if in_model else layer)
    for training in (True, False, True, False):
        layer.train(training)
        stream.reset()
        output = stream(x)
        with torch.no_grad(), ur.engine("reference"):
            expected = layer(x)[0]
        torch.testing.assert_close(output[0] if in_model else output, expected, atol=1e-6, rtol=0)

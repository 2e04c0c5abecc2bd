"""Cells with tensors as attributes: values and indices that change between calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close, tensors, values_and_gradients
from unrolled.engines.compiler.step_values import MAX_VERSIONS

pytestmark = NEEDS_COMPILER


class Weights(ur.Cell):
    """Parameters of the cells below."""

    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")


class WithTensors(Weights):
    mask = torch.rand(8, 8).tril().t()
    signs = torch.tensor([True, False] * 4)

    def check(self) -> None:
        self.scale = torch.linspace(0.5, 1.5, self.hidden)

    def step(self, x, h):
        v = linear(x, self.w) + linear(h, self.u * self.mask)
        return torch.tanh(torch.where(self.signs, v, -v) * self.scale)


@pytest.mark.slow
def test_tensor_attributes_are_read_at_every_call() -> None:
    layer, other = ur.Recurrent(WithTensors, 3, 8), ur.Recurrent(WithTensors, 3, 8)
    x = torch.randn(3, 2, 3, requires_grad=True)
    cell, other_cell = layer._first, other._first

    def compare(layer: Any) -> Tensor:
        weights, leaves = [torch.ones(3, 2, 8), torch.ones(1, 2, 8)], [x, *layer.parameters()]
        with ur.engine("reference"):
            expected = values_and_gradients(list(tensors(layer(x))), weights, leaves)
        with ur.engine("native"):
            assert_close(values_and_gradients(list(tensors(layer(x))), weights, leaves), expected, 1e-5)
        return expected[0]

    first = compare(layer)
    cell.scale.mul_(2)  # in place
    assert not torch.allclose(second := compare(layer), first)
    cell.scale.data.mul_(2)  # PyTorch doesn't count this as a change
    assert not torch.allclose(third := compare(layer), second)
    cell.scale.numpy()[:] = 0.5
    assert not torch.allclose(compare(layer), third)
    other_cell.scale = torch.ones(8)  # a different tensor in another layer with the same cell class
    other.load_state_dict(layer.state_dict())
    assert not torch.allclose(compare(other), compare(layer))
    with ur.engine("native"):
        output = layer(x)[0]
        expected = torch.autograd.grad(output.sum(), x, retain_graph=True)
        cell.scale.zero_()  # the backward uses the value from the forward
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected[0])
        for value, message in (
            (torch.ones(1), r"its attribute scale must be torch.float32 with shape \(8,\)"),
            (torch.ones(8).double(), r"its attribute scale must be torch.float32 with shape \(8,\)"),
            (
                torch.ones(8).requires_grad_(),
                "its attribute scale requires a gradient; declare it as a Param",
            ),
        ):
            cell.scale = value
            with pytest.raises(RuntimeError, match=message):
                layer(x)
    with torch.inference_mode():
        cell.scale = torch.ones(8)
        with ur.engine("native"):
            output = layer(x)[0]
        with ur.engine("reference"):
            assert_close(output, layer(x)[0], 1e-5)


class WithIndices(Weights):
    order = torch.arange(8).flip(0)

    def check(self) -> None:
        self.own_order = torch.arange(8).roll(1)

    def step(self, x, h):
        return torch.tanh(linear(x, self.w) + linear(h[:, self.own_order], self.u)[:, self.order])


@pytest.mark.slow
def test_indices_may_belong_to_a_layer_or_change() -> None:
    layer, other = ur.Recurrent(WithIndices, 3, 8), ur.Recurrent(WithIndices, 3, 8)
    other.load_state_dict(layer.state_dict())
    other._first.own_order = torch.arange(8).roll(3)
    x = torch.randn(4, 2, 3)

    def compare(layer: Any) -> Tensor:
        """Compare eager calls, ``frozen``, ``Stream`` and a graph with the reference engine."""
        with ur.engine("reference"):
            expected = values_and_gradients([layer(x)[0]], [torch.ones(4, 2, 8)], list(layer.parameters()))
        with ur.engine("native"):
            actual = values_and_gradients([layer(x)[0]], [torch.ones(4, 2, 8)], list(layer.parameters()))
        assert_close(actual, expected, 1e-5)
        with torch.no_grad():
            with ur.frozen(layer):
                assert_close(layer(x)[0], expected[0], 1e-5)
            assert_close(ur.Stream(layer)(x), expected[0], 1e-5)
        assert_close(torch.func.vjp(lambda x: layer(x)[0], x)[0], expected[0], 1e-5)
        return expected[0]

    outputs = [compare(layer), compare(other), compare(layer)]
    other._first.own_order[:2] = torch.tensor([5, 5])
    outputs += [compare(other), compare(layer)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[4])
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[3])
    for shift in range(7):  # not compiled for ever new values
        other._first.own_order = torch.arange(8).roll(shift)
        with torch.no_grad(), ur.engine("auto"):
            other(x)
    assert len(other._first._engine_cache["digests"]) <= MAX_VERSIONS
    output = other(x)[0]
    with ur.engine("reference"):
        assert_close(output, other(x)[0], 1e-5)

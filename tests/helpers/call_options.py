"""Layers, initial states and comparisons for the tests of call options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.layer_pairs import NEEDS_COMPILER, assert_close, tensors

INPUT, HIDDEN = 3, 4
ENGINES = pytest.mark.parametrize("engine", [pytest.param("native", marks=NEEDS_COMPILER), "reference"])


def weighted_sum(values: Any) -> Tensor:
    """Return the sum of all elements, each multiplied by a different weight."""
    total = torch.zeros((), dtype=torch.float64)
    for value in tensors(values):
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        total = total + (value.double() * weights).sum()
    return total


def assert_same_with_gradients(
    layer: nn.Module, actual: Any, expected: Any, leaves: list[Tensor], other: nn.Module | None = None
) -> None:
    """Compare values, and the gradients of leaves and parameters, in float64.

    Args:
        layer: The layer that computed ``actual``.
        actual: Its results.
        expected: The expected results.
        leaves: The inputs that require gradients.
        other: The layer that computed ``expected``. None: ``layer`` itself.
    """
    assert_close(actual, expected, 1e-10)
    parameters = list((other or layer).parameters())
    gradients = torch.autograd.grad(weighted_sum(actual), [*leaves, *layer.parameters()], retain_graph=True)
    expected_gradients = torch.autograd.grad(
        weighted_sum(expected), [*leaves, *parameters], retain_graph=True
    )
    assert_close(gradients, expected_gradients, 1e-9)


def random_state(layer: Any, batch: int) -> Any:
    """Return random initial states that require gradients."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    state = tuple(
        torch.randn(count, batch, size, dtype=torch.float64, requires_grad=True)
        for size in layer._first.state_sizes().values()
    )
    return state if len(state) > 1 else state[0]

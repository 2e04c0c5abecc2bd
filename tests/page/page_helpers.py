"""Cells, traces and functions for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.browser import NOT_FOUND, find_browser
from unrolled.tracing.explain import DIGITS, arithmetic, format_number, with_minus
from unrolled.tracing.layer_trace import LayerTrace

needs_browser = pytest.mark.skipif(find_browser() is None, reason=NOT_FOUND)

OpenPage = Callable[..., Any]  # the type of the fixture open_page
BACKGROUND = "(cell) => cell.style.background"


def arithmetic_on_page(part: LayerTrace, name: str, step: int, unit: int, batch: int = 0) -> str:
    """The arithmetic of :meth:`LayerTrace.explain` with four digits for all numbers, as the page shows it."""
    text, _, result = part.explain(name, step, unit, batch).replace("≈", "=").rpartition(" = ")
    if text == result:
        return f"{text} = {result}"
    step = step % int(part.lengths[batch])
    node = part.derivations(step, batch).nodes[name]
    value = part[name][step, batch].flatten()[unit].item()
    return f"{arithmetic(node, unit, 8, DIGITS).text} = {with_minus(format_number(value))}"


class Awkward(ur.Cell):
    """Names that JavaScript objects have, unusual shapes and dtypes, and intermediates without a name."""

    weight = ur.Param("hidden", "input")
    turn = ur.Param("hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        x = x * 2
        constructor = linear(torch.relu(h), self.turn)
        toString = linear(x, self.weight.abs()) / 3
        positive = h > 0
        best = h.argmax(-1)  # noqa: F841
        total = x.sum(-1)  # noqa: F841
        none = h[:, :0]  # noqa: F841
        running = h.cumsum(-1)
        heads = torch.matmul(h.view(-1, 2, 2), constructor.view(-1, 2, 2))
        ratio = (constructor / 3) / 2 * toString
        h = torch.softmax(linear(x, self.weight) + h, -1) + heads.flatten(1) + running + ratio * positive
        return h


class Mixed(ur.Cell):
    """Chunked parameters, concatenated inputs, a computed matrix, and HTML <b>in the docstring</b>.

    Quantities:
        both: <script>alert(1)</script>
    """

    state = ("h", "memory")
    weight = ur.Param("2*hidden", "hidden + input")
    turn = ur.Param("hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor, memory: torch.Tensor) -> Any:
        first, second = self.weight.chunk(2)
        both = torch.cat([h * 2, x], -1)
        a = linear(both, first)
        memory = memory @ (self.turn - self.turn.T) + a.flip(-1)
        h = torch.tanh(linear(both, second) - memory)
        return h, memory


def pixel_color(canvas: Any, x: int, y: int) -> list[int]:
    """Return the color of a pixel of a canvas."""
    data = canvas.evaluate("(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]", [x, y])
    return list(data[:3])


def grown_trace() -> ur.Trace:
    """Trace two layers. The gates of the lower one stay open, so that its cell state counts the steps."""
    layer = nn.LSTM(3, 12, num_layers=2)
    with torch.no_grad():
        layer.bias_ih_l0.fill_(4)
    return ur.trace(layer, torch.randn(8, 3))

"""Cells, and what the tests of the page read from it and compare it with."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import unrolled as ur
from helpers.browser import NOT_FOUND, find_browser
from unrolled.diagram.graph import build
from unrolled.tracing.layer_trace import LayerTrace

chromium_only = pytest.mark.parametrize("browser", ["chromium"], indirect=True)
needs_browser = pytest.mark.skipif(find_browser() is None, reason=NOT_FOUND)

OpenPage = Callable[..., Any]  # the type of the fixture open_page

STEP_CELLS = ".strip .n, .tables .n"
# The numbers of some cells, as [{q, t, u}, text].
READ_CELLS = """(selector) => [...document.querySelectorAll(selector)].filter((cell) => !cell.hidden)
  .map((cell) => [cell.refer(), cell.textContent])"""
# The same of the nodes and the ends of the drawing, and the digits beside them.
READ_DRAWING = """() => [...document.querySelectorAll('svg.cell .node, svg.cell .port')]
  .map((one) => [one.refer(), one.getAttribute('aria-label').split(': ').at(-1),
    [...one.querySelectorAll('.digits')].map((text) => text.textContent)])"""


def enter(field: Any, text: str) -> None:
    """Type a value into a field, in place of the one there."""
    field.select_text()
    field.press_sequentially(text)
    field.press("Enter")


def go(tab: Any, pages: int) -> None:
    """Go back or forward in the history of the browser."""
    tab.evaluate(
        """(pages) => new Promise((done) => {
          window.addEventListener("popstate", () => done(), { once: true });
          history.go(pages);
        })""",
        pages,
    )


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


class WithSoftmax(ur.Cell):
    """A gate whose units share what they let through."""

    state = ("h", "c")
    weight = ur.Param("2*hidden", "input")
    u = ur.Param("2*hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums = linear(x, self.weight) + linear(h, self.u)
        f, g = sums.chunk(2, -1)
        f = torch.softmax(f, -1)
        c = f * c + (1 - f) * torch.tanh(g)
        h = torch.log_softmax(c, -1)
        return h, c


class Mixed(ur.Cell):
    """Chunked parameters, concatenated inputs, a computed matrix, and HTML <b>in the docstring</b>.

    Quantities:
        a: <script>alert(1)</script>
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


class Rare(ur.Cell):
    """A cell with a function that pages can't compute."""

    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        a = linear(x, self.weight)
        h = torch.tanh(torch.lgamma(h + 2) + a)
        return h


def small_trace(cell: type[ur.Cell], options: dict[str, Any] | None = None, steps: int = 4) -> ur.Trace:
    """Trace a layer with random weights, none of them zero, for a sequence with two features."""
    layer = ur.Recurrent(cell, 2, 3, **(options or {}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ur.trace(layer, torch.randn(steps, 2, dtype=next(layer.parameters()).dtype))


def rounded(value: float, decimals: int) -> str:
    """Round a number, halves up."""
    text = f"{Decimal(abs(value)).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP):f}"
    return text if value > 0 or not Decimal(text) else f"−{text}"


def printed(value: float, is_given: bool = False) -> str:
    """Return how the page prints a number: with four decimals, and tiny ones with two digits.

    Args:
        value: The number.
        is_given: Whether it is a parameter or an input. Those have two decimals if they have no more.
    """
    size = abs(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if is_given and (value == 0 or 1e-4 < size < 1e3) and abs(100 * value - round(100 * value)) < 1e-4:
        return rounded(value, 2)
    if 0 < size < 5e-5:
        scientific = f"{size:.1e}".replace("e-0", "e-")
        text = scientific if size < 1e-11 else rounded(size, min(12, 1 - math.floor(math.log10(size))))
        return text if value > 0 else f"−{text}"
    if size >= 1e5:
        return f"{value:.3e}".replace("e+0", "e+").replace("-", "−", int(value < 0))
    return rounded(value, 4)


class ExpectedNumbers:
    """The numbers of one layer in one direction, as the page refers to them.

    Args:
        part: The layer's trace.
        batch: The row.
    """

    def __init__(self, part: LayerTrace, batch: int = 0) -> None:
        self.part, self.batch = part, batch
        self.length = int(part.lengths[batch])
        self.start = -1 if part.direction == "forward" else self.length
        traced = build(part, batch, list(range(self.length)))
        self.values = traced.values
        taken = ("", "x", *part.cell.shapes())  # a step may assign its input again
        nodes = traced.diagram.nodes
        self.nodes = {node.id if node.name in taken else node.name: node for node in nodes}

    def value(self, number: dict[str, Any]) -> float:
        """Return the value of ``{q, t, u}``, or of a parameter ``{q, u, j}``."""
        name, unit, part = number["q"], number["u"], self.part
        if name in part.cell.shapes():
            parameter = getattr(part.cell, name)
            return (parameter[unit, number["j"]] if parameter.dim() > 1 else parameter[unit]).item()
        if name == "x":
            return float(part.input[number["t"], self.batch].flatten()[unit])
        if number["t"] == self.start:
            return float(part.initial_state[name][self.batch].flatten()[unit])
        if name in part.values:
            return float(part.values[name][number["t"], self.batch].flatten()[unit])
        head, _, tail = name.partition(".")
        node = self.nodes[tail if head == "sum" else head]
        index = (
            node.value if not tail else node.pre_activation if head == "sum" else node.terms[int(tail)].value
        )
        assert index is not None
        return float(self.values[number["t"]][index].flatten()[unit])

    def text(self, number: dict[str, Any]) -> str:
        """Return how the page prints a number."""
        return printed(self.value(number), number["q"] == "x" or number["q"] in self.part.cell.shapes())


def show_step(tab: Any, step: int) -> None:
    """Show a step: by a click in the strip, or by its address if the strip has no room for it."""
    title = tab.locator(f'.strip .step[data-step="{step}"] .title')
    if not title.count():
        tab.evaluate(
            "(step) => { const entries = new URLSearchParams(location.hash.slice(1)); "
            "entries.set('step', step); location.hash = entries; }",
            step,
        )
        title.wait_for(state="attached")
    title.evaluate("(one) => one.click()")


def assert_numbers_are_those_of_the_trace(tab: Any, part: LayerTrace, batch: int = 0) -> int:
    """Compare all numbers in the strip, the tables and the drawing, at every step, with the trace.

    Returns:
        How many there are in the strip and the tables.
    """
    expected = ExpectedNumbers(part, batch)
    count = 0
    for step in range(expected.length):
        show_step(tab, step)
        cells = tab.evaluate(READ_CELLS, STEP_CELLS)
        assert {number["t"] for number, _ in cells} >= {step}
        wrong = [
            (number, text, expected.text(number)) for number, text in cells if text != expected.text(number)
        ]
        assert not wrong, wrong[:5]
        count += len(cells)
        for number, spoken, digits in tab.evaluate(READ_DRAWING):
            value = expected.value(number)
            if not 5e-5 < abs(value) < 1e5:
                continue
            assert spoken == rounded(value, 4), number
            assert digits in ([], [rounded(value, 2)]), number
    return count


def numbers_on_page(tab: Any, length: int) -> dict[tuple[str, int, int], str]:
    """Return the text of every number in the strip and the tables, by quantity, step and unit."""
    found = {}
    for step in range(length):
        show_step(tab, step)
        for number, text in tab.evaluate(READ_CELLS, STEP_CELLS):
            found[number["q"], number["t"], number["u"]] = text
    return found


def as_number(text: str) -> float:
    """Return the number that the page has printed."""
    return float(text.replace("−", "-").replace("∞", "inf"))


def pixel_color(canvas: Any, x: int, y: int) -> list[int]:
    """Return the color of a pixel of a canvas."""
    data = canvas.evaluate("(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]", [x, y])
    return list(data[:3])

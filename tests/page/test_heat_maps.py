"""The heat maps of wide layers: the order of the units, zoom, and what they say in words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from page_helpers import OpenPage, go, needs_browser, printed

import unrolled as ur
from unrolled.page import layer_data
from unrolled.page.sampling import unit_order

pytestmark = needs_browser

GATE = '.map canvas[aria-label^="f,"]'


def wave(steps: int) -> torch.Tensor:
    return torch.stack([torch.sin(torch.arange(steps) / 4), torch.randn(steps)], 1)


def point(tab: Any, column: float, line: float) -> tuple[float, float]:
    """Return the position of a column and line of the map of the forget gate, in pixels."""
    canvas = tab.locator(GATE)
    width, height = canvas.evaluate("(one) => [one.width, one.height]")
    box = canvas.bounding_box()
    return box["x"] + (column + 0.5) / width * box["width"], box["y"] + (line + 0.5) / height * box["height"]


def read(tab: Any, column: int, line: int) -> str:
    """Return what the page says about a number below the pointer."""
    tab.mouse.move(0, 0)
    tab.mouse.move(*point(tab, column, line))
    return str(tab.locator(".readout").text_content())


def drag(tab: Any, first: int, last: int) -> None:
    tab.mouse.move(*point(tab, first, 2))
    tab.mouse.down()
    tab.mouse.move(*point(tab, (first + last) / 2, 2))
    tab.mouse.move(*point(tab, last, 2))
    tab.mouse.up()


def columns(tab: Any) -> int:
    return int(tab.locator(GATE).evaluate("(one) => one.width"))


@pytest.mark.slow
def test_order_of_units(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 12), wave(30))
    order = unit_order(trace["h"][:, 0])
    assert order != sorted(order)
    tab = open_page(trace)
    similar, weights = (tab.get_by_role("button", name=name) for name in ("by similarity", "by index"))
    assert [one.get_attribute("aria-pressed") for one in (similar, weights)] == ["true", "false"]
    for line in (0, 5, 11):
        value = printed(trace["f"][7, 0, order[line]].item())
        assert read(tab, 7, line) == f"f, step 7, unit {order[line]}: {value}"
    tab.mouse.click(*point(tab, 7, 5))
    assert f"step=7&unit={order[5]}&number=f" in tab.evaluate("location.hash")
    weights.click()
    assert "order=weights" in tab.evaluate("location.hash")
    for line in (0, 5, 11):
        assert read(tab, 7, line) == f"f, step 7, unit {line}: {printed(trace['f'][7, 0, line].item())}"
    tab.reload()
    assert read(tab, 7, 3).startswith("f, step 7, unit 3: ")
    go(tab, -1)
    assert read(tab, 7, 3).startswith(f"f, step 7, unit {order[3]}: ")


@pytest.mark.slow
def test_zoom(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 12), wave(40))
    tab = open_page(trace, address="#step=12&unit=3&number=h&order=weights")
    assert tab.get_by_role("button", name="All steps").count() == 0
    drag(tab, 10, 25)
    assert "zoom=10-25" in tab.evaluate("location.hash")
    assert columns(tab) == 16
    assert read(tab, 0, 4) == f"f, step 10, unit 4: {printed(trace['f'][10, 0, 4].item())}"
    assert read(tab, 15, 4) == f"f, step 25, unit 4: {printed(trace['f'][25, 0, 4].item())}"
    part = trace["f"][10:26, 0]
    summary = tab.locator(".map-summary").nth(1).text_content()
    assert summary.startswith(f"in steps 10–25min{part.min():.2f}mean{part.mean():.2f}max{part.max():.2f}")
    assert tab.locator(".map .cursor").first.is_visible()
    assert "number=h" in tab.evaluate("location.hash")  # the drag has chosen nothing
    go(tab, -1)
    assert columns(tab) == 40
    go(tab, 1)
    assert columns(tab) == 16
    drag(tab, 3, 4)  # too few steps
    assert columns(tab) == 16
    tab.get_by_role("button", name="All steps").click()
    assert columns(tab) == 40
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "zoom in"


@pytest.mark.slow
def test_zoom_with_the_keyboard(open_page: OpenPage) -> None:
    trace = ur.trace(ur.GRU(2, 12), wave(64))
    tab = open_page(trace, address="#step=50&unit=3&number=h")
    canvas = tab.locator(".map canvas").last
    canvas.focus()
    widths = []
    for key in ("+", "+", "=", "-", "0", "-"):
        tab.keyboard.press(key)
        widths.append(canvas.evaluate("(one) => one.width"))
    assert widths == [32, 16, 8, 16, 64, 64]
    for _ in range(6):
        tab.keyboard.press("+")
    first, last = map(int, re.search(r"zoom=(\d+)-(\d+)", tab.evaluate("location.hash")).groups())
    assert last - first == 3
    assert first <= 50 <= last
    status = tab.locator(".map-controls [role=status]").text_content()
    assert status == f"Steps {first}–{last} of 64"
    tab.keyboard.press("ArrowRight")  # the map has kept the focus
    assert tab.evaluate("document.activeElement.tagName") == "CANVAS"
    assert "step=51&unit=3&number=h" in tab.evaluate("location.hash")
    tab.evaluate("location.hash = 'step=5&unit=3&number=h&zoom=30-40'")
    tab.wait_for_function("() => document.querySelectorAll('.map canvas')[1].width === 11")
    assert not tab.locator(".map .cursor").first.is_visible()  # step 5 is outside


@pytest.mark.slow
def test_means_of_a_large_layer(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both orders of the units, also after a change. Zooming in shows every number."""
    monkeypatch.setattr(layer_data, "COMPLETE_VALUES", 0)
    trace = ur.trace(ur.LSTM(2, 100), wave(300))
    order = unit_order(trace["h"][:, 0])
    tab = open_page(trace)

    def assert_means(features: list[int], values: torch.Tensor) -> None:
        for column, line in ((3, 0), (70, 21), (149, 49)):
            text = read(tab, column, line)
            steps, units = range(2 * column, 2 * column + 2), features[2 * line : 2 * line + 2]
            assert text.startswith(f"f, step {steps[0]}, unit {units[0]}: ")
            assert text.endswith("(mean of 2 steps × 2 units)")
            mean = values[steps][:, units].mean().item()
            found = float(re.search(r"unit \d+: (?:about )?(\S+)", text)[1])
            assert found == pytest.approx(mean, abs=6e-3)

    forget = trace["f"][:, 0]
    assert_means(order, forget)
    tab.get_by_role("button", name="by index").click()
    assert_means(list(range(100)), forget)
    changed = forget.clone()
    changed[:, 42] = 1.0
    tab.evaluate("location.hash = 'step=20&unit=42&number=f&order=weights&edit=f[42]=1'")
    tab.wait_for_function(
        "() => document.querySelector('.changes').textContent.startsWith('1 value changed ')"
    )
    assert read(tab, 70, 21).startswith("f, step 140, unit 42: 0.7")
    tab.keyboard.press("R")
    assert_means(list(range(100)), forget)
    drag(tab, 20, 60)
    assert "zoom=40-121" in tab.evaluate("location.hash")
    assert read(tab, 3, 42) == f"f, step 43, unit 42: {printed(forget[43, 42].item())}"
    tab.get_by_role("button", name="by similarity").click()
    assert read(tab, 3, 42) == f"f, step 43, unit {order[42]}: {printed(forget[43, order[42]].item())}"


@pytest.mark.slow
def test_maps_in_words(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 12), wave(30))
    tab = open_page(trace, address="#step=12&unit=3&number=h&zoom=10-19")
    forget = trace["f"][10:20, 0]
    tree = tab.locator(".sequence").aria_snapshot()
    assert '- button "by similarity" [pressed]' in tree
    assert '- button "zoom in"' in tree
    assert '- button "All steps"' in tree
    expected = (
        f"f, forget gate: 12 units over steps 10 to 19 of 30, min {forget.min():.2f}, mean "
        f"{forget.mean():.2f}, max {forget.max():.2f}, saturated 0 %. Use the arrow keys to read values."
    )
    assert expected in tree
    assert "x, input: 2 features over steps 10 to 19 of 30" in tree

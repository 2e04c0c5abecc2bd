"""The page on a phone: the arithmetic opens below the block that was tapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from page_helpers import OpenPage, needs_browser, printed

import unrolled as ur

pytestmark = needs_browser

# What the arithmetic is below, and whether it covers nothing and fits into the width.
PLACE = """() => {
  const panel = document.querySelector('.arithmetic');
  const before = panel.previousElementSibling;
  const [a, b] = [before, panel].map((one) => one.getBoundingClientRect());
  const isFree = a.bottom <= b.top + 1 && b.right <= innerWidth
    && document.documentElement.scrollWidth <= innerWidth;
  return [before.dataset.node ?? before.className.split(' ')[0], isFree];
}"""


def click(tab: Any, selector: str) -> None:
    tab.locator(selector).first.evaluate(
        "(one) => one.dispatchEvent(new MouseEvent('click', { bubbles: true }))"
    )


@pytest.mark.slow
def test_arithmetic_is_below_the_tapped_block(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace, width=390, height=844)
    assert tab.evaluate(PLACE) == ["grp", True]  # the table of h
    click(tab, ".gate[data-node=f] .n")
    assert tab.evaluate(PLACE) == ["f", True]
    click(tab, ".arithmetic .lab button")  # it stays where the reader looks
    assert "number=f.0" not in tab.evaluate("location.hash")
    place = tab.evaluate(PLACE)
    click(tab, '.gate[data-node=o] .unit[data-unit="2"]')
    click(tab, ".gate[data-node=o] .pre:last-child .n")
    assert tab.evaluate(PLACE) == ["o", True]
    assert place[1]
    click(tab, "svg.cell .node")
    assert tab.evaluate(PLACE) == ["drawing", True]
    click(tab, ".strip .step:not(.start) .n")
    assert tab.evaluate(PLACE) == ["strip", True]
    tab.set_viewport_size({"width": 1366, "height": 768})
    tab.wait_for_function("() => document.querySelector('.why > .arithmetic') !== null")
    assert not tab.locator(".arithmetic").evaluate("(one) => one.classList.contains('inline')")
    tab.evaluate("location.hash = 'step=2&unit=1&number=h'")
    value = printed(trace["h"][2, 0, 1].item())
    tab.wait_for_function(
        f"() => document.querySelector('.arithmetic .value').textContent === 'h2[1] = {value}'"
    )


@pytest.mark.slow
def test_what_a_stop_of_the_tour_names_is_in_view(open_page: OpenPage) -> None:
    """The button that the stop about the cell state asks to press isn't behind the text of the stop."""
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)), width=360, height=740)
    tab.keyboard.press("t")
    for _ in range(3):
        tab.keyboard.press("n")
    assert "Shut the forget gate of unit 1" in tab.locator(".guide").text_content()
    button = tab.get_by_role("button", name="Shut the forget gate of unit 1").bounding_box()
    guide = tab.locator(".guide").bounding_box()
    assert guide["y"] + guide["height"] <= button["y"]
    assert button["y"] + button["height"] <= 740


@pytest.mark.slow
def test_labels_of_a_sum_are_whole(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.RNN(2, 3), torch.randn(4, 2)), width=360, height=740)
    labels = tab.locator(".arithmetic .lab")
    assert labels.count() >= 8
    assert labels.evaluate_all("(all) => all.filter((one) => one.scrollWidth > one.clientWidth)") == []

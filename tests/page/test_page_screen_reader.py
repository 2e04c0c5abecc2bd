"""What someone who can't see the page finds in its accessibility tree, from top to bottom."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from page_helpers import OpenPage, needs_browser, printed

import unrolled as ur

pytestmark = needs_browser

ROLES = "button|slider|textbox|link|combobox|checkbox|region|table|list|group|img|application"
UNNAMED = rf"^ *- ({ROLES})(?: \[|:|$)"
ANNOUNCEMENT = ".arithmetic [role=status]"
# Counts what is announced from now on.
COUNT_ANNOUNCEMENTS = """(selector) => {
  window.announced = [];
  const status = document.querySelector(selector);
  new MutationObserver(() => window.announced.push(status.textContent)).observe(status, { childList: true });
}"""


def unnamed(tree: str) -> list[str]:
    """Return the lines of controls, tables and the like without a name. A few lists and groups need none."""
    found = [line for line in tree.splitlines() if re.match(UNNAMED, line)]
    return [line for line in found if line.strip() not in ("- list:", "- group: gradient norms as a table")]


def headings(tab: Any) -> list[str]:
    tree = tab.locator("#page").aria_snapshot()
    return [
        re.sub(r'^ *- heading "(.*)" \[level=\d\].*', r"\1", line)
        for line in tree.splitlines()
        if "- heading" in line
    ]


def lines_of_sum(tab: Any) -> list[str]:
    """Return the lines of the arithmetic as they are read: their texts and the names of their buttons."""
    read = """(all) => all.map((line) => [...line.querySelectorAll('button, span:not(:has(button))')]
      .filter((one) => one.parentElement.closest('button') === null && one.checkVisibility())
      .map((one) => one.ariaLabel ?? one.textContent).filter(Boolean).join(' '))"""
    return list(tab.locator(".arithmetic [role=list] > [role=listitem]").evaluate_all(read))


def test_a_small_lstm(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).backward(torch.sum)
    tab = open_page(trace, address="#step=2&unit=1&number=f")
    tree = tab.locator("#page").aria_snapshot()
    assert unnamed(tree) == []
    assert headings(tab) == [
        "LSTM(2, 3)", "The cell at step 2, unit 1", "Change something", "Every number of step 2",
        "Where does f2[1] come from?", "The whole sequence", "Gradient through time", "Diagnosis",
        "About LSTM", "Keyboard",
    ]  # fmt: skip
    for line in (
        '- group "numbers or weights"', '- button "Numbers" [pressed]', '- button "Weights"',
        '- rowheader "unit 1"', '- group "experiments"', '- list "the sum, line by line"',
    ):  # fmt: skip
        assert line in tree, line
    assert "Thicker line" not in tree  # the legend is about colors
    lines = lines_of_sum(tab)
    assert len(lines) == 3 + 1 + 4 + 1 + 2
    weight, value = trace.layers[0].cell.weight_ih[4, 0].item(), trace["x"][2, 0, 0].item()
    assert re.match(rf"Wif\[1,0\] x2\[0\] weight_ih, row 4, column 0: {'−' * (weight < 0)}0.\d+ × ", lines[0])
    assert f"x, step 2, feature 0: {'−' * (value < 0)}" in lines[0]
    assert lines[3].startswith("input part = part of f: W if x t + b if, step 2, unit 1: ")
    assert lines[-1].endswith(f"= {printed(trace['f'][2, 0, 1].item())}")


@pytest.mark.slow
def test_a_wide_layer(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 20), torch.randn(40, 2)).backward(torch.sum)
    tab = open_page(trace, address="#step=7&unit=5&number=weight_hh&column=3")
    tree = tab.locator("#page").aria_snapshot()
    assert unnamed(tree) == []
    assert headings(tab)[:3] == ["LSTM(2, 20)", "The whole sequence", "The cell at step 7, unit 1"]
    weights = '- heading "Weights, the same at every step"'
    gradient = trace.layers[0].cell.weight_hh
    assert weights in tree
    assert gradient.shape == (80, 20)
    assert re.search(r'- heading "∂loss/∂Whi\[5,3\] = −?[\d.]+" \[level=3\]', tree)
    maps = [line.strip() for line in tree.splitlines() if "- 'application" in line]
    assert [re.search(r'"(\w+), ', line)[1] for line in maps] == ["x", "f", "i", "g", "c", "o", "h"]
    assert all("over 40 steps, min " in line for line in maps)
    # The numbers beside a map are in its name, and aren't read twice.
    assert "- text: min" not in tree
    canvas = tab.locator(".map canvas").nth(1)
    canvas.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    value = printed(trace["f"][8, 0, tab.evaluate("Number(/unit=(\\d+)/.exec(location.hash)[1])")].item())
    tab.wait_for_function(f"() => document.querySelector('{ANNOUNCEMENT}').textContent.includes('{value}')")


@pytest.mark.slow
def test_announcements_are_few(open_page: OpenPage) -> None:
    """While a value is dragged, its last value is read; while the steps are played, the last step."""
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(6, 2))
    tab = open_page(trace, address="#step=1&unit=0&number=f")
    tab.evaluate(COUNT_ANNOUNCEMENTS, ANNOUNCEMENT)
    tab.evaluate(
        """() => {
          const slider = document.querySelector('.drag input[type=range]');
          for (let k = 0; k < 20; k += 1) {
            slider.value = k / 50;
            slider.dispatchEvent(new Event('input'));
          }
        }"""
    )
    tab.wait_for_function("() => window.announced.at(-1)?.startsWith('f, step 1, unit 0: 0.38')")
    assert tab.evaluate("window.announced.length") <= 2
    tab.evaluate("window.announced.length = 0")
    tab.get_by_label("speed").select_option("fast")
    tab.get_by_role("button", name="play").click()
    tab.wait_for_function("() => window.announced.at(-1)?.startsWith('f, step 5, unit 0')")
    assert tab.evaluate("window.announced.length") == 1


@pytest.mark.slow
def test_every_state_of_the_page_has_names(open_page: OpenPage) -> None:
    trace = ur.trace(ur.Recurrent(ur.cells.PeepholeLSTM, 2, 3), torch.randn(4, 2)).backward(torch.sum)
    tab = open_page(trace)
    for key in ("w", "t", "n", "Escape", "c", "x"):
        tab.keyboard.press(key)
        assert unnamed(tab.locator("#page").aria_snapshot()) == [], key
    text = "the quick brown fox jumps over"
    tab = open_page(ur.trace(ur.GRU(2, 12), torch.randn(30, 2)), labels=list(text))
    tree = tab.locator("#page").aria_snapshot()
    assert unnamed(tree) == []
    assert headings(tab)[1] == "Text"
    assert '- button "Strongest passages" [pressed]' in tree

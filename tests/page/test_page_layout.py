"""Colors, sizes and accessibility of the page."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from page_helpers import BACKGROUND, Awkward, OpenPage, grown_trace, needs_browser
from playwright.sync_api import expect

import unrolled as ur
from unrolled.tracing.explain import format_number

pytestmark = needs_browser


@pytest.mark.slow
def test_printing_uses_the_light_theme_and_cuts_nothing_off(open_page: OpenPage) -> None:
    # the width of A4 without its margins
    tab = open_page(ur.trace(ur.LSTM(2, 4), torch.randn(30, 2)), "dark", width=718)
    page_element = tab.locator("#page")
    tab.evaluate("addEventListener('beforeprint', () => { "
                 "window.printed = document.querySelector('#page').dataset.theme; })")  # fmt: skip
    tab.pdf(format="A4")
    assert tab.evaluate("window.printed") == "light"
    expect(page_element).to_have_attribute("data-theme", "dark")
    tab.emulate_media(media="print")
    assert (
        page_element.evaluate("""page => [...page.querySelectorAll('td, .box, .code code')].filter(
        one => one.getBoundingClientRect().right > innerWidth).length""")
        == 0
    )
    cell = tab.locator("table.numbers td").first
    assert cell.evaluate("cell => getComputedStyle(cell).printColorAdjust") == "exact"


class LongNames(ur.Cell):
    """Names of parameters and quantities that are wider than the window."""

    a_parameter_with_a_name_which_takes_more_room_than_a_narrow_window_has = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        weight = self.a_parameter_with_a_name_which_takes_more_room_than_a_narrow_window_has
        a_quantity_with_a_name_which_takes_more_room_than_a_narrow_window_has = x @ weight.T
        h = torch.tanh(a_quantity_with_a_name_which_takes_more_room_than_a_narrow_window_has)
        return h


def test_long_names_do_not_widen_the_page(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.Recurrent(LongNames, 2, 3), torch.randn(4, 2)), width=640)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_large_quantities_have_their_own_color_scale(open_page: OpenPage) -> None:
    t = grown_trace()
    tab = open_page(t)
    for _ in range(7):
        tab.get_by_role("button", name="next step").click()
    assert "own color scale: x, input_sum, hidden_sum, c" in tab.locator(".color-scale").text_content()
    figure = tab.locator("figure.heat-map", has=tab.get_by_text("c", exact=True))
    assert format_number(float(t["c"].abs().max())) in figure.locator("figcaption").text_content()
    red = [178, 24, 43]  # the end of the color scale
    for name in ("f", "c"):
        unit = int(t[name][7, 0].argmax())
        cell = tab.locator(f'td[data-key="quantity {name}"][data-index="{unit}"]')
        color = [int(part) for part in re.findall(r"\d+", cell.evaluate(BACKGROUND))]
        assert color == pytest.approx(red, abs=12), name


@pytest.mark.slow
def test_themes_and_a_narrow_window(open_page: OpenPage) -> None:
    t = ur.trace(ur.LSTM(3, 40), torch.randn(30, 3)).backward(torch.sum)
    tab = open_page(t, scheme="dark", width=360)
    assert tab.locator("#page").get_attribute("data-theme") == "dark"
    background = "getComputedStyle(document.getElementById('page')).backgroundColor"
    assert tab.evaluate(background) == "rgb(20, 23, 27)"
    tab.get_by_role("button", name="light theme").click()
    assert tab.evaluate(background) == "rgb(255, 255, 255)"
    tab.get_by_role("button", name="dark theme").click()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        expect(tab.locator("#page")).to_have_attribute("data-theme", scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


CONTRAST = """() => {
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll('td')].filter((cell) => cell.style.background).map((cell) => {
    const [a, b] = [light(getComputedStyle(cell).backgroundColor), light(getComputedStyle(cell).color)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_with_its_color(scheme: str, open_page: OpenPage) -> None:
    x = torch.linspace(-1, 1, 24).unsqueeze(0)
    tab = open_page(ur.trace(ur.LSTM(24, 12), x), scheme=scheme)
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 120
    assert min(ratios) >= 4.5  # WCAG 2.2, 1.4.3


def test_accessibility_tree(open_page: OpenPage) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    tree = open_page(t).locator("#page").aria_snapshot()
    value = format_number(t["h"][0, 0, 2].item())
    for line in (
        '- region "The layer, unrolled through time"', '- slider "time step"', '- button "play"',
        '- grid "values of this step"', f'''- 'gridcell "h₀, unit 2: {value}"': ''',
        '- region "how a value was computed"', '- region "Equations"', '- region "The whole sequence"',
        'application "h, hidden state: 3 units over 3 steps', '- table "weight_ih"', "- math:",
        '- region "Compared with torch.nn"',
    ):  # fmt: skip
        assert line in tree, line


def test_nan_and_infinity_have_their_own_colors(open_page: OpenPage) -> None:
    x = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [float("-inf"), 3.0]])
    tab = open_page(ur.trace(ur.RNN(2, 3, nonlinearity="relu"), x).backward(torch.sum))
    seen = []
    for _ in range(3):
        cell = tab.locator('td[data-key="input"][data-index="0"]')
        seen.append((cell.text_content(), cell.evaluate(BACKGROUND)))
        tab.get_by_role("button", name="next step").click(force=True)
    assert seen[1:] == [("nan", "rgb(240, 228, 66)"), ("-inf", "rgb(204, 121, 167)")]
    assert tab.locator(".color-scale").text_content().startswith("-")  # of finite values


@pytest.mark.slow
def test_subscripts_are_aligned_and_long_lines_wrap(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.Recurrent(Awkward, 2, 4), torch.randn(2, 2)), width=360)
    assert tab.locator("ol.code").evaluate("(list) => list.scrollWidth <= list.clientWidth")
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(2, 2)), width=1280)
    bottoms = tab.locator(".formulas li").nth(2).locator("msub").evaluate_all(
        "(all) => all.map((one) => one.lastElementChild.getBoundingClientRect().bottom)")  # fmt: skip
    assert len(bottoms) == 6
    assert max(bottoms[-2:]) - min(bottoms[-2:]) < 1.5  # of the subscripts input and hidden


ALL_VISIBLE = """(cells) => cells.every((cell) => {
  const [box, frame] = [cell.getBoundingClientRect(), cell.closest('.scroll').getBoundingClientRect()];
  return box.left >= frame.left && box.right <= frame.right + 1 && box.right <= innerWidth; })"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_columns_fit_the_width_and_blocks_are_aligned(width: int, open_page: OpenPage) -> None:
    t = grown_trace()
    tab = open_page(t, width=width)
    assert tab.locator("table[role=grid] td").evaluate_all(ALL_VISIBLE)
    shown = tab.locator('tr[data-key="quantity f"] td').count()
    assert (4 if width > 1000 else 3) <= shown < 12
    headings = tab.locator("table[role=grid] thead th").all_text_contents()
    assert headings[0] == f"unit‹0–{shown - 1} of 12›"
    assert headings[1:] == list(map(str, range(shown)))
    lines = tab.locator('tr[data-key="quantity input_sum"]')
    assert lines.locator(".range").all_text_contents() == ["i", "f", "g", "o"]
    cell = tab.locator('td[data-key="quantity f"][data-index="1"]')
    cell.click()
    highlighted = tab.locator("table[role=grid] td.highlighted")
    attributes = [(c.get_attribute("data-key"), c.get_attribute("data-index")) for c in highlighted.all()]
    assert attributes == [("quantity input_sum", "13"), ("quantity hidden_sum", "13")]
    assert {one.bounding_box()["x"] for one in [*highlighted.all(), cell]} == {cell.bounding_box()["x"]}
    # arrow keys move between blocks, and to columns that are not shown yet
    tab.locator('td[data-key="quantity input_sum"][data-index="14"]').focus()
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset.index") == "26"
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.dataset.index") == "47"
    assert tab.locator('td[data-key="quantity f"][data-index="11"]').is_visible()


@pytest.mark.slow
def test_explanation_stays_visible(open_page: OpenPage) -> None:
    tab = open_page(grown_trace(), width=1280)
    box = tab.locator(".explanation")
    canvas = tab.locator("figure.heat-map canvas").nth(4)
    canvas.scroll_into_view_if_needed()
    canvas.click(position={"x": 300, "y": 40})
    expect(box).to_be_in_viewport(ratio=1)
    tab.locator('td[data-key="before h"]').first.hover()
    expect(box).to_be_in_viewport(ratio=1)
    tab.locator('td[data-key="quantity h"]').first.focus()
    cell, top = tab.locator('td[data-key="quantity h"]').first.bounding_box(), box.bounding_box()["y"]
    assert cell["y"] + cell["height"] <= top  # it does not cover the focused cell

"""What is visible on opening, at several window sizes, in both themes and on paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from page_helpers import STEP_CELLS, OpenPage, chromium_only, needs_browser

import unrolled as ur

pytestmark = needs_browser

VISIBLE = """(selector) => {
  const cells = [...document.querySelectorAll(selector)].filter((cell) => !cell.hidden);
  const isVisible = (cell) => {
    const { left, right, top, bottom } = cell.getBoundingClientRect();
    const inside = left >= 0 && right <= innerWidth && top >= 0 && bottom <= innerHeight;
    const hit = inside && document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
    return hit && (cell === hit || cell.contains(hit));
  };
  return [cells.filter(isVisible).length, cells.length];
}"""


SMALL_LAYERS: dict[str, Callable[[], ur.Recurrent]] = {
    "RNN": lambda: ur.RNN(2, 3),
    "LSTM": lambda: ur.LSTM(2, 3),
    "GRU": lambda: ur.GRU(2, 3),
    "SLSTM": lambda: ur.Recurrent(ur.cells.SLSTM, 2, 3),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "LSTM" else pytest.mark.slow) for name in SMALL_LAYERS],
)
def test_first_screen_shows_all_numbers(name: str, open_page: OpenPage) -> None:
    tab = open_page(ur.trace(SMALL_LAYERS[name](), torch.randn(4, 2)))
    visible, count = tab.evaluate(VISIBLE, STEP_CELLS)
    assert visible == count > (30 if name == "RNN" else 60)
    arithmetic = tab.locator(".why").bounding_box()
    tables = tab.locator(".step-values").bounding_box()
    assert tables["x"] + tables["width"] <= arithmetic["x"]  # it covers nothing
    tab.set_viewport_size({"width": 1280, "height": 720})
    visible, count = tab.evaluate(VISIBLE, STEP_CELLS)
    assert visible >= 0.6 * count
    assert tab.evaluate(VISIBLE, ".arithmetic .sum .total") == [1, 1]
    for width in (840, 1100, 1280, 1366):  # a label isn't far from its numbers
        tab.set_viewport_size({"width": width, "height": 720})
        assert tab.locator(".arithmetic .sum").bounding_box()["width"] < 620, width


TRACES: dict[str, Callable[[], ur.Trace]] = {
    "small": lambda: ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)),
    "wide": lambda: ur.trace(ur.LSTM(4, 64), torch.randn(100, 4)),
    "several": lambda: ur.trace(ur.GRU(2, 3, num_layers=2, bidirectional=True), torch.randn(4, 2)),
    "stack of states": lambda: ur.trace(ur.Recurrent(ur.cells.SLSTM, 2, 8), torch.randn(4, 2)),
}


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.slow
def test_no_sideways_scrolling(name: str, open_page: OpenPage) -> None:
    tab = open_page(TRACES[name]().backward(lambda y: y.sum()))
    for width in (360, 768, 1366, 1920):
        tab.set_viewport_size({"width": width, "height": 768})
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, width
        tab.keyboard.press("w")
        assert tab.locator(".weights .n").first.is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, width
        tab.keyboard.press("w")


# The numbers that are wider than their cells.
CUT_NUMBERS = """(selector) => [...document.querySelectorAll(selector)].filter((cell) => {
  const text = document.createRange();
  text.selectNodeContents(cell);
  return text.getBoundingClientRect().left < cell.getBoundingClientRect().left;
}).map((cell) => cell.textContent)"""


@pytest.mark.slow
def test_numbers_of_the_strip_fit(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.RNN(8, 6), -torch.rand(20, 8)))
    for width in (768, 1366, 1920):
        tab.set_viewport_size({"width": width, "height": 768})
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert tab.locator(".strip .n").count() >= 14
        assert tab.evaluate(CUT_NUMBERS, ".strip .n") == []


CUT_HEADS = """[...document.querySelectorAll('.tables .col')]
  .filter((head) => head.scrollHeight > head.clientHeight + 3 || head.scrollWidth > head.clientWidth + 1)
  .map((head) => head.textContent)"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LayerNormLSTM", "BRC", "NAS", "RHN", "LEM"])
def test_heads_of_columns_are_whole(name: str, open_page: OpenPage) -> None:
    trace = ur.trace(ur.Recurrent(getattr(ur.cells, name), 3, 3), torch.randn(6, 3))
    tab = open_page(trace)
    assert tab.evaluate(CUT_HEADS) == []
    labels = tab.locator(".arithmetic .lab")
    assert labels.evaluate_all("(all) => all.filter((one) => one.scrollWidth > one.clientWidth)") == []
    tab = open_page(trace, width=360)
    assert tab.evaluate(CUT_HEADS) == []
    assert tab.evaluate(CUT_NUMBERS, ".seq .n, .tables .n") == []
    edges = tab.locator(".grp.states .n").evaluate_all(
        "(all) => all.map((n) => n.getBoundingClientRect().right)"
    )
    assert max(edges) <= 360  # without scrolling the table


class LongNames(ur.Cell):
    """Names of parameters and quantities that are wider than the window."""

    a_parameter_with_a_name_which_takes_more_room_than_a_narrow_window_has = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        weight = self.a_parameter_with_a_name_which_takes_more_room_than_a_narrow_window_has
        a_quantity_with_a_name_which_takes_more_room_than_a_narrow_window_has = x @ weight.T
        h = torch.tanh(a_quantity_with_a_name_which_takes_more_room_than_a_narrow_window_has)
        return h


@pytest.mark.slow
def test_long_names_do_not_widen_the_page(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.Recurrent(LongNames, 2, 3), torch.randn(4, 2)), width=640)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


# Pairs of texts of the drawing whose boxes overlap by more than a pixel.
OVERLAPS = """() => {
  const texts = [...document.querySelectorAll('svg.cell text')].filter((one) => one.textContent.trim());
  const boxes = texts.map((one) => one.getBoundingClientRect());
  const found = [];
  for (let a = 0; a < boxes.length; a += 1) for (let b = a + 1; b < boxes.length; b += 1) {
    const wide = Math.min(boxes[a].right, boxes[b].right) - Math.max(boxes[a].left, boxes[b].left);
    const high = Math.min(boxes[a].bottom, boxes[b].bottom) - Math.max(boxes[a].top, boxes[b].top);
    const smaller = Math.min(boxes[a].width * boxes[a].height, boxes[b].width * boxes[b].height);
    const share = (wide * high) / smaller;
    if (wide > 1 && high > 1 && share > 0.4) found.push([texts[a].textContent, texts[b].textContent]);
  }
  return found;
}"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "LSTM" else pytest.mark.slow) for name in ur.cells.__all__],
)
def test_no_text_of_the_drawing_overlaps_another(name: str, open_page: OpenPage) -> None:
    trace = ur.trace(ur.Recurrent(getattr(ur.cells, name), 2, 3), -3 * torch.rand(3, 2))
    tab = open_page(trace)
    for step in range(3):
        tab.locator(f'.strip .step[data-step="{step}"] .title').click()
        assert not tab.evaluate(OVERLAPS)


# The contrast of each text with what is behind it, as [ratio, class, text].
CONTRAST = """(selector) => {
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const parse = (text) => {
    const parts = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    return text.startsWith('color(') ? parts.map((part, k) => (k < 3 ? 255 * part : part)) : parts;
  };
  const over = (top, below) => {
    const share = top[3] ?? 1;
    return top.slice(0, 3).map((part, k) => share * part + (1 - share) * below[k]);
  };
  const background = (element) => {
    const color = parse(getComputedStyle(element).backgroundColor);
    if ((color[3] ?? 1) === 1) return color;
    return over(color, element.parentElement ? background(element.parentElement) : [255, 255, 255]);
  };
  const light = (color) => [0.2126, 0.7152, 0.0722]
    .reduce((sum, weight, k) => sum + weight * linear(color[k] / 255), 0);
  const isVisible = (one) => one.offsetParent && one.textContent.trim();
  return [...document.querySelectorAll(selector)].filter(isVisible).map((one) => {
    const below = background(one);
    const [a, b] = [light(below), light(over(parse(getComputedStyle(one).color), below))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.className, one.textContent];
  });
}"""
TEXTS = (
    ".n, .n span, .sum span, .quiet, p, h1, h2, .btn, .lab button, .rowname, .title, .unit, .col, .head b, li"
)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_texts_have_enough_contrast(scheme: str, open_page: OpenPage) -> None:
    x = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.5, -1.5], [0.0, float("nan")]])
    tab = open_page(
        ur.trace(ur.LSTM(2, 3), x), scheme=scheme, address="#step=2&unit=1&number=h&edit=x@2[0]=3;f[1]=0.02"
    )
    assert tab.locator(".set").count() > 0
    assert tab.locator(".changed").count() > 10
    for action in (lambda: None, lambda: tab.keyboard.press("w"), lambda: tab.keyboard.press("t")):
        action()
        low = [one for one in tab.evaluate(CONTRAST, TEXTS) if one[0] < 4.5]  # WCAG 2.2, 1.4.3
        assert not low, low[:5]


@pytest.mark.slow
def test_themes(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(3, 40), torch.randn(30, 3)).backward(torch.sum)
    tab = open_page(trace, scheme="dark")
    color = "getComputedStyle(document.getElementById('page')).backgroundColor"
    canvas = "document.querySelector('canvas').toDataURL()"
    assert tab.evaluate(color) == "rgb(20, 23, 27)"
    dark = tab.evaluate(canvas)
    tab.get_by_role("button", name="Dark / light").click()
    assert tab.evaluate(color) == "rgb(255, 255, 255)"
    assert tab.evaluate(canvas) != dark
    tab.keyboard.press("d")
    assert tab.evaluate(color) == "rgb(20, 23, 27)"
    assert tab.evaluate(canvas) == dark


@pytest.mark.slow
@chromium_only  # Firefox can't print over WebDriver BiDi with the styles of paper
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_printing_is_light_and_cuts_nothing_off(scheme: str, open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(2, 4), torch.randn(30, 2)), scheme, width=1040)  # A4, landscape
    tab.emulate_media(media="print", color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = """() => [...document.querySelectorAll('.n, .sum span, .btn')].filter(
        (one) => one.offsetParent && one.getBoundingClientRect().right > innerWidth).length"""
    assert tab.evaluate(outside) == 0
    background = tab.evaluate("getComputedStyle(document.getElementById('page')).backgroundColor")
    assert background in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    assert not tab.locator(".whatif").is_visible()
    assert tab.pdf(landscape=True).startswith(b"%PDF")

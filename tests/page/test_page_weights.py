"""The tables of weights, and what a page says about numbers that it has no room for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from page_helpers import READ_CELLS, ExpectedNumbers, OpenPage, needs_browser

import unrolled as ur

pytestmark = needs_browser

# The numbers that are wider than their cells, on either side.
CUT = """(selector) => [...document.querySelectorAll(selector)].filter((cell) => {
  if (!cell.offsetParent || cell.hidden) return false;
  const text = document.createRange();
  text.selectNodeContents(cell.lastChild);
  const [inner, outer] = [text.getBoundingClientRect(), cell.getBoundingClientRect()];
  return inner.left < outer.left - 0.5 || inner.right > outer.right + 0.5;
}).map((cell) => cell.textContent)"""
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def negative(layer: ur.Recurrent) -> ur.Recurrent:
    """Give a layer weights with all digits and a minus sign, which take the most room."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(-0.1 - 0.4 * torch.rand_like(parameter))
    return layer


LAYERS: dict[str, Callable[[], ur.Recurrent]] = {
    "RNN": lambda: ur.RNN(2, 3),
    "LSTM": lambda: ur.LSTM(2, 3),
    "wide": lambda: ur.LSTM(15, 16),
    "peepholes": lambda: ur.Recurrent(ur.cells.PeepholeLSTM, 9, 5),
    "vectors and heads": lambda: ur.Recurrent(ur.cells.RGLRU, 4, 6, heads=2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "RNN" else pytest.mark.slow) for name in LAYERS]
)
def test_no_weight_is_cut_off(name: str, open_page: OpenPage) -> None:
    trace = ur.trace(negative(LAYERS[name]()), torch.randn(4, LAYERS[name]().input_size))
    tab = open_page(trace)
    tab.keyboard.press("w")
    expected = ExpectedNumbers(trace.layers[0])
    for width in (360, 768, 1366, 1920):
        tab.set_viewport_size({"width": width, "height": 768})
        tab.evaluate(SETTLED)
        cells = tab.evaluate(READ_CELLS, ".weights .n")
        assert len(cells) >= 3 * (2 + 3 + 2)
        assert [text for _, text in cells] == [expected.text(number) for number, _ in cells]
        assert tab.evaluate(CUT, ".weights .n") == [], width
        if width > 800:  # a phone scrolls
            assert tab.evaluate("(({scrollWidth, clientWidth}) => scrollWidth - clientWidth)"
                                "(document.querySelector('.weights'))") <= 1  # fmt: skip


@pytest.mark.parametrize("name", ["LSTM", pytest.param("SLSTM", marks=pytest.mark.slow)])
def test_no_number_of_a_step_is_cut_off(name: str, open_page: OpenPage) -> None:
    layer = ur.Recurrent(getattr(ur.cells, name), 2, 3)
    tab = open_page(ur.trace(negative(layer), torch.rand(4, 2)))
    for width in (768, 1366, 1839, 1840, 1920):
        tab.set_viewport_size({"width": width, "height": 768})
        tab.evaluate(SETTLED)
        assert tab.evaluate(CUT, ".tables .n") == [], width


def test_heads_and_rows_of_weights(open_page: OpenPage) -> None:
    """Columns are named by what they multiply, rows by their gate. Windows say of how many they are."""
    tab = open_page(
        ur.trace(ur.LSTM(2, 12), torch.randn(4, 2)), address="#step=2&unit=14&number=weight_hh&column=9"
    )
    table = tab.get_by_role("table", name="weights of f")
    heads = [text for text in table.locator(".over").all_text_contents() if text]
    assert heads[0] == "weight_ih"
    assert re.fullmatch(r"weight_hh, \d of 12", heads[2])
    shown = int(heads[2].split()[1])
    assert heads[4:6] == ["x[0]", "x[1]"]
    columns = [int(text[2:-1]) for text in heads[6:]]
    assert columns == list(range(columns[0], columns[0] + shown))
    assert 9 in columns
    assert "rows 12–23: Wif, bif, Whf, bhf" in table.text_content()
    weight = tab.locator(".weights .n.on").evaluate("(cell) => cell.refer()")
    assert weight == {"q": "weight_hh", "u": 14, "j": 9}
    # Row 14 belongs to the forget gate, so no other equation has this weight.
    assert [text[:2] for text in tab.locator(".equations li.on").all_text_contents()] == ["ft"]
    assert tab.locator(".equations [data-q].on").all_text_contents() == ["Whf ht−1 + bhf"]


@pytest.mark.slow
def test_numbers_and_weights_of_a_simple_layer_are_shown_together(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.RNN(2, 3), torch.randn(4, 2)))
    for part in (".tables .n", ".weights .n"):
        bottoms = tab.locator(part).evaluate_all(
            "(all) => all.map((one) => one.getBoundingClientRect().bottom)"
        )
        assert len(bottoms) > 11
        assert 0 < max(bottoms) <= 768
    assert not tab.get_by_role("button", name="Weights", exact=True).is_visible()
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)))
    assert tab.get_by_role("button", name="Weights", exact=True).is_visible()
    assert not tab.locator(".weights .n").first.is_visible()


@pytest.mark.slow
def test_omitted_numbers_are_mentioned(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(3, 8), torch.randn(20, 3)))
    captions = tab.locator(".captions")
    [steps] = captions.locator("span:not(.names)").all_text_contents()
    shown = tab.locator(".strip .step:not(.start)").evaluate_all(
        "(all) => all.map((one) => one.dataset.step)"
    )
    assert steps == f"steps {shown[0]}–{shown[-1]} of 20"
    assert tab.get_by_role("heading", name="Every number of step 2").is_visible()
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.wait_for_function("() => document.querySelectorAll('.strip .step').length === 1")
    names = captions.locator(".names").all_text_contents()
    assert names == ["c cell state", "h hidden state, output", "x input"]
    assert all(one.is_visible() for one in captions.locator(".names").all())
    texts = captions.locator("span:not(.names)").all_text_contents()
    units = [int(text) for text in tab.locator(".tables .gate").first.locator(".unit").all_text_contents()
             for text in [text.strip("[]")]]  # fmt: skip
    assert units == list(range(8))
    assert texts[0] == "step 2 of 20"
    assert re.fullmatch(r"units \d–\d of 8", texts[1])
    assert tab.locator(".tables .head .quiet").first.text_content() == "how much of the old c is kept"
    assert tab.locator(".tables .head .quiet").first.is_visible()


@pytest.mark.slow
def test_a_window_of_units_is_in_the_heading(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.GRU(3, 40), torch.randn(30, 3)), address="#step=12&unit=37&number=h")
    assert tab.get_by_role("heading", name="Step 12, units 32–39 of 40").is_visible()


def legend_of(tab: Any) -> str:
    return str(tab.locator(".legend").text_content())


@pytest.mark.slow
def test_legend_has_what_is_drawn(open_page: OpenPage) -> None:
    text = legend_of(open_page(ur.trace(ur.RNN(2, 3), torch.randn(4, 2))))
    assert text.startswith("Bars in a box: units 0, 1 and 2; the chosen one is dark.")
    assert "gate" not in text
    assert "you can change it" in text
    text = legend_of(open_page(ur.trace(ur.LSTM(3, 40), torch.randn(4, 3))))
    assert "gate, 0 to 1" in text
    assert "Bars" not in text


def test_arrow_keys_stay_in_the_open_weights(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)), address="#step=1&unit=0&number=f")
    lit = "[...document.querySelectorAll('.weights .n.src')].map((cell) => cell.refer().u)"
    tab.keyboard.press("w")
    for key, place in (("ArrowDown", "step=1&unit=1"), ("ArrowRight", "step=2&unit=1")):
        tab.keyboard.press(key)
        assert f"{place}&number=f" in tab.url
        assert set(tab.evaluate(lit)) == {3 + 1}  # row 1 of the forget gate
        assert tab.locator(".weights .n").first.is_visible()
    tab.keyboard.press("c")  # another quantity is among the numbers
    assert not tab.locator(".weights .n").first.is_visible()
    assert tab.locator(".tables .n.on").is_visible()


LIT = "[...document.querySelectorAll('.equations li.on')].map((line) => line.textContent.split(' = ')[0])"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "lines"),
    [
        ("UnICORNN", {"control": ["pace"]}),
        ("LRU", {"nu": ["size"], "theta": ["turn"]}),
        ("AntisymmetricRNN", {"weight_hh": ["turn"]}),
        ("RGLRU", {"decay": ["log_at"], "weight_r": ["rt"]}),
        ("LayerNormLSTM", {"gain_hh": ["ft", "it", "gt", "ot"], "gain_c": ["ht"]}),
    ],
)
def test_equations_with_a_parameter_light_up(
    cell: str, lines: dict[str, list[str]], open_page: OpenPage
) -> None:
    trace = ur.trace(ur.Recurrent(getattr(ur.cells, cell), 3, 3), torch.randn(4, 3))
    for name, expected in lines.items():
        column = "&column=1" if getattr(trace.layers[0].cell, name).dim() > 1 else ""
        tab = open_page(trace, address=f"#step=1&unit=1&number={name}{column}")
        assert tab.evaluate(LIT) == expected

"""The address, the keyboard, the tour and the guide line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from page_helpers import OpenPage, needs_browser, printed, small_trace

import unrolled as ur

pytestmark = needs_browser


def heading(tab: Any) -> str:
    return str(tab.locator(".why h2").text_content())


def entries(tab: Any) -> dict[str, str]:
    """Return the entries of the address."""
    found: dict[str, str] = tab.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    return found


@pytest.mark.slow
def test_choices_are_entries_of_the_history(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace)
    assert heading(tab) == "Where does h2[1] come from?"
    length = tab.evaluate("history.length")
    choices: list[tuple[Callable[[], None], dict[str, str], str]] = [
        (
            tab.locator('.strip [data-step="1"] .title').click,
            {"step": "1", "unit": "1", "number": "h"},
            "h1[1]",
        ),
        (tab.locator('[data-node="f"] .n').nth(3).click, {"step": "1", "unit": "0", "number": "f"}, "f1[0]"),
        (tab.locator(".sum .lab button").first.click, {"number": "weight_ih", "column": "0"}, "Wif[0,0]"),
        (tab.locator(".node[data-node='c']").click, {"step": "1", "number": "c"}, "c1[0]"),
        (tab.locator(".start .n").nth(4).click, {"step": "start", "unit": "1", "number": "h"}, "hstart[1]"),
    ]
    for k, (choose, expected, name) in enumerate(choices):
        choose()
        assert entries(tab).items() >= expected.items()
        assert f" {name}" in heading(tab)
        assert tab.evaluate("history.length") == length + k + 1
        assert tab.title().startswith(tab.evaluate("document.title"))
    for _, expected, name in choices[-2::-1]:
        tab.evaluate("history.back()")
        wait_for_heading(tab, f" {name}")
        assert entries(tab).items() >= expected.items()
    tab.evaluate("history.back()")
    wait_for_heading(tab, "Where does h2[1] come from?")
    tab.evaluate("history.forward()")
    wait_for_heading(tab, f" {choices[0][2]}")
    tab.locator("body").press("Backspace")
    wait_for_heading(tab, "h2[1]")


def wait_for_heading(tab: Any, text: str) -> None:
    """Wait until the heading of the chosen number contains a text."""
    tab.wait_for_function("(text) => document.querySelector('.why h2').textContent.includes(text)", arg=text)


@pytest.mark.slow
def test_links_open_their_number(open_page: OpenPage) -> None:
    trace = ur.trace(ur.GRU(2, 3, num_layers=2), torch.randn(4, 2))
    tab = open_page(trace, address="#layer=1&step=3&unit=2&number=r")
    part = trace.layers[1]
    assert "r3[2]" in heading(tab)
    value = tab.locator(".arithmetic .value")
    assert value.text_content() == f"r3[2] = {printed(part['r'][3, 0, 2].item())}"
    assert tab.get_by_label("layer", exact=True).input_value() == "1"
    unknown = ("#step=9&unit=0&number=h", "#step=1&unit=7&number=h", "#number=nothing&unit=0&step=0",
               "#layer=7&step=0&unit=0&number=h", "#step=0&unit=0&number=weight_ih&column=99",
               "#step=one&unit=&number=h.x", "#&&=%", "#step=1&unit=1&number=sum.h",
               "#step=1&unit=1&number=__proto__", "#step=start&unit=1&number=r",
               "#step=1&unit=0.5&number=h")  # fmt: skip
    for address in unknown:
        tab.evaluate("(hash) => { location.hash = hash; }", address)
        tab.wait_for_timeout(20)
        assert value.text_content().count("=") == 1
        assert "NaN" not in tab.locator("body").inner_text(), address
        assert "undefined" not in tab.locator("body").inner_text(), address


@pytest.mark.slow
def test_keys(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace)
    press = tab.keyboard.press
    for keys, name in (
        ("ArrowLeft", "h1[1]"), ("ArrowRight ArrowRight", "h3[1]"), ("ArrowRight", "h3[1]"),
        ("ArrowDown", "h3[2]"), ("ArrowDown", "h3[0]"), ("ArrowUp", "h3[2]"), ("f", "f3[2]"),
        ("k", "sumf[2]"), ("j j", "f3[2]·c2[2]"), ("j", "(Wii x3 + bii)[2]"),
        ("c", "c3[2]"), ("x", "x3[1]"), ("o", "o3[2]"), ("Enter", "sumo[2]"), ("Enter", "(Wio x3 + bio)[2]"),
        ("Enter", "Wio[2,0]"), ("Backspace Backspace", "sumo[2]"), ("[", "sumo[2]"),
    ):  # fmt: skip
        for key in keys.split():
            press(key)
            if key == "Backspace":
                tab.wait_for_timeout(100)
        assert f" {name} " in heading(tab).replace("?", " "), keys
    assert entries(tab)["step"] == "2"
    press("x")
    press("e")
    field = tab.get_by_role("textbox", name="type a value")
    assert field.evaluate("(one) => one === document.activeElement")
    press("Control+a")
    tab.keyboard.type("0.125")
    press("Enter")
    assert "1 value changed" in tab.locator(".changes").text_content()
    assert not field.evaluate("(one) => one === document.activeElement")
    press("R")
    assert not tab.locator(".changes").is_visible()
    press("w")
    assert tab.locator(".weights .n").first.is_visible()
    press("w")
    assert not tab.locator(".weights .n").first.is_visible()
    theme = "getComputedStyle(document.getElementById('page')).colorScheme"
    before = tab.evaluate(theme)
    press("d")
    assert tab.evaluate(theme) != before
    press("?")
    assert tab.locator("dialog").is_visible()
    press("Escape")
    assert not tab.locator("dialog").is_visible()
    press("t")
    press("n")
    assert "2 of 6" in tab.locator(".guide").text_content()
    press("Escape")
    assert "No problem found" in tab.locator(".guide").text_content()


@pytest.mark.slow
def test_keys_of_gates_and_weights(open_page: OpenPage) -> None:
    """Letters of gates, weights by Tab and arrows, and the way out of the field."""
    tab = open_page(ur.trace(ur.GRU(2, 3), torch.randn(4, 2)))
    press = tab.keyboard.press
    for keys, name in (("n", "n2[1]"), ("r", "r2[1]"), ("z", "z2[1]")):
        press(keys)
        assert f" {name} " in heading(tab).replace("?", " ")
    press("w")
    while not tab.evaluate("document.activeElement.closest('.weights') !== null"):
        press("Tab")
    press("Enter")
    for keys, name in (
        ("", "Wiz[0,0]"), ("ArrowRight", "Wiz[0,1]"), ("ArrowRight", "Wiz[0,0]"), ("ArrowDown", "Wiz[1,0]"),
        ("ArrowUp ArrowUp", "Wir[2,0]"),
    ):  # fmt: skip
        for key in keys.split():
            press(key)
        assert f" {name} " in heading(tab).replace("?", " "), keys
    before = tab.locator(".why .value").text_content()
    press("e")
    tab.keyboard.type("7")
    press("Escape")
    assert tab.locator(".why .value").text_content() == before
    press("h")
    assert " h2[1] " in heading(tab).replace("?", " ")


@pytest.mark.slow
def test_letters_of_other_keys_name_quantities_with_shift(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.Recurrent(ur.cells.STAR, 2, 3), torch.randn(4, 2)))
    tab.keyboard.press("K")
    assert " k2[1] " in heading(tab).replace("?", " ")


TOURS = ("RNN", "LSTM", "GRU", "MGU", "SLSTM", "MinGRU")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOURS)
def test_tour(name: str, open_page: OpenPage) -> None:
    trace = small_trace(getattr(ur.cells, name))
    tab = open_page(trace, width=1366)
    tab.get_by_role("button", name="Start the tour").click()
    count = int(tab.locator(".guide .count").text_content().split()[-1])
    assert 4 <= count <= 6
    seen = set()
    for stop in range(count):
        guide = tab.locator(".guide").text_content()
        assert guide.startswith(f"{stop + 1} of {count}")
        seen.add(guide)
        framed = tab.locator(".toured")
        assert framed.count() == 1, guide
        box = framed.bounding_box()
        assert box["width"] > 0
        assert box["height"] > 0
        value = tab.locator(".arithmetic .value").text_content()
        assert "undefined" not in value
        assert value.count("=") == 1
        tab.locator(".guide .go").click()
    assert len(seen) == count
    assert tab.locator(".toured").count() == 0
    assert "No problem found" in tab.locator(".guide").text_content()
    tab.reload()
    tab.wait_for_selector(".arithmetic .value")
    assert tab.get_by_role("button", name="Start the tour").count() == 0  # it isn't offered twice


# Whether the framed element is in the window, below the guide line.
FRAME_IS_VISIBLE = """() => {
  const boxOf = (selector) => document.querySelector(selector).getBoundingClientRect();
  const [guide, framed] = [boxOf('.guide'), boxOf('.toured')];
  return framed.top >= guide.bottom && framed.bottom <= innerHeight + 1;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_tour_scrolls_to_what_it_frames(width: int, open_page: OpenPage) -> None:
    for layer in (ur.RNN(2, 3), ur.LSTM(2, 3)):
        tab = open_page(ur.trace(layer, torch.randn(4, 2)), width=width, height=720)
        tab.keyboard.press("t")
        for stop in range(6):
            assert tab.evaluate(FRAME_IS_VISIBLE), (layer, stop)
            tab.keyboard.press("n")
        assert tab.locator(".guide .count").count() == 0


@pytest.mark.slow
def test_tour_of_a_relu_layer_and_one_step(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.RNN(2, 3, nonlinearity="relu"), torch.ones(1, 2)), width=360)
    tab.keyboard.press("t")
    texts = []
    while tab.locator(".guide .count").count():
        assert tab.evaluate(FRAME_IS_VISIBLE)
        texts.append(tab.locator(".guide p").text_content())
        tab.keyboard.press("n")
    assert len(texts) == 5
    assert not any("tanh" in text or "The next step" in text for text in texts)
    assert "ReLU replaces negative sums with 0" in texts[3]


@pytest.mark.slow
def test_tour_of_short_sequences_and_single_units(open_page: OpenPage) -> None:
    for cell in (ur.RNN, ur.LSTM, ur.GRU):
        for bidirectional in (False, True):
            tab = open_page(ur.trace(cell(1, 1, bidirectional=bidirectional), torch.randn(1, 1)))
            if bidirectional:
                tab.get_by_label("layer", exact=True).select_option("1")
            tab.keyboard.press("t")
            while tab.locator(".guide .count").count():
                assert tab.locator(".toured").count() == 1
                tab.keyboard.press("n")


@pytest.mark.slow
def test_a_page_of_some_steps(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unrolled.page.layer_data.INTERVALS", ())  # too large to compute
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(100, 2))
    with pytest.warns(UserWarning, match="12 of the 100 time steps"):
        tab = open_page(trace, limit=1000, address="#step=98&unit=1&number=c")
    # Step 98 isn't on the page, but step 99 is, and it reads this state.
    assert heading(tab) == "What is c98[1]?"
    assert tab.locator(".arithmetic .value").text_content().endswith(printed(trace["c"][98, 0, 1].item()))
    tab.keyboard.press("t")
    while tab.locator(".guide .count").count():
        assert tab.locator(".toured").count() == 1
        tab.keyboard.press("n")


@pytest.mark.slow
def test_guide_names_a_shut_gate(open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 3)
    with torch.no_grad():
        layer.bias_ih_l0[4] = -12
    tab = open_page(ur.trace(layer, torch.randn(30, 2)))
    guide = tab.locator(".guide")
    assert guide.text_content().startswith("Problem: ")
    assert "f[1]" in guide.text_content()
    assert "shut" in guide.text_content()
    assert guide.text_content()[9:].startswith(
        tab.locator(".findings li span").nth(1).text_content().split("  ")[0][:60]
    )
    guide.get_by_role("button", name="Show it").click()
    assert tab.locator(".n.on").count() > 0
    assert entries(tab)["number"] in ("f", "bias_ih")


@pytest.mark.parametrize("row", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_guide_names_nan(row: int, open_page: OpenPage) -> None:
    """The page shows row 0. NaN in another row is mentioned, too."""
    x = torch.randn(4, 2, 2)
    x[2, row, 1] = float("nan")
    tab = open_page(ur.trace(ur.GRU(2, 3), x), batch=0)
    guide = tab.locator(".guide")
    assert guide.text_content().startswith("Problem: ")
    assert "NaN" in guide.text_content()
    show = guide.get_by_role("button", name="Show it")
    if row == 1:
        assert "row 1" in guide.text_content()
        assert show.count() == 0
        assert "NaN" not in "".join(tab.locator(".strip .n").all_text_contents())
    else:
        show.click()
        assert entries(tab).items() >= {"step": "2", "unit": "1", "number": "x"}.items()
        assert tab.locator(".strip .n.on").text_content() == "NaN"

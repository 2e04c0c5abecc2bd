"""The text on the page: its colors, strong passages, and what is similar to a selected range."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from page_helpers import OpenPage, enter, needs_browser, printed, rounded
from torch.nn.functional import linear

import unrolled as ur
from unrolled.page.contents import page_data

pytestmark = needs_browser

TEXT = (
    "It was the best of times,\nit was the worst of times,\nit was the age of\twisdom, it was the age of fog."
)
STOPS = ["2166ac", "67a9cf", "d1e5f0", "f7f7f7", "fddbc7", "ef8a62", "b2182b"]
GATE_STOPS = ["ffffff", "0b7a63"]


class Bessel(ur.Cell):
    """A cell whose numbers the browser can't compute, so that large pages have only some steps."""

    weight = ur.Param("hidden", "input")
    turn = ur.Param("hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        z = torch.sigmoid(linear(x, self.weight))
        h = z * torch.special.bessel_j0(linear(h, self.turn)) - (1 - z) * torch.tanh(linear(x, self.weight))
        return h


def text_trace(text: str = TEXT, hidden: int = 12, cell: type[ur.Cell] = ur.cells.LSTM) -> ur.Trace:
    """Trace a layer with large weights, so that units are on and off, on random features of characters."""
    characters = sorted(set(text))
    layer = ur.Recurrent(cell, 4, hidden)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(4)
    features = torch.randn(len(characters), 4)
    return ur.trace(layer, features[[characters.index(one) for one in text]])


def color(value: float, stops: list[str], low: float, high: float) -> list[float]:
    """Return the color of a value, interpolated between equally spaced stops."""
    channels = np.array([list(bytes.fromhex(stop)) for stop in stops]).T
    position = np.clip((value - low) / (high - low), 0, 1) * (len(stops) - 1)
    return [float(np.interp(position, range(len(stops)), channel)) for channel in channels]


def colors_on_page(tab: Any) -> np.ndarray:
    script = "(spans) => spans.map((one) => one.style.background.match(/\\d+/g)?.map(Number) ?? [-1, -1, -1])"
    return np.array(tab.locator(".text [data-step]").evaluate_all(script))


def assert_colors(tab: Any, values: torch.Tensor, stops: list[str], low: float, high: float) -> None:
    expected = [color(value, stops, low, high) for value in values.tolist()]
    assert np.abs(colors_on_page(tab) - expected).max() <= 0.51


def passages_on_page(tab: Any) -> list[tuple[str, int, int]]:
    script = """(items) => items.map((one) => [one.querySelector('.mean').textContent,
        ...['from', 'to'].map((end) => Number(one.querySelector('.passage').dataset[end]))])"""
    return [tuple(one) for one in tab.locator(".passages li").evaluate_all(script)]


@pytest.mark.slow
def test_colors_and_numbers_are_those_of_the_trace(open_page: OpenPage) -> None:
    t = text_trace()
    tab = open_page(t, labels=TEXT, address="#step=7&unit=5&number=h")
    assert tab.locator(".text").text_content() == TEXT.replace("\n", "⏎").replace("\t", "⇥")
    assert_colors(tab, t["h"][:, 0, 5], STOPS, -1, 1)
    assert (
        tab.locator(".readout").first.text_content()
        == f"Step 7, “t”: h[5] = {printed(t['h'][7, 0, 5].item())}"
    )
    tab.get_by_label("quantity of the text").select_option("f")
    assert_colors(tab, t["f"][:, 0, 5], GATE_STOPS, 0, 1)
    tab.get_by_label("quantity of the text").select_option("c")
    enter(tab.get_by_label("unit of the text"), "9")
    largest = max(1.0, t["c"].abs().max().item())
    assert_colors(tab, t["c"][:, 0, 9], STOPS, -largest, largest)
    tab.locator('.text [data-step="31"]').click()
    assert tab.locator(".text .now").text_content() == TEXT[31]
    assert tab.locator(".arithmetic .value").text_content() == f"c31[9] = {printed(t['c'][31, 0, 9].item())}"
    assert tab.url.endswith("#step=31&unit=9&number=c")
    tab.locator('.text [data-step="25"]').hover()
    value = printed(t["c"][25, 0, 9].item())
    assert tab.locator(".readout").first.text_content() == f"Step 25, “⏎”: c[9] = {value}"
    enter(tab.get_by_label("unit of the text"), "12")  # there are 12, counted from 0
    assert tab.get_by_label("unit of the text").input_value() == "9"


def strongest(values: np.ndarray, width: int, sign: int) -> list[tuple[str, int, int]]:
    """Return the five strongest windows that don't overlap, the strongest first."""
    means = np.convolve(values, np.ones(width) / width, "valid")
    found: list[int] = []
    for start in np.argsort(-sign * means, kind="stable").tolist():
        if len(found) < 5 and all(abs(start - other) >= width for other in found):
            found.append(start)
    return [(rounded(float(means[k]), 4), k, k + width - 1) for k in found]


@pytest.mark.slow
def test_strongest_passages(open_page: OpenPage) -> None:
    t = text_trace()
    tab = open_page(t, labels=TEXT, address="#step=7&unit=3&number=h")
    values = t["h"][:, 0, 3].double().numpy()
    for width in (10, 5):
        tab.get_by_label("steps of a passage").select_option(str(width))
        assert passages_on_page(tab) == strongest(values, width, 1) + strongest(values, width, -1)
    _, first, last = strongest(values, 5, 1)[0]
    passage = tab.locator(".passage").first
    assert passage.locator("b").text_content() == TEXT[first : last + 1].replace("\n", "⏎").replace("\t", "⇥")
    passage.click()
    assert tab.locator(".text .now").get_attribute("data-step") == str(first)


def units_on(values: np.ndarray, first: int, last: int, threshold: float) -> list[tuple[int, int]]:
    """Return the units, as (sign, unit), that are on over a range and off around it, the strongest first."""
    found = {}
    for sign in (1, -1):
        on = np.pad(sign * values >= threshold, ((1, 1), (0, 0)))
        exact = on[first + 1 : last + 2].all(0) & ~on[first] & ~on[last + 2]
        found |= {
            (sign, unit): abs(values[first : last + 1, unit].mean()) for unit in exact.nonzero()[0].tolist()
        }
    return sorted(found, key=lambda one: -found[one])


def passages_like(
    values: np.ndarray, units: list[tuple[int, int]], first: int, last: int, threshold: float
) -> list[tuple[str, int, int]]:
    """Return the runs outside of a range in which at least half of the units are on."""
    on = np.stack([sign * values[:, unit] >= threshold for sign, unit in units], 1)
    many = np.pad(2 * on.sum(1) >= len(units), 1)
    edges = np.flatnonzero(many[1:] != many[:-1]).reshape(-1, 2)
    runs = [(start, stop - 1) for start, stop in edges.tolist() if stop - 1 < first or start > last]
    matches = {run: sum(one in units_on(values, *run, threshold) for one in units) for run in runs}
    runs.sort(key=lambda run: (-matches[run], abs((run[1] - run[0]) - (last - first)), run[0]))
    return [(f"{matches[run]}/{len(units)}", *run) for run in runs[:10]]


def found_on_page(tab: Any) -> list[str]:
    return list(tab.locator(".unit-chip").all_text_contents())


def names(units: list[tuple[int, int]]) -> list[str]:
    return [f"{'−' if sign < 0 else ''}h[{unit}]" for sign, unit in units]


@pytest.mark.slow
def test_similar_units_and_passages(open_page: OpenPage) -> None:
    t = text_trace(hidden=24)
    values = t["h"][:, 0].double().numpy()
    ranges = [
        (k, k + width)
        for width in (3, 2, 1)
        for k in range(20, 60)
        if len(units_on(values, k, k + width, 0.3)) > 1
    ]
    first, last = ranges[0]
    tab = open_page(t, labels=TEXT)
    span = tab.locator(f'.text [data-step="{first}"]')
    span.hover()
    tab.mouse.down()
    tab.locator(f'.text [data-step="{last}"]').hover()
    tab.mouse.up()
    units = units_on(values, first, last, 0.3)
    assert tab.locator(".text .selected").count() == last - first + 1
    assert f"range={first}-{last}" in tab.url
    assert found_on_page(tab) == names(units)
    assert passages_on_page(tab) == passages_like(values, units, first, last, 0.3)
    tab.locator(".unit-chip").first.click()
    assert tab.get_by_label("unit of the text").input_value() == str(units[0][1])
    tab.get_by_label("threshold").fill("0.2")
    assert found_on_page(tab) == names(units_on(values, first, last, 0.2))

    deep = open_page(t, labels=TEXT, address=tab.url[tab.url.index("#") :])
    assert found_on_page(deep) == names(units)


@pytest.mark.slow
def test_a_range_is_selected_with_the_keys(open_page: OpenPage) -> None:
    tab = open_page(text_trace(), labels=TEXT, address="#step=10&unit=0&number=h&range=5-400")
    assert tab.locator(".text .selected").count() == 0  # there aren't as many steps
    tab.locator(".text").focus()
    for _ in range(3):
        tab.keyboard.press("Shift+ArrowRight")
    assert "range=10-13" in tab.url
    for _ in range(5):
        tab.keyboard.press("Shift+ArrowLeft")
    assert "range=8-10" in tab.url
    enter(tab.get_by_label("last step of the range"), "20")
    assert "range=8-20" in tab.url
    tab.locator(".text").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".text .now").get_attribute("data-step") == "11"
    tab.keyboard.press("Escape")
    assert "range=" not in tab.url


@pytest.mark.slow
def test_words_and_pages_without_a_text(open_page: OpenPage) -> None:
    t = ur.trace(ur.GRU(2, 3), torch.randn(4, 2))
    tab = open_page(t, labels=["It", "was", "the", "age"])
    assert tab.locator(".more .text").text_content() == "It was the age "
    assert tab.locator(".strip").count() == 1  # a short sequence still opens with its numbers
    assert open_page(t).locator(".text").count() == 0


@pytest.mark.slow
def test_changed_numbers_change_the_colors(open_page: OpenPage) -> None:
    t = text_trace()
    tab = open_page(t, labels=TEXT, address="#step=10&unit=2&number=h&edit=f@10[2]=0;o@10[2]=0.5")
    recomputed = 0.5 * math.tanh((t["i"][10, 0, 2] * t["g"][10, 0, 2]).item())
    expected = color(recomputed, STOPS, -1, 1)
    assert np.abs(colors_on_page(tab)[10] - expected).max() <= 0.51


@pytest.mark.slow
def test_text_of_a_sampled_page(open_page: OpenPage) -> None:
    text = TEXT * 3
    t = text_trace(text, cell=Bessel)
    with pytest.warns(UserWarning, match="This page contains"):
        tab = open_page(t, labels=text, limit=8_000, address="#step=0&unit=4&number=h")
    assert (
        "The colors of the other steps are rounded to 8 bits."
        in tab.locator(".text-view .note").text_content()
    )
    expected = np.array([color(value, STOPS, -1, 1) for value in t["h"][:, 0, 4].tolist()])
    assert np.abs(colors_on_page(tab) - expected).max() <= 3  # half a level of 127 between two of six stops
    means = [float(mean.replace("−", "-")) for mean, *_ in passages_on_page(tab)]
    exact = [t["h"][first : last + 1, 0, 4].mean().item() for _, first, last in passages_on_page(tab)]
    assert means == pytest.approx(exact, abs=0.011)
    stored = page_data(t, 0, text, "numbers", None, 8_000)["layers"][0]["steps"]
    hidden = next(step for step in range(len(text)) if step not in stored)
    tab.locator(f'.text [data-step="{hidden}"]').hover()
    assert "h[4] ≈ " in tab.locator(".readout").first.text_content()
    tab.get_by_label("quantity of the text").select_option("z")
    assert (
        "have no color for z, and passages can't be found: choose h to color all steps."
        in tab.locator(".text-view .note").text_content()
    )
    shown = (colors_on_page(tab) >= 0).all(1).nonzero()[0].tolist()
    assert shown == stored


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This page contains")
def test_a_text_of_2000_characters_and_256_units(open_page: OpenPage) -> None:
    text = (TEXT * 20)[:2000]
    t = text_trace(text, hidden=256)
    tab = open_page(t, labels=text, address="#step=0&unit=100&number=h&range=40-42")
    values = t["h"][:, 0].double().numpy()
    units = units_on(values, 40, 42, 0.3)
    assert len(set(found_on_page(tab)) ^ set(names(units)[:24])) <= 2  # up to rounding at the threshold
    started = time.perf_counter()
    enter(tab.get_by_label("unit of the text"), "7")
    assert tab.locator(".text .now").count() == 1
    assert time.perf_counter() - started < 5
    encoded = page_data(t, 0, text, "numbers", None, 100_000)["layers"][0]
    assert not encoded["text"]  # two states of 512,000 values are over the limit

"""Keyboard, mouse and buttons of the page."""

from __future__ import annotations

import pytest
import torch
from page_helpers import BACKGROUND, OpenPage, needs_browser, pixel_color
from playwright.sync_api import expect

import unrolled as ur
from unrolled.page.contents import page_data
from unrolled.tracing.explain import format_number

pytestmark = needs_browser


@pytest.mark.slow
def test_keys_buttons_slider_and_playing(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)))
    step_label = tab.locator(".step-label")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Shift+Tab")  # the keys work without any focused element
    assert tab.evaluate("document.activeElement == document.body")
    tab.keyboard.press("ArrowRight")
    assert step_label.text_content() == "step 1 (0–3)"
    tab.keyboard.press("ArrowLeft")
    tab.locator('td[data-key="quantity i"][data-index="0"]').focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset") == {"key": "quantity f", "index": "1"}
    tab.keyboard.press("]")
    assert step_label.text_content() == "step 1 (0–3)"
    assert tab.evaluate("document.activeElement.dataset") == {"key": "quantity f", "index": "1"}
    assert tab.locator(".explanation h3").text_content().startswith("f₁[1] = ")
    tab.get_by_role("slider", name="time step").focus()
    tab.keyboard.press("End")
    assert step_label.text_content() == "step 3 (0–3)"
    assert tab.get_by_role("button", name="next step").get_attribute("aria-disabled") == "true"
    tab.get_by_role("button", name="first step").click()
    tab.locator("#page").focus()
    tab.keyboard.press(" ")
    assert tab.get_by_role("button", name="pause").is_visible()
    expect(step_label).to_have_text("step 3 (0–3)")
    expect(tab.get_by_role("button", name="play")).to_be_visible()


def test_focus_is_kept_when_elements_are_replaced(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.RNN(2, 3), torch.randn(60, 2)))
    boxes = tab.locator(".box")
    boxes.nth(20).focus()
    tab.keyboard.press("Enter")
    expect(tab.locator(".box:focus")).to_contain_text("step 20")
    tab.keyboard.press("]")
    expect(tab.locator(".box:focus")).to_contain_text("step 21")
    tab.locator("td[data-key='quantity h']").first.focus()
    tab.locator(".operands button").first.focus()
    tab.keyboard.press("]")
    expect(tab.locator(".step-label")).to_contain_text("step 22")
    expect(tab.locator(".explanation:focus")).to_have_count(1)
    tab.keyboard.press("Tab")
    expect(tab.locator(".operands li:first-child button:focus")).to_have_count(1)


def test_click_on_a_heat_map_selects_step_and_unit(open_page: OpenPage) -> None:
    t = ur.trace(ur.GRU(2, 5), torch.randn(8, 2))
    tab = open_page(t)
    canvas = tab.locator("figure.heat-map", has=tab.get_by_text("z", exact=True)).locator("canvas")
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 6.5 / 8, "y": box["height"] * 3.5 / 5})
    assert tab.locator(".step-label").text_content() == "step 6 (0–7)"
    shown = tab.locator(".explanation h3").text_content()
    assert shown == f"z₆[3] = {format_number(t['z'][6, 0, 3].item())}"
    style = tab.locator('td[data-key="quantity z"][data-index="3"]').evaluate(BACKGROUND)
    assert style == f"rgb({', '.join(map(str, pixel_color(canvas, 6, 3)))})"
    # when units are grouped, another one is at this position
    tab.get_by_label("group similar units").check()
    canvas.click(position={"x": box["width"] * 6.5 / 8, "y": box["height"] * 3.5 / 5})
    unit = page_data(t, 0, None, "numbers", None, 10_000)["layers"][0]["unitOrder"][3]
    shown = tab.locator(".explanation h3").text_content()
    assert shown == f"z₆[{unit}] = {format_number(t['z'][6, 0, unit].item())}"
    canvas.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".step-label").text_content() == "step 7 (0–7)"
    assert f"z₇[{unit}]" in tab.locator(".explanation h3").text_content()


def test_values_of_parameter_images_can_be_read(open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 8)
    tab = open_page(ur.trace(layer, torch.randn(2, 2)))
    figure = tab.locator("figure", has=tab.get_by_text("weight_hh", exact=True))
    box = figure.locator("canvas").bounding_box()
    figure.locator("canvas").hover(position={"x": box["width"] * 5.5 / 8, "y": box["height"] * 20.5 / 32})
    value = format_number(layer.weight_hh_l0[20, 5].item())
    assert figure.locator(".readout").text_content() == f"weight_hh[20, 5]: {value}"
    figure.locator("canvas").focus()
    tab.keyboard.press("ArrowUp")
    assert figure.locator(".readout").text_content().startswith("weight_hh[19, 5]: ")
    tab.mouse.move(0, 0)  # so that scrolling does not move another value below the pointer
    tab.locator('td[data-key="quantity hidden_sum"][data-index="3"]').focus()
    mark, box = (figure.locator(one).bounding_box() for one in (".mark", "canvas"))
    assert mark["y"] - box["y"] == pytest.approx(box["height"] * 3 / 32 - 2, abs=1)
    assert figure.locator(".mark").count() == 1


@pytest.mark.slow
def test_wide_layers_have_pages_of_columns(open_page: OpenPage) -> None:
    t = ur.trace(ur.RNN(20, 70), torch.randn(2, 20))
    tab = open_page(t, width=1280)
    line = tab.locator('tr[data-key="quantity h"]')
    shown = line.locator("td").count()
    next_units = tab.get_by_role("button", name="next units")
    next_units.click()
    assert line.locator("td").first.text_content() == format_number(t["h"][0, 0, shown].item())
    assert tab.locator('tr[data-key="before h"] td').first.get_attribute("data-index") == str(shown)
    # the input has its own columns
    assert tab.locator('tr[data-key="input"] td').first.get_attribute("data-index") == "0"
    tab.get_by_role("button", name="next values of x").click()
    assert tab.locator('tr[data-key="input"] td').first.get_attribute("data-index") == str(shown)
    while next_units.is_enabled():
        next_units.click()
    last = int(line.locator("td").first.get_attribute("data-index"))
    assert last + line.locator("td").count() == 70
    tab.keyboard.press("Enter")  # a disabled button passes the focus to its neighbor
    assert line.locator("td").first.get_attribute("data-index") == str(last - shown)
    tab.get_by_role("button", name="next step").click()
    assert line.locator("td").first.get_attribute("data-index") == str(last - shown)
    tab.locator(f'td[data-key="quantity h"][data-index="{last - 1}"]').focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.index") == str(last)

"""Changes on the page: every number is the one that torch computes for the changed layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from page_helpers import OpenPage, as_number, needs_browser, numbers_on_page, printed, small_trace
from torch import nn

import unrolled as ur
from helpers.changed_layers import held_names, run_changed
from unrolled.tracing.layer_trace import LayerTrace

pytestmark = needs_browser

Edit = dict[str, Any]


def assert_page_shows(tab: Any, part: LayerTrace, expected: dict[str, torch.Tensor], batch: int = 0) -> None:
    """Compare all numbers of a layer with those of another run, and their marks with the first run."""
    length = int(part.lengths[batch])
    shown = numbers_on_page(tab, length)
    compared = 0
    for (name, step, unit), text in shown.items():
        if name not in part.values or name == "x" or not 0 <= step < length:
            continue
        value = expected[name][step].flatten()[unit].item()
        assert as_number(text) == pytest.approx(value, abs=6e-5, rel=1e-3), (name, step, unit)
        compared += 1
    assert compared >= length * sum(state.shape[-1] for state in part.initial_state.values())


def type_value(tab: Any, value: str) -> None:
    field = tab.get_by_role("textbox", name="type a value")
    field.press("ControlOrMeta+a")
    field.press("Delete")
    tab.keyboard.type(value)
    field.press("Enter")
    field.evaluate("(one) => one.blur()")


def choose(tab: Any, address: str) -> None:
    tab.evaluate("(hash) => { location.hash = hash; }", address)
    name = re.search(r"number=([\w.]+)", address)
    assert name
    tab.wait_for_function(
        "(hash) => location.hash === hash && document.querySelector('.on')", arg=f"#{address}"
    )


def by_typing(address: str) -> Callable[[Any], None]:
    def change(tab: Any) -> None:
        choose(tab, address)
        type_value(tab, "−0,75")

    return change


def by_slider(tab: Any) -> None:
    choose(tab, "step=1&unit=2&number=f")
    slider = tab.get_by_role("slider", name="new value")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", "1")
    slider.fill("0.25")


def in_one_step(tab: Any) -> None:
    by_slider(tab)
    tab.get_by_label("in all steps").uncheck()


EDITS: dict[str, tuple[Callable[[Any], None], Edit, str]] = {
    "input": (
        by_typing("step=1&unit=0&number=x"),
        {"kind": "input", "step": 1, "unit": 0, "value": -0.75},
        "x@1[0]=-0.75",
    ),
    "weight": (
        by_typing("step=0&unit=4&number=weight_hh&column=1"),
        {"kind": "parameter", "name": "weight_hh", "index": 13, "value": -0.75},
        "weight_hh[4,1]=-0.75",
    ),
    "bias": (
        by_typing("step=0&unit=7&number=bias_ih"),
        {"kind": "parameter", "name": "bias_ih", "index": 7, "value": -0.75},
        "bias_ih[7]=-0.75",
    ),
    "state": (
        by_typing("step=start&unit=2&number=c"),
        {"kind": "state", "name": "c", "unit": 2, "value": -0.75},
        "c@start[2]=-0.75",
    ),
    "gate in all steps": (
        by_slider,
        {"kind": "hold", "name": "f", "unit": 2, "steps": [0, 1, 2, 3], "value": 0.25},
        "f[2]=0.25",
    ),
    "gate in one step": (
        in_one_step,
        {"kind": "hold", "name": "f", "unit": 2, "steps": [1], "value": 0.25},
        "f@1[2]=0.25",
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("gate in one step",) else pytest.mark.slow) for name in EDITS],
)
def test_changes_and_their_address(name: str, open_page: OpenPage) -> None:
    change, edit, address = EDITS[name]
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace)
    original = numbers_on_page(tab, 4)
    change(tab)
    (expected,) = run_changed(trace.layers, [{**edit, "part": 0}])
    assert_page_shows(tab, trace.layers[0], expected)
    changed = tab.locator(".changes > span").text_content()
    assert re.fullmatch(r"1 value changed: [1-9]\d* of \d+ numbers differ ", changed)
    assert address in tab.evaluate("new URLSearchParams(location.hash.slice(1)).get('edit')")

    other = open_page(trace, address=tab.evaluate("location.hash"))
    assert_page_shows(other, trace.layers[0], expected)

    tab.get_by_role("button", name="Reset").click()
    assert numbers_on_page(tab, 4) == original
    assert not tab.locator(".changes").is_visible()
    assert "edit" not in tab.evaluate("location.hash")


@pytest.mark.slow
def test_dragging_marks_and_experiments(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace, address="#step=2&unit=1&number=h")
    box = tab.locator('.strip .step[data-step="1"] .n').nth(6).bounding_box()  # x₁[0]
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 30, y, steps=3)
    tab.mouse.up()
    value = round(trace["x"][1, 0, 0].item() + 0.3, 3)
    edits = [{"part": 0, "kind": "input", "step": 1, "unit": 0, "value": value}]
    (expected,) = run_changed(trace.layers, edits)
    assert_page_shows(tab, trace.layers[0], expected)
    choose(tab, f"step=2&unit=1&number=h&edit=x@1[0]={value}")
    assert f"was {printed(trace['h'][2, 0, 1].item())}" in tab.locator(".arithmetic").text_content()
    assert tab.locator('.strip .step[data-step="1"] .n.set').count() == 1
    assert tab.locator('.strip .step[data-step="0"] .n.changed').count() == 0
    assert tab.locator('.strip .step[data-step="2"] .n.changed').count() == 6
    tab.keyboard.press("R")
    shut = tab.get_by_role("button", name="Shut the forget gate of unit 1")
    shut.click()
    hold = {"part": 0, "kind": "hold", "name": "f", "unit": 1, "steps": [0, 1, 2, 3], "value": 0.0}
    (expected,) = run_changed(trace.layers, [hold])
    assert_page_shows(tab, trace.layers[0], expected)
    assert shut.get_attribute("aria-pressed") == "true"
    guide = tab.locator(".guide")
    assert guide.text_content().startswith(
        "Your change: Forget gate f[1] is 0 in all 4 steps, so unit 1 forgets c at every step."
    )
    assert "alarm" not in guide.get_attribute("class")
    shut.click()
    assert tab.locator(".changed, .set").count() == 0
    assert "Your change" not in guide.text_content()
    tab.keyboard.press("Control+z")  # undoes the second click, and then the first one
    assert shut.get_attribute("aria-pressed") == "true"
    assert_page_shows(tab, trace.layers[0], expected)
    choose(tab, "step=2&unit=1&number=h&edit=f[1]=0")
    tab.get_by_role("button", name="No input at step 0").click()
    assert tab.locator(".changes > span").text_content().startswith("3 values changed")
    tab.get_by_role("button", name="Undo").click()
    assert tab.locator(".changes > span").text_content().startswith("1 value changed")
    assert_page_shows(tab, trace.layers[0], expected)


@pytest.mark.slow
def test_a_change_goes_through_layers_and_directions(open_page: OpenPage) -> None:
    rows = nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in (3, 5)], enforce_sorted=False)
    trace = ur.trace(ur.GRU(2, 3, num_layers=2, bidirectional=True), rows)
    edits = [
        {"part": 0, "kind": "input", "step": 1, "unit": 1, "value": 2.0},
        {"part": 1, "kind": "hold", "name": "z", "unit": 0, "steps": [0, 1, 2, 3, 4], "value": 1.0},
        {"part": 2, "kind": "parameter", "name": "weight_ih", "index": 8, "value": 0.5},
    ]
    tab = open_page(trace, batch=1, address="#edit=x@1[1]=2;1:z[0]=1;2:weight_ih[1,2]=0.5")
    assert tab.locator(".changes > span").text_content().startswith("3 values changed")
    for k, part in enumerate(trace.layers):
        tab.get_by_label("layer", exact=True).select_option(str(k))
        assert_page_shows(tab, part, run_changed(trace.layers, edits, 1)[k], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ur.cells.__all__)
def test_changes_of_every_cell(name: str, open_page: OpenPage) -> None:
    trace = small_trace(getattr(ur.cells, name), steps=3)
    part = trace.layers[0]
    parameter = next(iter(part.cell.shapes()))
    index = "1,0" if getattr(part.cell, parameter).dim() > 1 else "1"
    columns = getattr(part.cell, parameter).shape[-1] if "," in index else 1
    edits = [
        {"part": 0, "kind": "input", "step": 1, "unit": 1, "value": 1.25},
        {"part": 0, "kind": "parameter", "name": parameter, "index": columns, "value": -0.5},
    ]
    tab = open_page(trace, address=f"#edit=x@1[1]=1.25;{parameter}[{index}]=-0.5")
    assert_page_shows(tab, part, run_changed(trace.layers, edits)[0])
    gates = tab.evaluate("[...document.querySelectorAll('.tables .n.can')].map((one) => one.refer().q)")
    for gate in set(gates) & held_names(type(part.cell)):
        hold = {"part": 0, "kind": "hold", "name": gate, "unit": 0, "steps": [0, 1, 2], "value": 0.5}
        choose(tab, f"step=1&unit=0&number={gate}&edit={gate}[0]=0.5")
        assert_page_shows(tab, part, run_changed(trace.layers, [hold])[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_a_typed_value_replaces_the_old_one(dtype: torch.dtype, open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3, dtype=dtype), torch.randn(4, 2, dtype=dtype))
    tab = open_page(trace, address="#step=1&unit=1&number=x")
    field = tab.get_by_role("textbox", name="type a value")
    refusal = tab.locator(".whatif [role=alert]")
    old = printed(trace["x"][1, 0, 1].item(), is_given=True)
    too_large = {torch.float32: "1e40", torch.float64: "1e999"}[dtype]
    reasons = {"": "", "ten": "is not a number", "0.5.5": "is not a number", too_large: "is too large for"}
    for text, reason in reasons.items():
        tab.keyboard.press("e")
        tab.keyboard.press("Delete")
        tab.keyboard.type(text)
        tab.keyboard.press("Enter")
        assert field.input_value() == old
        assert refusal.text_content().startswith(f"“{text}” {reason}" if reason else "")
        assert "edit=" not in tab.url
    tab.keyboard.press("e")
    tab.keyboard.type("−2,5")
    tab.keyboard.press("Enter")
    assert (field.input_value(), refusal.text_content()) == ("−2.50", "")
    assert tab.url.endswith("edit=x%401%5B1%5D%3D-2.5")
    tab.keyboard.press("ArrowRight")  # the keys of the page work again
    assert "step=2" in tab.url


@pytest.mark.slow
def test_copy_link_and_changes_that_do_not_exist(open_page: OpenPage) -> None:
    trace = ur.trace(ur.RNN(2, 3), torch.randn(4, 2))
    unknown = "x@9[0]=1;y[0]=1;weight_ih[9,9]=1;h@start[0]=high;5:h@start[0]=1;;=;x@1[1]=0.5"
    tab = open_page(trace, address=f"#edit={unknown}")
    assert tab.locator(".changes > span").text_content().startswith("1 value changed")
    tab.get_by_role("button", name="Copy link").click()
    copied = tab.locator(".changes button", has_text=re.compile("^Cop(ied|y the address above)$"))
    copied.wait_for()


def test_a_page_that_can_not_be_edited_says_why(open_page: OpenPage) -> None:
    class Sorted(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            if x.sum() > 100:
                h = h + 1
            h = torch.tanh(x @ self.weight.T + h.sort(-1).values)
            return h

    tab = open_page(ur.trace(ur.Recurrent(Sorted, 2, 3), torch.randn(4, 2)))
    editor = tab.locator(".whatif").text_content()
    assert "Not possible on this page. Sorted has no diagram, because" in editor
    assert tab.locator(".n.can").count() == 0
    assert not tab.get_by_role("slider").is_visible()

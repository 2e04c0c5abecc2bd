"""The values on the page and their arithmetic are those of the trace."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_helpers import Awkward, Mixed, OpenPage, arithmetic_on_page, needs_browser
from torch import nn

import unrolled as ur
from helpers.layer_pairs import OddCell
from unrolled.cli import example
from unrolled.page import assets
from unrolled.tracing.explain import format_number, with_minus

pytestmark = needs_browser


LAYERS = {
    "rnn": lambda: ur.RNN(2, 3, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(2, 4, proj_size=2, bias=False),
    "gru": lambda: ur.GRU(2, 3, dtype=torch.float64),
    "peephole": lambda: ur.Recurrent(ur.cells.PeepholeLSTM, 2, 3),
    "reset before": lambda: ur.Recurrent(ur.cells.ResetBeforeGRU, 12, 10),
    "odd": lambda: ur.Recurrent(OddCell, 2, 3),
    "mixed": lambda: ur.Recurrent(Mixed, 2, 3),
    "awkward": lambda: ur.Recurrent(Awkward, 2, 4),
}


SLOW = ("gru", "peephole", "odd")  # other layers cover their kinds of values, too


READ_ALL_CELLS = """() => {
  const cells = [];
  const all = (selector) => [...document.querySelectorAll(`table.numbers[role=grid] ${selector}`)];
  const pagerButton = (direction) =>
    all(`.pager button[aria-label^=${direction}]`).find((button) => !button.disabled);
  while (pagerButton('previous')) pagerButton('previous').click();
  do {
    for (const cell of all('td')) {
      cell.focus();
      cells.push([cell.dataset.key, Number(cell.dataset.index), cell.textContent,
        document.querySelector('.arithmetic').textContent]);
    }
    if (!pagerButton('next')) return cells;
    pagerButton('next').click();
  } while (true);
}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.exhaustive if kind in SLOW else ()) for kind in LAYERS],
)
def test_values_and_arithmetic_match_the_trace(kind: str, open_page: OpenPage) -> None:
    t = ur.trace(LAYERS[kind](), torch.randn(3, 2, 12 if kind == "reset before" else 2).to(
        torch.float64 if kind == "gru" else torch.float32))  # fmt: skip
    tab = open_page(t, batch=1)
    for layer_index, part in enumerate(t.layers):
        if len(t.layers) > 1:
            tab.get_by_label("layer", exact=True).select_option(str(layer_index))
        for step in range(3):
            tab.get_by_role("button", name=f"step {step}", exact=False).first.click()
            seen = set()
            for key, index, text, arithmetic in tab.evaluate(READ_ALL_CELLS):
                category, _, name = key.partition(" ")
                if category == "quantity":
                    assert text == format_number(part[name][step, 1].flatten()[index].item())
                    assert arithmetic == arithmetic_on_page(part, name, step, index, batch=1)
                elif category == "before":
                    assert text == format_number(part.state_before(step, 1)[name][index].item())
                else:
                    assert text == format_number(part.input[step, 1, index].item())
                seen.add((key, index))
            assert len(seen) == (
                sum(part[name].shape[2:].numel() for name in part.names)
                + sum(part.cell.state_sizes().values())
                + part.cell.input
            )


numbers = st.one_of(
    st.floats(width=32),
    st.floats(),
    st.integers(-(2**20), 2**20).map(lambda whole: whole / 32),
    st.integers(-(10**8), 10**8).map(lambda whole: whole * 50.0),
)


@pytest.mark.slow
def test_numbers_are_formatted_as_in_python(browser: Any) -> None:
    tab = browser.new_page()
    tab.add_script_tag(
        content=assets.script() + "\nwindow.format = (texts) => texts.map(Number).map(formatNumber);"
    )

    @settings(max_examples=30)
    @given(st.lists(numbers, min_size=50, max_size=200))
    def check(values: list[float]) -> None:
        texts = [repr(value).replace("inf", "Infinity").replace("nan", "NaN") for value in values]
        assert tab.evaluate("(texts) => format(texts)", texts) == [format_number(value) for value in values]

    check()
    halves = [k / 32 for k in range(-65, 66)]
    halves += [123450.0, 123550.0, 1.2345e9, 5e-5, 4.9999e-5, 99999.99995, -0.0]
    assert tab.evaluate("(texts) => format(texts)", list(map(repr, halves))) == list(
        map(format_number, halves)
    )
    tab.close()


def test_operands_are_highlighted_and_can_be_followed(open_page: OpenPage) -> None:
    layer, x = example.example(ur.cells.RNN, None, 0, {})
    tab = open_page(ur.trace(layer, x))
    tab.get_by_role("button", name="step 2").click()
    tab.locator('td[data-key="quantity hidden_sum"][data-index="1"]').hover()
    highlighted = tab.locator("table[role=grid] td.highlighted")
    assert [one.get_attribute("data-key") for one in highlighted.all()] == ["before h"] * 3
    assert tab.locator(".parameters table[aria-label=weight_hh] td.highlighted").all_text_contents() == [
        format_number(value) for value in layer.weight_hh_l0[1].tolist()
    ]
    assert tab.locator(".parameters table[aria-label=bias_hh] td.highlighted").count() == 1
    assert tab.locator(".code li[aria-current]").all_text_contents() == [
        "hidden_sum = linear(h, self.weight_hh, self.bias_hh)"
    ]
    assert tab.locator(".formulas li[aria-current]").count() == 1
    # a parameter is described on hover and when it is selected
    tab.locator(".parameters table[aria-label=weight_ih] td").nth(1).hover()
    assert tab.locator(".explanation h3").text_content() == "weight_ih[0, 1] = -0.1051"
    assert "is a parameter. It is the same at every step" in tab.locator(".arithmetic").text_content()
    tab.locator('td[data-key="quantity hidden_sum"][data-index="1"]').click()
    tab.locator(".operands .parameter button").first.press("Enter")
    assert "is a parameter" in tab.locator(".arithmetic").text_content()
    assert tab.evaluate("document.activeElement.matches('.explanation')")
    # from h in step 2 to the arithmetic of h in step 1
    tab.locator('td[data-key="quantity hidden_sum"][data-index="1"]').click()
    tab.get_by_role("button", name="h₁[0] = 0.2971").click()
    assert tab.locator(".explanation h3").text_content() == "h₁[0] = 0.2971"
    assert tab.locator(".step-label").text_content() == "step 1 (0–3)"
    assert tab.locator("td[aria-selected=true]").get_attribute("data-key") == "quantity h"
    # it has the keyboard focus: arrow keys move from there, wherever the pointer is
    tab.locator('td[data-key="quantity hidden_sum"][data-index="0"]').hover()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".explanation h3").text_content() == "h₁[1] = 0.9556"


@pytest.mark.slow
def test_unnamed_intermediates_are_traced_to_named_values(open_page: OpenPage) -> None:
    t = ur.trace(ur.Recurrent(Awkward, 2, 4), torch.randn(3, 2)).backward(torch.sum)
    tab = open_page(t)
    tab.get_by_role("button", name="step 1").click()

    def highlighted(name: str, index: int) -> set[tuple[str, int]]:
        tab.locator(f'td[data-key="quantity {name}"][data-index="{index}"]').focus()
        cells = tab.locator("table[role=grid] td.highlighted").all()
        return {(one.get_attribute("data-key"), int(one.get_attribute("data-index"))) for one in cells}

    states = {("before h", unit) for unit in range(4)}
    assert highlighted("constructor", 2) == states  # through relu
    assert highlighted("toString", 1) == {("quantity x", 0), ("quantity x", 1)}
    assert tab.locator(".parameters table[aria-label=weight] td.highlighted").count() == 2  # through abs
    assert highlighted("heads", 3) == states | {("quantity constructor", unit) for unit in range(4)}
    assert highlighted("ratio", 0) == {("quantity constructor", 0), ("quantity toString", 0)}
    assert tab.locator(".arithmetic").text_content() == arithmetic_on_page(t.layers[0], "ratio", 1, 0)
    assert re.fullmatch(r"\(\(\S+ / 3\) / 2\)·\S+ = \S+", t.explain("ratio", 1, 0))
    assert highlighted("h", 1) >= states
    assert highlighted("x", 0) == {("input", 0)}
    assert tab.locator(".explanation h3").text_content().startswith("x₁[0]")
    assert "input x₁" in tab.locator(".operands").text_content()
    # functions of rows are not taken for elementwise ones, even if all values are zero
    assert t.explain("running", 0, 1).startswith("cumsum([")
    assert t.explain("heads", 0, 1).startswith("matmul([")


def test_arithmetic_uses_the_recorded_values_of_named_quantities() -> None:
    class Noisy(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            noise = torch.randn_like(h)
            clear = (noise - x) * 0  # the same for any noise
            return h + clear

    t = ur.trace(ur.Recurrent(Noisy, 2, 2), torch.randn(3, 2).abs())
    noise, x = t["noise"][1, 0, 1].item(), t["x"][1, 0, 1].item()
    shown = with_minus(format_number(noise))
    assert t.explain("noise", 1, 1) == f"{shown} = {shown}"
    assert f"({shown} − {format_number(x)})" in arithmetic_on_page(t.layers[0], "clear", 1, 1)


@pytest.mark.slow
def test_explanations_link_to_the_previous_step_and_the_layer_below(open_page: OpenPage) -> None:
    layer = nn.LSTM(2, 3, num_layers=2, bidirectional=True)
    t = ur.trace(layer, torch.randn(3, 2))
    tab = open_page(t, width=1280)
    tab.get_by_label("layer", exact=True).select_option("2")
    tab.get_by_role("button", name="step 1", exact=False).first.click()
    text = tab.locator(".arithmetic")
    tab.locator('td[data-key="before c"][data-index="2"]').click()
    assert text.text_content() == f"From step 0: {arithmetic_on_page(t.layer(1), 'c', 0, 2)}"
    tab.get_by_role(
        "button", name=f"go to c₀[2] = {format_number(t.layer(1)['c'][0, 0, 2].item())} in step 0"
    ).click()
    assert tab.locator(".step-label").text_content().startswith("step 0")
    assert text.text_content() == arithmetic_on_page(t.layer(1), "c", 0, 2)
    assert tab.evaluate("document.activeElement.dataset") == {"key": "quantity c", "index": "2"}
    # the input of the upper layer is the outputs of both directions of the lower layer
    tab.get_by_role("button", name="step 2", exact=False).first.click()
    for index, direction in ((1, "forward"), (4, "backward")):
        tab.get_by_label("layer", exact=True).select_option("2")
        tab.get_by_role("button", name="step 2", exact=False).first.click()
        tab.locator(f'td[data-key="input"][data-index="{index}"]').click()
        below = t.layer(0, direction)
        arithmetic = arithmetic_on_page(below, "h", 2, index % 3)
        assert text.text_content() == f"Output of layer 0, {direction}: {arithmetic}"
        tab.get_by_role("button", name=f"go to h₂[{index % 3}]").click()
        assert tab.get_by_label("layer", exact=True).input_value() == str(t.layers.index(below))
        assert tab.locator(".step-label").text_content().startswith("step 2")
        assert text.text_content() == arithmetic


@pytest.mark.slow
def test_backward_direction_starts_at_the_last_step_with_arrows_to_the_left(open_page: OpenPage) -> None:
    t = ur.trace(ur.GRU(2, 3, bidirectional=True), torch.randn(3, 2))
    tab = open_page(t)
    tab.get_by_label("layer", exact=True).select_option("1")
    assert tab.locator(".step-label").text_content() == "step 2 (0–2)"
    assert tab.locator(".arrow.left").count() == 4
    tab.locator('td[data-key="quantity hidden_sum"]').first.click()
    assert "initial h" in tab.locator(".operands").text_content()
    tab.get_by_role("button", name="previous step").click()
    assert "h₂[0]" in tab.locator(".operands").text_content()

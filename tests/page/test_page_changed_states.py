"""The page of a trace whose states the model changed between the steps, as GRU-D does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ledger import assert_arithmetic_is_right
from page_helpers import READ_CELLS, READ_DRAWING, OpenPage, needs_browser, printed
from torch import Tensor, nn

import unrolled as ur
from unrolled.page.contents import page_data
from unrolled.tracing.layer_trace import LayerTrace

pytestmark = needs_browser


class Decay(nn.Module):
    """Calls a cell, or a layer, step by step, and scales its states in between."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor, state: Any) -> Any:
        for step in x:
            state = tuple(0.7 * one for one in state) if isinstance(state, tuple) else 0.7 * state
            result = self.recurrent(step if isinstance(self.recurrent, nn.RNNCellBase) else step[None], state)
            state = result[1] if isinstance(self.recurrent, nn.RNNBase) else result
        return state


def decayed_trace(recurrent: nn.Module, size: tuple[int, ...], steps: int = 4) -> ur.Trace:
    states = torch.randn(2, *size)
    has_cell_state = isinstance(recurrent, nn.LSTM | nn.LSTMCell | ur.LSTM | ur.LSTMCell)
    model = Decay(recurrent)
    with torch.no_grad(), ur.record(model) as rec:
        model(torch.randn(steps, 2, 3), tuple(states) if has_cell_state else states[0])
    return rec["recurrent"]


def expected_value(part: LayerTrace, number: dict[str, Any], row: int) -> float:
    q, step, unit = number["q"], number["t"], number["u"]
    if q.startswith("before."):
        return float(part.before[q.removeprefix("before.")][step, row, unit])
    return float((part.input if q == "x" else part[q])[step, row, unit])


@pytest.mark.slow
@pytest.mark.parametrize("make", [nn.GRUCell, ur.LSTMCell, ur.RNNCell])
def test_the_states_before_each_step_are_shown(open_page: OpenPage, make: Any) -> None:
    trace = decayed_trace(make(3, 4), (2, 4))
    [part] = trace.layers
    tab = open_page(trace, batch=1)
    strip = tab.evaluate(READ_CELLS, ".strip .n")
    names = [*part.cell.state, *(f"before.{name}" for name in part.cell.state), "x"]
    assert sorted({number["q"] for number, _ in strip}) == sorted(names)
    assert {number["t"] for number, _ in strip} == {0, 1, 2, 3}
    for number, text in strip:
        assert text == printed(expected_value(part, number, 1)), number
    ends = [(number, text) for number, text, _ in tab.evaluate(READ_DRAWING) if number["q"] in names]
    assert sum(number["q"].startswith("before.") for number, _ in ends) == len(part.cell.state)
    for number, text in ends:
        assert text == printed(expected_value(part, number, 1)), number
    assert "the model changed the states between them" in tab.locator(".whatif").text_content()
    lines, _, _ = assert_arithmetic_is_right(tab)
    assert lines > 20


@pytest.mark.slow
def test_a_state_before_a_step_has_an_address_and_a_sentence(open_page: OpenPage) -> None:
    trace = decayed_trace(nn.GRUCell(3, 4), (2, 4))
    tab = open_page(trace, address="#step=3&unit=2&number=before.h")
    assert tab.locator(".why h2").text_content() == "What is hbefore 3[2]?"
    value = float(trace.layers[0].before["h"][3, 0, 2])
    assert tab.locator(".why .value").text_content() == f"hbefore 3[2] = {printed(value)}"
    assert "that the model passes to step 3" in tab.locator(".why .say").text_content()
    tab.locator("body").press("ArrowLeft")
    assert "number=before.h" in tab.url
    assert "step=2" in tab.url
    tab.locator('.strip [data-step="2"] .n').first.click()
    assert "The model changes it before step 3 reads it." in tab.locator(".why .say").text_content()
    tab.locator("body").press("t")
    for _ in range(6):
        tab.locator("body").press("n")


@pytest.mark.slow
def test_layers_and_large_traces(open_page: OpenPage) -> None:
    trace = decayed_trace(ur.LSTM(3, 4, 2), (2, 2, 4), steps=6)
    tab = open_page(trace)
    for layer in (0, 1):
        part = trace.layer(layer)
        tab.get_by_label("layer", exact=True).select_option(str(layer))
        for number, text in tab.evaluate(READ_CELLS, ".strip .n"):
            assert text == printed(expected_value(part, number, 0)), number
    trace = decayed_trace(nn.GRUCell(3, 40), (2, 40), steps=60)
    with pytest.warns(UserWarning, match="of the 60 time steps"):
        tab = open_page(trace, limit=9000, address="#step=0&unit=5&number=before.h")
    value = float(trace.layers[0].before["h"][0, 0, 5])
    assert tab.locator(".why .value").text_content() == f"hbefore 0[5] = {printed(value)}"


def test_the_data_has_the_states_before_each_step() -> None:
    trace = decayed_trace(nn.GRUCell(3, 4), (2, 4))
    [layer] = page_data(trace, 0, None, "numbers", None, 10**6)["layers"]
    assert layer["changedStates"]
    assert layer["program"]["reason"]
    with pytest.raises(ValueError, match="a comparison needs states that pass unchanged"):
        page_data(trace, 0, None, "numbers", None, 10**6, baseline=trace)

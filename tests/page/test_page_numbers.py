"""Every number on the page is the one of the trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from page_helpers import (
    READ_CELLS,
    STEP_CELLS,
    Awkward,
    ExpectedNumbers,
    Mixed,
    OpenPage,
    assert_numbers_are_those_of_the_trace,
    chromium_only,
    needs_browser,
    printed,
    small_trace,
)
from torch import nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.sampling import sample

pytestmark = needs_browser

FAST = ("GRU",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ur.cells.__all__]
)
def test_numbers_of_every_cell(name: str, open_page: OpenPage) -> None:
    trace = small_trace(getattr(ur.cells, name), steps=3)
    count = assert_numbers_are_those_of_the_trace(open_page(trace), trace.layers[0])
    assert count > 3 * (2 + 3 + 3)


def test_weighted_sums_are_those_of_the_formulas(open_page: OpenPage) -> None:
    """The parts and the sums of the gates, computed by hand in double precision."""
    layer = ur.LSTM(2, 3, dtype=torch.float64)
    trace = ur.trace(layer, torch.randn(4, 2, dtype=torch.float64))
    tab = open_page(trace)
    h = trace["h"][1, 0]
    parts = (
        layer.weight_ih_l0 @ trace["x"][2, 0] + layer.bias_ih_l0,
        layer.weight_hh_l0 @ h + layer.bias_hh_l0,
    )
    cells = {(number["q"], number["u"]): text for number, text in tab.evaluate(READ_CELLS, ".tables .n")}
    for k, gate in enumerate("ifgo"):
        for unit in range(3):
            first, second = (part[3 * k + unit].item() for part in parts)
            assert cells[f"{gate}.0", unit] == printed(first)
            assert cells[f"{gate}.1", unit] == printed(second)
            assert cells[f"sum.{gate}", unit] == printed(first + second)
            function = torch.tanh if gate == "g" else torch.sigmoid
            value = float(function(torch.tensor(first + second, dtype=torch.float64)))
            assert cells[gate, unit] == printed(value)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.slow
def test_layers_directions_and_ragged_rows(batch: int, open_page: OpenPage) -> None:
    rows = nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in (3, 5)], enforce_sorted=False)
    trace = ur.trace(ur.GRU(2, 3, num_layers=2, bidirectional=True), rows)
    tab = open_page(trace, batch=batch)
    picker = tab.get_by_label("layer", exact=True)
    names = picker.locator("option").all_text_contents()
    assert names == [f"layer {part.layer}, {part.direction}" for part in trace.layers]
    for k, part in enumerate(trace.layers):
        picker.select_option(str(k))
        assert assert_numbers_are_those_of_the_trace(tab, part, batch) > 50
        columns = tab.locator(".strip .title").all_text_contents()
        steps = [f"step {step}" for step in range((3, 5)[batch])]
        every = ["start", *steps] if part.direction == "forward" else [*steps, "start"]
        assert len(columns) >= min(3, len(every))  # as many as there is room for
        assert "|".join(columns) in "|".join(every)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("LSTM", {"proj_size": 2}),
        ("RNN", {"nonlinearity": "relu"}),
        ("SLSTM", {"heads": 3}),
        ("RGLRU", {"heads": 3}),
        ("RHN", {"depth": 3}),
        ("LSTM", {"dtype": torch.float64}),
        ("GRU", {"bias": False}),
    ],
    ids=str,
)
def test_options(cell: str, options: dict[str, Any], open_page: OpenPage) -> None:
    trace = small_trace(getattr(ur.cells, cell), options)
    assert assert_numbers_are_those_of_the_trace(open_page(trace), trace.layers[0]) > 40


@pytest.mark.slow
@pytest.mark.parametrize("cell", [Mixed, Awkward])
def test_cells_of_users(cell: type[ur.Cell], open_page: OpenPage) -> None:
    trace = ur.trace(ur.Recurrent(cell, 2, 4), torch.randn(3, 2))
    tab = open_page(trace)
    assert assert_numbers_are_those_of_the_trace(tab, trace.layers[0]) > 40
    assert "native code" not in tab.locator("#page").inner_text()


@pytest.mark.slow
def test_initial_states_weights_and_special_values(open_page: OpenPage) -> None:
    x = torch.tensor([[1.0, 2.5], [1e-7, 3e6], [float("-inf"), float("nan")], [123456.0, -1e-13]])
    trace = ur.trace(ur.RNN(2, 3, nonlinearity="relu"), x, torch.randn(1, 3))
    tab = open_page(trace)
    expected = ExpectedNumbers(trace.layers[0])
    assert assert_numbers_are_those_of_the_trace(tab, trace.layers[0]) > 50
    texts = {text for _, text in tab.evaluate(READ_CELLS, STEP_CELLS)}
    assert texts >= {"1.00", "2.50", "0.00000010", "3.000e+6", "−∞", "NaN", "1.235e+5", "−1.0e-13"}
    weights = tab.evaluate(READ_CELLS, ".weights .n")
    assert len(weights) == 3 * (2 + 3 + 2)
    assert [text for _, text in weights] == [expected.text(number) for number, _ in weights]


@pytest.mark.slow
def test_units_of_a_wide_layer(open_page: OpenPage) -> None:
    """The strip and the tables show a window around the chosen unit."""
    trace = ur.trace(ur.LSTM(3, 40), torch.randn(30, 3))
    tab = open_page(trace, address="#step=12&unit=37&number=c")
    expected = ExpectedNumbers(trace.layers[0])
    cells = tab.evaluate(READ_CELLS, ".tables .n")
    assert len(cells) > 100
    assert ("c", 12, 37) in {(number["q"], number["t"], number["u"]) for number, _ in cells}
    assert [text for _, text in cells] == [expected.text(number) for number, _ in cells]


@chromium_only
@pytest.mark.parametrize(
    "name", sample(["PeepholeLSTM", "LayerNormLSTM", "LRU", "RGLRU", "SLSTM", "RHN", "HGRN", "IndRNN"])
)
def test_weights_have_every_parameter(name: str, open_page: OpenPage) -> None:
    trace = small_trace(getattr(ur.cells, name))
    tab = open_page(trace)
    tab.keyboard.press("w")
    cells = tab.evaluate(READ_CELLS, ".weights .n")
    parameters = {key for key, shape in trace.layers[0].cell.shapes().items() if 0 < len(shape) < 3}
    assert {number["q"] for number, _ in cells} == parameters
    expected = ExpectedNumbers(trace.layers[0])
    assert all(text == expected.text(number) for number, text in cells)


def test_a_parameter_of_an_expression_can_be_changed(open_page: OpenPage) -> None:
    class Follow(ur.Cell):
        weight = ur.Param("hidden", "input")
        rate = ur.Param("hidden")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            target = linear(x, self.weight)
            speed = torch.sigmoid(self.rate)
            h = h + speed * (target - h)
            return h

    layer, x = ur.Recurrent(Follow, 2, 3), torch.randn(4, 2)
    tab = open_page(ur.trace(layer, x), address="#step=3&unit=1&number=h&edit=rate[1]=-2")
    with torch.no_grad():
        layer.rate_l0[1] = -2
    value = ur.trace(layer, x)["h"][3, 0, 1].item()
    assert tab.locator(".strip .n.on").text_content() == printed(value)

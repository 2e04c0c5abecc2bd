"""Every printed line of arithmetic is right when it is done by hand with the printed digits."""

from __future__ import annotations

import re

import pytest
import torch
from ledger import READ_ARITHMETIC, assert_arithmetic_is_right
from page_helpers import Mixed, OpenPage, WithSoftmax, needs_browser, small_trace
from torch import nn

import unrolled as ur

pytestmark = needs_browser

FAST = ("LSTM",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ur.cells.__all__]
)
def test_arithmetic_of_every_cell(name: str, open_page: OpenPage) -> None:
    trace = small_trace(getattr(ur.cells, name))
    tab = open_page(trace)
    lines, functions, others = assert_arithmetic_is_right(tab)
    assert lines > 6
    if name in ("RNN", "LSTM", "GRU"):
        assert lines > {"RNN": 50, "LSTM": 200, "GRU": 150}[name]
        assert functions >= {"RNN": 3, "LSTM": 15, "GRU": 9}[name]
        assert not others


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_arithmetic_of_every_step(seed: int, open_page: OpenPage) -> None:
    torch.manual_seed(seed)
    layer = nn.LSTM(3, 4, bidirectional=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    tab = open_page(
        ur.trace(layer, 2 * torch.randn(4, 3)), address=f"#layer={seed % 2}&step=0&unit=0&number=h"
    )
    for step in range(4):
        tab.locator(f'.strip .step[data-step="{step}"] .title').click()
        lines, functions, _ = assert_arithmetic_is_right(tab)
        assert lines > 300
        assert functions >= 20


@pytest.mark.slow
def test_long_sums_show_their_largest_terms(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(5, 64), torch.randn(4, 5))
    tab = open_page(trace, address="#step=3&unit=40&number=f.1")
    labels = tab.locator(".sum .lab").all_text_contents()
    assert "and 57 more" in labels  # of 64 products and a bias
    assert len(labels) == 10
    layer = trace.layers[0]
    products = layer.cell.weight_hh[64 + 40].detach() * trace["h"][2, 0]
    largest = products.abs().argsort(descending=True)[:7].sort().values.tolist()
    shown = tab.locator(".sum .lab").evaluate_all("(all) => all.map((one) => one.textContent)")
    assert [f"[{unit}]" in text for unit, text in zip(largest, shown, strict=False)] == [True] * 7
    lines, _, _ = assert_arithmetic_is_right(tab, '.gate[data-node="f"] .n')
    assert lines > 200


@pytest.mark.slow
def test_tiny_factors_are_not_printed_as_zero(open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 3)
    with torch.no_grad():
        layer.bias_ih_l0[3:6] = -12
    trace = ur.trace(layer, torch.randn(4, 2))
    tab = open_page(trace, address="#step=2&unit=1&number=c")
    first = tab.locator(".sum .r").first.text_content()
    assert float(first) == pytest.approx(trace["f"][2, 0, 1].item(), rel=0.1)
    lines, _, others = assert_arithmetic_is_right(tab)
    assert lines > 100
    assert others == 0


@pytest.mark.slow
@pytest.mark.parametrize("cell", [Mixed, ur.cells.LayerNormLSTM, ur.cells.SLSTM])
def test_arithmetic_of_layers_with_many_units(cell: type[ur.Cell], open_page: OpenPage) -> None:
    trace = ur.trace(ur.Recurrent(cell, 12, 20), torch.randn(5, 12))
    assert assert_arithmetic_is_right(open_page(trace))[0] > 100


@pytest.mark.slow
def test_softmax_shows_the_numbers_of_all_units(open_page: OpenPage) -> None:
    tab = open_page(small_trace(WithSoftmax), address="#step=2&unit=1&number=f")
    assert re.fullmatch(
        r"softmax\((−?\d\.\d+, ){2}−?\d\.\d+\)\[1\]", tab.locator(".sum .lab").last.text_content()
    )
    _, functions, others = assert_arithmetic_is_right(tab, '[data-node="f"] .n')
    assert (functions, others) == (3, 0)
    tab = open_page(
        ur.trace(ur.Recurrent(WithSoftmax, 2, 20), torch.randn(3, 2)), address="#step=2&unit=9&number=f"
    )
    assert "…)[9]" in tab.locator(".sum .lab").last.text_content()
    assert "the last one with all 20 numbers" in tab.locator(".arithmetic .note").text_content()


@pytest.mark.slow
def test_all_digits_and_following_the_numbers(open_page: OpenPage) -> None:
    trace = small_trace(ur.cells.LSTM)
    tab = open_page(trace)
    tab.get_by_role("button", name="all digits").click()
    note = tab.locator(".arithmetic .note").text_content()
    assert note.startswith("8 decimals. The last digits can differ when checked by hand")
    result = tab.locator(".sum .total b").text_content()
    assert float(result.replace("−", "-")) == pytest.approx(trace["h"][2, 0, 1].item(), abs=1e-8)
    tab.get_by_role("button", name="fewer digits").click()
    tab.locator(".strip .step[data-step='2'] .n").nth(4).click()
    tab.locator(".sum .lab button").first.click()
    assert tab.locator("h2", has_text="Where does").text_content() == "Where does f2[1] come from?"


@pytest.mark.slow
def test_values_that_are_not_finite_or_large_claim_nothing(open_page: OpenPage) -> None:
    """Lines of large numbers have eight decimals, and don't claim to be right when they are done by hand."""
    x = torch.tensor([[1.0, 2.0], [3e7, -2.0], [float("nan"), 1.0]])
    tab = open_page(ur.trace(ur.RNN(2, 3, nonlinearity="relu"), x))
    for step, message in enumerate(("Each line is right", "8 decimals", "8 decimals")):
        tab.locator(f'.strip .step[data-step="{step}"] .title').click()
        notes = [
            note for number, note, _ in tab.evaluate(READ_ARITHMETIC, ".tables .n") if number["q"] == "h.0"
        ]
        assert len(notes) == 3
        assert all(note.startswith(message) for note in notes)

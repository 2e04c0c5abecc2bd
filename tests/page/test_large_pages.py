"""Pages of large traces, whose steps are computed in the browser when they are looked at."""

from __future__ import annotations

import base64
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from page_helpers import READ_CELLS, ExpectedNumbers, OpenPage, as_number, needs_browser, printed
from torch import Tensor, nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.changed_layers import run_changed
from helpers.evaluator import assert_equal_on_page, needs_javascript, run_javascript
from unrolled.page import layer_data
from unrolled.page.computed_steps import differ_in_print
from unrolled.page.contents import page_data
from unrolled.page.sampling import encode_map


@pytest.fixture
def compute_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pages compute the steps of small layers, too."""
    monkeypatch.setattr(layer_data, "COMPLETE_VALUES", 0)


def layers_of(trace: ur.Trace, batch: int = 0, limit: int = 3_000_000) -> Any:
    """Return the layers of a page, whose steps must be computed."""
    layers = page_data(trace, batch, None, "numbers", None, limit)["layers"]
    assert all(layer["computed"] for layer in layers), [layer["program"]["reason"] for layer in layers]
    return layers


def noisy(layer: ur.Recurrent) -> ur.Recurrent:
    """Add noise to the parameters of a layer, so that none of them is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def ragged(count: int) -> nn.utils.rnn.PackedSequence:
    """Return two sequences with three features. The second one is longer."""
    return nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (count - 9, count)], enforce_sorted=False)


def bidirectional_lstm(count: int = 25) -> ur.Trace:
    return ur.trace(ur.LSTM(3, 9, num_layers=2, bidirectional=True), ragged(count))


def assert_exact(traces: list[ur.Trace], folder: Path, batch: int = 0) -> None:
    """Compare the quantities of pages with those of traces: printed digits, and all bits of the states."""
    results = run_javascript("runPages", [(layers_of(trace, batch), []) for trace in traces], folder)
    for trace, layers in zip(traces, results, strict=True):
        for part, layer in zip(trace.layers, layers, strict=True):
            assert len(layer["values"]) > 1
            for quantity, value in layer["values"].items():
                recorded = (part.input if quantity == "x" else part[quantity])[: part.lengths[batch], batch]
                recorded = recorded.flatten()
                assert [printed(v) for v in value.tolist()] == [printed(v) for v in recorded.tolist()]
                if quantity in ("x", *part.cell.state) and recorded.dtype is torch.float32:
                    torch.testing.assert_close(value.float(), recorded, rtol=0, atol=0, equal_nan=True)


@needs_javascript
@pytest.mark.usefixtures("compute_all")
def test_computed_numbers_are_those_of_the_trace(tmp_path: Path) -> None:
    x = torch.randn(20, 3)
    special = x.clone()
    special[5, 0], special[9, 1], special[12, 2] = 1e-7, math.inf, math.nan
    gru = noisy(ur.Recurrent(ur.cells.GRU, 3, 8, dtype=torch.float64))
    relu = ur.RNN(3, 8, nonlinearity="relu")
    assert_exact([bidirectional_lstm()], tmp_path, 1)
    assert_exact([ur.trace(gru, x.double()), ur.trace(relu, special, torch.randn(1, 8))], tmp_path)


@pytest.mark.slow
@needs_javascript
@pytest.mark.usefixtures("compute_all")
@pytest.mark.parametrize("name", ur.cells.__all__)
def test_every_cell(name: str, tmp_path: Path) -> None:
    cell = getattr(ur.cells, name)
    layer = noisy(ur.Recurrent(cell, 3, 8, num_layers=2, bidirectional=True))
    double = noisy(ur.Recurrent(cell, 3, 8, dtype=torch.float64))
    traces = [ur.trace(layer, torch.randn(40, 3)), ur.trace(double, torch.randn(40, 3, dtype=torch.float64))]
    assert_exact(traces, tmp_path)


EDITS: list[list[dict[str, Any]]] = [
    [{"kind": "input", "step": 7, "unit": 1, "value": 2.0}],
    [{"part": 2, "kind": "hold", "name": "f", "unit": 3, "steps": [4, 9], "value": 0.0}],
    [
        {"part": 1, "kind": "parameter", "name": "weight_ih", "index": 5, "value": 1.5},
        {"part": 0, "kind": "state", "name": "c", "unit": 2, "value": -1.0},
        {"part": 3, "kind": "hold", "name": "o", "unit": 0, "steps": None, "value": 1.0},
    ],
]


@needs_javascript
@pytest.mark.usefixtures("compute_all")
def test_changes(tmp_path: Path) -> None:
    """Changes go through layers and directions. The heat maps are those of the changed run."""
    trace = bidirectional_lstm()
    layers = layers_of(trace, 1)
    assert [layer["computed"]["input"] is None for layer in layers] == [False, False, True, True]
    results = run_javascript("runPages", [(layers, edits) for edits in EDITS], tmp_path)
    for edits, changed in zip(EDITS, results, strict=True):
        expected = run_changed(trace.layers, edits, 1)
        for layer, values in zip(changed, expected, strict=True):
            for name in ("i", "f", "g", "o", "c", "h"):
                assert_equal_on_page(layer["values"][name], values[name], f"{name} {edits}".__str__)
                heat_map = layer["maps"][name]
                if "means" not in heat_map:  # nothing in this layer has changed
                    continue
                in_order = values[name][:, heat_map["featureOrder"]]
                assert_equal_on_page(heat_map["means"], in_order, f"map of {name} {edits}".__str__)
                assert heat_map["statistics"]["high"] == pytest.approx(values[name].max().item(), abs=1e-5)
                counts = {heat_map["statistics"][key] for key in ("count", "finite")}
                assert counts == {values[name].numel()}
    for name in ("c", "h"):  # steps before the first change keep all bits
        kept = results[1][2]["values"][name].reshape(25, 9)[:4]
        assert torch.equal(kept.float(), trace.layers[2][name][:4, 1])


def test_large_values_are_sampled(compute_all: None) -> None:
    """A layer whose parameters don't fit keeps some recorded steps."""
    trace = ur.trace(ur.LSTM(3, 20), torch.randn(100, 3))
    parameters = sum(parameter.numel() for parameter in trace.module.parameters())
    data = page_data(trace, 0, None, "numbers", None, parameters + 300)
    assert data["layers"][0]["computed"] is None
    assert len(data["layers"][0]["steps"]) < 100
    assert "evenly spaced" in data["notes"][0]
    data = page_data(trace, 0, None, "numbers", None, parameters + 300 + 40 * 13)
    assert data["layers"][0]["computed"]["interval"] == 8
    assert data["notes"] == []


class Alternating(ur.Cell):
    """A cell that counts its steps in Python."""

    weight = ur.Param("hidden", "input")
    count = 0

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        type(self).count += 1
        return torch.tanh(linear(x, self.weight) + h) * (1 + type(self).count % 3)


def test_steps_that_differ_are_sampled(compute_all: None) -> None:
    trace = ur.trace(ur.Recurrent(Alternating, 2, 3), torch.randn(30, 2))
    data = page_data(trace, 0, None, "numbers", None, 100)
    assert data["layers"][0]["computed"] is None
    assert data["notes"]


@given(st.floats(-2e5, 2e5, width=32), st.integers(-3, 3), st.integers(2, 6), st.booleans())
def test_differences_in_print(value: float, steps: int, decimals: int, is_near_tie: bool) -> None:
    """A difference of a few bits counts if a number is printed differently."""
    first = np.float32(
        np.floor(value * 10**decimals) / 10**decimals + 0.5 / 10**decimals if is_near_tie else value
    )
    second = first
    for _ in range(abs(steps)):
        second = np.nextafter(second, np.float32(np.inf if steps > 0 else -np.inf))
    pair = [torch.tensor([v], dtype=torch.float64) for v in (float(first), float(second))]
    if printed(float(first)) != printed(float(second)):
        assert differ_in_print(*pair).item()
    if steps == 0:
        assert not differ_in_print(*pair).item()


def test_heat_maps_in_8_bits() -> None:
    values = torch.randn(600, 200, dtype=torch.float64)
    values[3, 4], values[90, 6], values[300, 9] = float("nan"), float("inf"), -float("inf")
    order = torch.randperm(200).tolist()
    encoded = encode_map(values, order)
    codes = np.frombuffer(base64.b64decode(encoded["codes"]), np.uint8).reshape(200, 67)
    means = torch.stack([part.mean(0) for part in values[:, order].split(3)])
    means = torch.stack([part.mean(1) for part in means.split(3, 1)], 1)
    width = (encoded["high"] - encoded["low"]) / 252
    decoded = encoded["low"] + width * torch.tensor(codes.astype(np.float64))
    finite = means.isfinite()
    assert ((decoded - means)[finite].abs() <= 0.51 * width).all()
    assert sorted(set(codes[~finite.numpy()])) == [253, 254, 255]
    finite_values = values[values.isfinite()]
    assert encoded["statistics"]["low"] == finite_values.min().item()
    assert encoded["statistics"]["count"] - encoded["statistics"]["finite"] == 3
    assert encoded["statistics"]["saturated"]["tanh"] == int((finite_values.abs() > 0.99).sum())


def read_numbers(tab: Any, part: Any, count: int, seed: int) -> int:
    """Compare the numbers of some random places on a page with those of the trace."""
    dice = random.Random(seed)
    length, hidden = int(part.lengths[0]), part.cell.hidden
    checked = set()
    while len(checked) < count:
        step, unit = dice.randrange(length), dice.randrange(hidden)
        tab.evaluate(f"location.hash = 'step={step}&unit={unit}&number=h'")
        tab.wait_for_function(
            "([step, unit]) => [...document.querySelectorAll('.tables .n')].some((one) =>"
            " one.refer().t === step && one.refer().u === unit)",
            arg=[step, unit],
        )
        for number, text in tab.evaluate(READ_CELLS, ".tables .n"):
            if number["q"] in part.values and number["t"] == step:
                assert text == printed(part[number["q"]][step, 0, number["u"]].item()), number
                checked.add((number["q"], number["t"], number["u"]))
    return len(checked)


@pytest.mark.slow
@needs_browser
@pytest.mark.usefixtures("compute_all")
def test_a_page_of_computed_steps(open_page: OpenPage) -> None:
    trace = ur.trace(ur.GRU(3, 10), torch.randn(60, 3))
    part = trace.layers[0]
    tab = open_page(trace, address="#step=41&unit=7&number=h")
    assert read_numbers(tab, part, 60, 0) >= 60
    expected = ExpectedNumbers(part)
    tab.evaluate("location.hash = 'step=41&unit=7&number=h'")
    for number, text in tab.evaluate(READ_CELLS, ".tables .n"):
        assert as_number(text) == pytest.approx(expected.value(number), abs=1.1e-4)
    tab.evaluate("location.hash = 'step=41&unit=7&number=h&edit=z[7]=0'")
    tab.wait_for_selector(".changes:not([hidden])")
    tab.wait_for_function("() => !document.querySelector('.changes').textContent.includes('recomputing')")
    edit = {"part": 0, "kind": "hold", "name": "z", "unit": 7, "steps": None, "value": 0.0}
    (changed,) = run_changed(trace.layers, [edit])
    for number, text in tab.evaluate(READ_CELLS, ".tables .n"):
        if number["q"] in ("r", "z", "n", "h"):
            value = changed[number["q"]][number["t"], number["u"]].item()
            assert as_number(text) == pytest.approx(value, abs=6e-5)
    tab.keyboard.press("R")
    assert read_numbers(tab, part, 30, 1) >= 30


def wall_time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("features", [2, 16])
def test_size_of_a_page_of_256_units(features: int, tmp_path: Path) -> None:
    """Weighted sums of few features have small rounding errors, which must not be stored one by one."""
    trace = ur.trace(ur.LSTM(features, 256), torch.randn(1000, features))
    assert trace.to_html(tmp_path / "layer.html").stat().st_size <= 4_000_000


@pytest.mark.slow
@needs_browser
def test_256_units_and_1000_steps(open_page: OpenPage, tmp_path: Path) -> None:
    trace = ur.trace(ur.LSTM(64, 256), torch.randn(1000, 64))
    tab = open_page(trace)
    assert (tmp_path / "layer.html").stat().st_size <= 4_000_000
    assert read_numbers(tab, trace.layers[0], 200, 2) >= 200
    assert tab.locator("[role=note]").count() == 0
    result = run_javascript("runPages", [(layers_of(trace), [])], tmp_path)[0][0]["values"]
    for name in ("i", "f", "g", "o", "c", "h"):
        value, recorded = result[name], trace[name].flatten().double()
        for decimals in (2, 4):
            digits = [(v.abs() * 10**decimals + 0.5).floor() for v in (value, recorded)]
            large = recorded.abs() >= 5e-5
            assert torch.equal(digits[0][large], digits[1][large])
    assert_page_stays_usable(tab, trace)


def assert_page_stays_usable(tab: Any, trace: ur.Trace) -> None:
    """While all steps run again, the page shows the value that was set and the progress."""
    tab.evaluate("location.hash = 'step=900&unit=7&number=f'")
    progress, value = tab.get_by_role("button", name="Shut the forget gate of unit 7").evaluate(
        "(button) => { button.click(); return ['.changes', '.arithmetic .value'].map((selector) =>"
        " document.querySelector(selector).textContent); }"
    )
    assert "recomputing" in progress
    assert value.startswith("f900[7] = 0.0000")
    tab.wait_for_function("() => !document.querySelector('.changes').textContent.includes('recomputing')")
    hold = {"part": 0, "kind": "hold", "name": "f", "unit": 7, "steps": None, "value": 0.0}
    (changed,) = run_changed(trace.layers, [hold])
    cells = [(n, text) for n, text in tab.evaluate(READ_CELLS, ".tables .n") if n["q"] in changed]
    assert len(cells) > 30
    for number, text in cells:
        value = changed[number["q"]][number["t"], number["u"]].item()
        assert as_number(text) == pytest.approx(value, abs=6e-5)


@pytest.mark.slow
@needs_browser
def test_512_units_open_within_3_seconds(browser: Any, tmp_path: Path) -> None:
    """On an idle machine. On a busy one, a blank page takes longer, too."""
    trace = ur.trace(ur.LSTM(64, 512), torch.randn(1000, 64))
    path = trace.to_html(tmp_path / "layer.html")
    assert json.loads(path.read_text().split('id="trace">')[1].split("</script>")[0])["layers"][0]["computed"]
    blank = tmp_path / "blank.html"
    blank.write_text("<!doctype html><title>blank</title><p>blank")

    def open_in_tab(page: Path, selector: str) -> float:
        tab = browser.new_page()

        def load() -> None:
            tab.goto(page.as_uri())
            tab.wait_for_selector(selector)

        seconds = wall_time(load)
        tab.close()
        return seconds

    normal = 0.1  # seconds for a blank page
    blank_time = min(open_in_tab(blank, "p") for _ in range(3))
    best = min(open_in_tab(path, ".tables .n") for _ in range(3))
    assert best <= 3 * max(1.0, blank_time / normal)

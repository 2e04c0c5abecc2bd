"""Several rows of a batch on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from page_helpers import (
    OpenPage,
    as_number,
    assert_numbers_are_those_of_the_trace,
    enter,
    go,
    needs_browser,
    numbers_on_page,
    printed,
)
from torch import nn

import unrolled as ur
from helpers.changed_layers import run_changed
from unrolled.page.contents import page_data


def ragged_trace(lengths: tuple[int, ...], **options: Any) -> ur.Trace:
    rows = nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in lengths], enforce_sorted=False)
    return ur.trace(ur.GRU(2, 3, **options), rows)


def entries(tab: Any) -> dict[str, str]:
    found: dict[str, str] = tab.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    return found


def picker(tab: Any) -> Any:
    return tab.get_by_label("row", exact=True)


def value(tab: Any) -> str:
    return str(tab.locator(".arithmetic .value").text_content())


@pytest.mark.slow
@needs_browser
def test_rows_their_labels_and_their_address(open_page: OpenPage) -> None:
    trace = ragged_trace((3, 5, 2))
    part = trace.layers[0]
    labels = [list("abc"), "hello", [1, 2]]
    tab = open_page(
        trace, batch=[0, 2, 1], labels=[labels[k] for k in (0, 2, 1)], predictions=[range(3), "xy", range(5)]
    )
    assert picker(tab).locator("option").all_text_contents() == [f"row {k} of 3" for k in (0, 2, 1)]
    for k, row in enumerate((0, 2, 1)):
        picker(tab).select_option(str(k))
        length = int(part.lengths[row])
        assert assert_numbers_are_those_of_the_trace(tab, part, row) > 30
        assert tab.locator(".strip .title b").all_text_contents()[-1].strip() == str(labels[row][length - 1])
        assert tab.locator(".strip .prediction").last.text_content() == ("y" if row == 2 else str(length - 1))
        assert tab.locator("header .what").text_content().endswith(f"{length} steps")
        assert entries(tab).get("row") == (str(row) if k else None)
    tab.evaluate("location.hash = 'row=1&step=4&unit=2&number=z'")
    tab.wait_for_function("() => document.querySelector('.why h2').textContent.includes('z4[2]')")
    assert value(tab) == f"z4[2] = {printed(part['z'][4, 1, 2].item())}"
    picker(tab).select_option("1")  # row 2 has no step 4: the last one is shown
    assert value(tab) == f"z1[2] = {printed(part['z'][1, 2, 2].item())}"
    assert entries(tab) == {"row": "2", "step": "1", "unit": "2", "number": "z"}
    go(tab, -1)
    assert value(tab) == f"z4[2] = {printed(part['z'][4, 1, 2].item())}"
    assert picker(tab).input_value() == "2"
    picker(tab).focus()
    tab.keyboard.press("ArrowUp")  # with the keyboard; the keys of the page don't move
    assert value(tab) == f"z1[2] = {printed(part['z'][1, 2, 2].item())}"


@needs_browser
@pytest.mark.slow
def test_rows_of_layers_and_directions(open_page: OpenPage) -> None:
    trace = ragged_trace((4, 3, 2), num_layers=2, bidirectional=True)
    tab = open_page(trace, address="#row=2&layer=3&step=start&unit=1&number=h")
    assert "hstart[1]" in value(tab)
    assert picker(tab).input_value() == "2"
    picker(tab).select_option("1")
    assert "hstart[1]" in value(tab)  # of a backward layer, this is after the last step
    for row in range(3):
        picker(tab).select_option(str(row))
        for k, part in enumerate(trace.layers):
            tab.get_by_label("layer", exact=True).select_option(str(k))
            assert assert_numbers_are_those_of_the_trace(tab, part, row) > 30
    for address in (
        "#row=7&step=0&unit=0&number=h",
        "#row=x&step=0&unit=0&number=h",
        "#row=2&step=5&unit=0&number=h",
    ):
        tab.evaluate("(hash) => { location.hash = hash; }", address)
        tab.wait_for_timeout(20)
        assert value(tab).startswith("h")
        assert "undefined" not in tab.locator("body").inner_text()


@needs_browser
@pytest.mark.slow
def test_rows_with_lengths_gradients_and_heat_maps(open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 10, batch_first=True)
    with ur.record(layer, gradients=True) as rec:
        layer(torch.randn(2, 30, 2), lengths=[30, 26])[0].sum().backward()
    (trace,) = rec.values()
    tab = open_page(trace)
    for row, length in enumerate((30, 26)):
        picker(tab).select_option(str(row))
        canvas = tab.locator(".map canvas").nth(1)
        assert canvas.get_attribute("width") == str(length)
        assert f"over {length} steps" in canvas.get_attribute("aria-label")
        assert tab.locator(".gradients details tbody tr").count() == length
        last = tab.locator(".gradients details tbody tr").last
        names = tab.locator(".gradients thead th").all_text_contents()[1:]
        norm = trace.gradient(names[0])[length - 1, row].double().norm().item()
        assert float(last.locator("td").first.text_content()) == pytest.approx(norm, rel=1e-3, abs=1e-4)


def changed_numbers(tab: Any, trace: ur.Trace, edits: list[dict[str, Any]], row: int) -> None:
    part = trace.layers[0]
    expected = run_changed(trace.layers, edits, row)[0]
    length = int(part.lengths[row])
    compared = 0
    for (name, step, unit), text in numbers_on_page(tab, length).items():
        if name in part.values and 0 <= step < length:
            number = expected[name][step].flatten()[unit].item()
            assert as_number(text) == pytest.approx(number, abs=6e-5, rel=1e-3), (row, name, step, unit)
            compared += 1
    assert compared > 3 * length


@needs_browser
@pytest.mark.slow
def test_changes_of_weights_are_for_all_rows_and_others_for_one(open_page: OpenPage) -> None:
    trace = ragged_trace((3, 4))
    x = {"part": 0, "kind": "input", "step": 1, "unit": 0, "value": 2.5}
    state = {"part": 0, "kind": "state", "name": "h", "unit": 2, "value": -1.0}
    weight = {"part": 0, "kind": "parameter", "name": "weight_ih", "index": 3, "value": 0.75}
    tab = open_page(trace, address="#edit=x@1[0]=2.5;row1/h@start[2]=-1;weight_ih[1,1]=0.75")
    changed_numbers(tab, trace, [x, weight], 0)
    assert tab.locator(".changes > span").text_content().startswith("2 values changed")
    picker(tab).select_option("1")
    changed_numbers(tab, trace, [state, weight], 1)
    assert entries(tab)["edit"] == "x@1[0]=2.5;row1/h@start[2]=-1;weight_ih[1,1]=0.75"
    tab.evaluate("location.hash = location.hash.replace(/#.*edit=/, '#row=1&step=2&unit=1&number=x&edit=')")
    tab.wait_for_function("() => document.querySelector('.why h2').textContent.includes('x2[1]')")
    field = tab.get_by_role("textbox", name="type a value")
    enter(field, "0.5")
    field.evaluate("(one) => one.blur()")
    own = {**x, "step": 2, "unit": 1, "value": 0.5}
    changed_numbers(tab, trace, [state, weight, own], 1)
    picker(tab).select_option("0")
    changed_numbers(tab, trace, [x, weight], 0)
    link = tab.evaluate("location.hash")
    tab.keyboard.press("R")
    for row in (0, 1):  # of all rows
        picker(tab).select_option(str(row))
        changed_numbers(tab, trace, [], row)
        assert not tab.locator(".changes").is_visible()
    tab = open_page(trace, address=link)
    picker(tab).select_option("1")
    changed_numbers(tab, trace, [state, weight, own], 1)


@needs_browser
@pytest.mark.slow
def test_findings_of_rows(open_page: OpenPage) -> None:
    x = torch.randn(4, 12, 2)
    x[3, 2, 1] = float("nan")
    tab = open_page(ur.trace(ur.LSTM(2, 3), x))
    tab.locator(".guide").get_by_role("button", name="Show it").click()
    assert entries(tab) == {"row": "2", "step": "3", "unit": "1", "number": "x"}
    assert tab.locator(".strip .n.on").text_content() == "NaN"
    assert picker(tab).locator("option").last.text_content() == "4 more: not on this page"
    x[3, 2, 1], x[3, 10, 1] = 0, float("nan")
    trace = ur.trace(ur.LSTM(2, 3), x)
    tab = open_page(trace)  # the row with NaN comes first
    tab.locator(".guide").get_by_role("button", name="Show it").click()
    assert tab.locator(".strip .n.on").text_content() == "NaN"
    assert picker(tab).locator("option").first.text_content() == "row 10 of 12"
    tab = open_page(trace, batch=range(8))
    for place in (".guide", ".findings"):
        assert (
            "Row 10 isn't on this page. Use to_html(batch=10) to see it." in tab.locator(place).text_content()
        )
    assert tab.locator(".guide").get_by_role("button", name="Show it").count() == 0


def data_of(trace: ur.Trace, batch: Any = None, labels: Any = None, limit: int = 3_000_000) -> dict[str, Any]:
    return page_data(trace, batch, labels, "numbers", None, limit)


def rows_of(data: dict[str, Any]) -> list[Any]:
    return [data["row"], *(one["row"] for one in data["rows"])]


def test_the_first_rows_that_fit_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = ur.trace(ur.RNN(2, 3), torch.randn(5, 12, 2))
    data = data_of(trace)
    assert rows_of(data) == list(range(8))
    x = torch.randn(5, 12, 2)
    x[1, 9, 0] = torch.inf
    bad = ur.trace(ur.RNN(2, 3), x)
    assert rows_of(data_of(bad)) == [9, *range(7)]
    assert rows_of(data_of(bad, labels=list("abcde"))) == [0]
    assert rows_of(data_of(bad, [3])) == [3]
    x[1, 2, 0] = torch.inf
    assert rows_of(data_of(ur.trace(ur.RNN(2, 3), x))) == list(range(8))
    per_step = sum(data["layers"][0]["diagram"]["sizes"])
    weights = sum(parameter.numel() for parameter in trace.recurrent.parameters())
    assert rows_of(data_of(trace, limit=3 * (weights + 3 * 5 * per_step))) == [0, 1, 2]
    assert rows_of(data_of(trace, limit=3 * (weights + 3 * 5 * per_step) - 1)) == [0, 1]
    assert rows_of(data_of(trace, limit=1)) == [0]
    assert rows_of(data_of(trace, [11, 3])) == [11, 3]
    assert rows_of(data_of(trace, -1)) == [11]
    assert rows_of(data_of(trace, labels="hello")) == [0]  # the labels of one row
    assert rows_of(data_of(trace, labels=[list("hello")] * 12)) == list(range(8))
    monkeypatch.setattr("unrolled.page.rows.MAX_STEPS", 14)
    assert rows_of(data_of(trace)) == [0, 1]
    assert rows_of(data_of(ur.trace(ur.RNN(2, 3), torch.randn(4, 2)))) == [None]
    monkeypatch.setattr("unrolled.page.layer_data.INTERVALS", ())  # too large to compute
    sampled = data_of(trace, [0, 1], limit=weights + 6 * per_step)
    for row in (sampled, sampled["rows"][0]):
        assert len(row["layers"][0].get("steps", sampled["layers"][0]["steps"])) == 3


def test_what_rows_share_is_stored_once() -> None:
    trace = ur.trace(ur.LSTM(4, 20), torch.randn(10, 3, 4))
    data = data_of(trace)
    assert len(data["rows"]) == 2
    for one in data["rows"]:
        assert set(one) == {"row", "layers"}
        (layer,) = one["layers"]
        assert set(layer) == {"diagram", "tensorNames"}
        assert set(layer["diagram"]) == {"values"}
    per_row = len(json.dumps(data["rows"])) / 2
    values = 10 * sum(data["layers"][0]["diagram"]["sizes"])
    assert per_row < 4 * values * 4 / 3 + 250  # base64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 3}, IndexError, "row 3 is out of range: there are 3"),
        ({"batch": [0, 4]}, IndexError, "row 4 is out of range: there are 3"),
        ({"batch": "ab"}, TypeError, "row must be an integer, got 'ab'"),
        ({"batch": [0.5]}, TypeError, "row must be an integer, got 0.5"),
        ({"batch": []}, ValueError, "batch should have at least one row, got none"),
        ({"batch": [1, -2]}, ValueError, "batch should have each row once, got 1, 1"),
        ({"labels": [["a"], ["b"]]}, ValueError, r"labels should have one list per row \(3\), got 2"),
        ({"labels": [["a"] * 3] * 3}, ValueError, r"labels of row 1 should have one entry .* \(4\), got 3"),
        ({"labels": "abcd"}, ValueError, r"labels should have one entry per time step \(3\), got 4"),
        ({"batch": [0, 1], "predictions": ["abc", 4]}, TypeError, "predictions of row 1 should be"),
        ({"batch": [0, 1], "predictions": range(3)}, ValueError, r"one list per row \(2\), got 3"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_rows_and_texts(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ragged_trace((3, 4, 2)).to_html(tmp_path / "page.html", **options)


def test_rows_without_time_steps(tmp_path: Path) -> None:
    trace = ur.trace(ur.RNN(2, 3), torch.randn(2, 3, 2))
    trace.layers[0].lengths[1] = 0
    assert rows_of(data_of(trace)) == [0, 2]
    with pytest.raises(ValueError, match="row 1 has no time steps: choose another row with batch="):
        trace.to_html(tmp_path / "page.html", batch=1)
    trace.layers[0].lengths.zero_()
    with pytest.raises(ValueError, match="a page needs a row with time steps, but this trace has none"):
        trace.to_html(tmp_path / "page.html")

"""Two traces on one page: this one, the baseline, and the differences of their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from page_helpers import (
    READ_CELLS,
    READ_DRAWING,
    ExpectedNumbers,
    OpenPage,
    as_number,
    go,
    needs_browser,
    printed,
    rounded,
)
from torch import nn

import unrolled as ur
from helpers.changed_layers import run_changed
from unrolled.page.comparison import comparison_summary
from unrolled.page.contents import page_data


def two_traces(layer: nn.Module, x: Any, size: float = 0.3) -> tuple[ur.Trace, ur.Trace]:
    """Trace a layer, change its weights, and trace it again."""
    before = ur.trace(layer, x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return ur.trace(layer, x), before


def entries(tab: Any) -> dict[str, str]:
    found: dict[str, str] = tab.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    return found


def mode(tab: Any, name: str) -> None:
    tab.get_by_role("button", name=name, exact=True).click()


def difference_text(value: float) -> str:
    return f"+{printed(value)}" if value > 0 else printed(value)


def assert_cells(tab: Any, selector: str, text: Callable[[dict[str, Any]], str], least: int) -> None:
    cells = tab.evaluate(READ_CELLS, selector)
    assert len(cells) >= least
    assert [(number, shown) for number, shown in cells] == [(number, text(number)) for number, _ in cells]


def assert_numbers_in_every_mode(
    tab: Any, after: ur.Trace, before: ur.Trace, row: int = 0, layer: int = 0
) -> None:
    """Compare strip, step, weights and drawing with both traces, and the differences in double precision."""
    ours, theirs = (ExpectedNumbers(one.layers[layer], row) for one in (after, before))
    difference: Callable[[dict[str, Any]], float] = lambda one: ours.value(one) - theirs.value(one)  # noqa: E731
    texts = {
        "this": ours.text,
        "baseline": theirs.text,
        "difference": lambda one: difference_text(difference(one)),
    }
    values = {"this": ours.value, "baseline": theirs.value, "difference": difference}
    for name, text in texts.items():
        mode(tab, name)
        tab.get_by_role("button", name="Numbers").click()
        assert_cells(tab, ".strip .n, .tables .n", text, 20)
        for number, spoken, digits in tab.evaluate(READ_DRAWING):
            value = values[name](number)
            if abs(value) > 5e-5:
                assert spoken == rounded(value, 4), (name, number)
            assert digits in ([], [rounded(value, 2)]), (name, number)
        tab.get_by_role("button", name="Weights", exact=True).click()
        assert_cells(tab, ".weights .n", text, 9)
    tab.get_by_role("button", name="Numbers").click()


@needs_browser
@pytest.mark.slow
def test_numbers_differences_and_the_largest_one(open_page: OpenPage) -> None:
    after, before = two_traces(ur.LSTM(2, 3), torch.randn(4, 2, 2))
    tab = open_page(after, baseline=before)
    assert_numbers_in_every_mode(tab, after, before)
    differences = {name: (after[name].double() - before[name].double()).abs() for name in "figoch"}
    name = max(differences, key=lambda one: float(differences[one].max()))
    step, row, unit = (int(k) for k in (differences[name] == differences[name].max()).nonzero()[0])
    line = tab.locator(".comparison p").text_content()
    assert line.startswith("Largest difference: ")
    assert f" {name}{step}[{unit}] in row {row}: " in line
    assert line.endswith(" The weights differ.")
    tab.locator(".comparison").get_by_role("button", name="Show it").click()
    expected = {"show": "difference", "step": str(step), "unit": str(unit), "number": name}
    assert entries(tab) == (expected | {"row": str(row)} if row else expected)
    for shown in ("this", "baseline", "difference"):
        mode(tab, shown)
        text = tab.locator(".arithmetic .value").text_content()
        match = re.fullmatch(rf"{name}{step}\[{unit}\] = (\S+), baseline (\S+), difference (\S+)", text)
        assert match, text
        ours, theirs, difference = (Decimal(one.replace("−", "-")) for one in match.groups())
        assert ours - theirs == difference
        assert float(ours) == pytest.approx(after[name][step, row, unit].item(), abs=5e-5)
        assert float(theirs) == pytest.approx(before[name][step, row, unit].item(), abs=5e-5)
        assert match[3][0] in "+−"


@needs_browser
@pytest.mark.slow
def test_switch_address_and_keys(open_page: OpenPage) -> None:
    after, before = two_traces(ur.RNN(2, 3), torch.randn(4, 2))
    tab = open_page(after, baseline=before, address="#show=baseline&step=1&unit=2&number=h")
    checked = tab.locator(".comparison [aria-pressed=true]")
    value = tab.locator('.strip .step[data-step="1"] .n').nth(2)
    ours, theirs = (one["h"][1, 0, 2].item() for one in (after, before))
    assert (checked.text_content(), value.text_content()) == ("baseline", printed(theirs))
    tab.keyboard.press("b")
    assert entries(tab)["show"] == "difference"
    assert (checked.text_content(), value.text_content()) == ("difference", difference_text(ours - theirs))
    assert tab.locator(".why h2").text_content() == "How much does h1[2] differ?"
    names = tab.locator(".compare tbody th").all_text_contents()
    assert "sumh[2]" in names
    for k, cells in enumerate(tab.locator(".compare tbody tr").all()):
        a, b, c = (Decimal(one.replace("−", "-")) for one in cells.locator("td").all_text_contents())
        assert a - b == c, names[k]
    tab.keyboard.press("b")
    assert "show" not in entries(tab)
    assert (checked.text_content(), value.text_content()) == ("this", printed(ours))
    assert tab.get_by_role("button", name="No input at step 0").is_visible()
    go(tab, -1)
    assert checked.text_content() == "difference"
    assert tab.locator(".compare").is_visible()
    tab.locator(".compare tbody button").first.click()
    assert entries(tab)["show"] == "difference"
    tab.keyboard.press("t")  # the tour is about this trace
    assert checked.text_content() == "this"
    assert "1 of 6" in tab.locator(".guide:not(.comparison)").text_content()
    tab.keyboard.press("Escape")
    assert not tab.locator(".guide:not(.comparison)").is_visible()


@needs_browser
@pytest.mark.slow
def test_ours_and_torch_are_bit_identical(open_page: OpenPage) -> None:
    theirs, x = nn.LSTM(2, 3), torch.randn(4, 2)
    ours = ur.LSTM(2, 3)
    ours.load_state_dict(theirs.state_dict())
    trace, baseline = ur.trace(ours, x), ur.trace(theirs, x)
    tab = open_page(trace, baseline=baseline, address="#show=difference&step=2&unit=1&number=h")
    count = sum(values.numel() for values in trace.layers[0].values.values())
    assert tab.locator(".comparison p").text_content() == (
        f"Bit-identical: all {count} gates, states and other numbers of the two traces are the same. "
        "So are inputs and weights."
    )
    assert set(tab.locator(".tables .n:visible").all_text_contents()) == {"0.0000"}
    assert tab.locator(".comparison").get_by_role("button", name="Show it").count() == 0


@needs_browser
@pytest.mark.slow
def test_layers_rows_and_inputs_that_differ(open_page: OpenPage) -> None:
    def packed() -> Any:
        return nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in (3, 4)], enforce_sorted=False)

    layer = ur.GRU(2, 3, num_layers=2, bidirectional=True)
    before, after = ur.trace(layer, packed()), ur.trace(layer, packed())
    tab = open_page(after, baseline=before)
    assert tab.locator(".comparison p").text_content().endswith(" The inputs differ.")
    for row in range(2):
        tab.get_by_label("row", exact=True).select_option(str(row))
        for k in range(4):
            tab.get_by_label("layer", exact=True).select_option(str(k))
            assert_numbers_in_every_mode(tab, after, before, row, k)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SLSTM", "MinGRU", "NAS", "RGLRU"])
def test_other_cells(name: str, open_page: OpenPage) -> None:
    after, before = two_traces(ur.Recurrent(getattr(ur.cells, name), 2, 3), torch.randn(3, 2))
    assert_numbers_in_every_mode(open_page(after, baseline=before), after, before)


@needs_browser
@pytest.mark.slow
def test_changes_of_this_trace_change_the_differences(open_page: OpenPage) -> None:
    after, before = two_traces(ur.GRU(2, 3), torch.randn(4, 2))
    tab = open_page(after, baseline=before, address="#step=2&unit=1&number=h&edit=x@1[0]=2.5")
    (changed,) = run_changed(after.layers, [{"part": 0, "kind": "input", "step": 1, "unit": 0, "value": 2.5}])
    strip = tab.locator('.strip .step[data-step="2"] .n')
    ours = changed["h"][2].tolist()
    theirs = before["h"][2, 0].tolist()
    for name, values in (
        ("this", ours),
        ("baseline", theirs),
        ("difference", [a - b for a, b in zip(ours, theirs, strict=True)]),
    ):
        mode(tab, name)
        shown = [as_number(strip.nth(k).text_content()) for k in range(3)]
        assert shown == pytest.approx(values, abs=6e-5)
        assert tab.locator(".changes").is_visible()
        assert (tab.locator(".n.can").count() > 0) == (name == "this")
    assert "Only the numbers of this trace can be changed" in tab.locator(".whatif").text_content()
    tab.keyboard.press("R")
    original = (after["h"][2, 0].double() - before["h"][2, 0].double()).tolist()
    assert [as_number(strip.nth(k).text_content()) for k in range(3)] == pytest.approx(original, abs=6e-5)
    assert not tab.locator(".changes").is_visible()


@needs_browser
@pytest.mark.slow
def test_heat_maps_and_gradients(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    after, before = two_traces(ur.LSTM(4, 20), torch.randn(40, 4))
    for one in (after, before):
        one.backward(lambda output: output[-1].sum())
    tab = open_page(after, baseline=before, address="#show=difference&step=5&unit=3&number=c&order=weights")
    forget = tab.locator(".map canvas").nth(1)
    box = forget.bounding_box()
    forget.hover(position={"x": box["width"] * 30.5 / 40, "y": box["height"] * 7.5 / 20})
    value = after["f"][30, 0, 7].double().item() - before["f"][30, 0, 7].double().item()
    assert tab.locator(".readout").text_content() == f"f, step 30, unit 7: {printed(value)}"
    assert "Choose “this” or “baseline”" in tab.locator(".gradients").text_content()
    for name, trace in (("baseline", before), ("this", after)):
        mode(tab, name)
        norm = float(tab.locator(".gradients details tbody tr").last.locator("td").first.text_content())
        quantity = tab.locator(".gradients details thead th").nth(1).text_content()
        assert norm == pytest.approx(trace.gradient(quantity)[-1, 0].norm().item(), rel=1e-3)
    monkeypatch.setattr("unrolled.page.layer_data.INTERVALS", ())  # too large to compute
    with pytest.warns(UserWarning, match="of the 40 time steps"):
        tab = open_page(
            after, baseline=before, limit=11_000, address="#show=difference&step=0&unit=3&number=c"
        )
    line = tab.locator(".comparison p").text_content()
    name, step = re.match(r"Largest difference: .* (\w)(\d+)\[\d+\]", line).groups()
    differences = (after[name] - before[name]).abs().amax((1, 2))
    assert differences.argmax() == int(step)
    on_page = tab.evaluate("JSON.parse(document.getElementById('trace').textContent).layers[0].steps")
    assert line.endswith(", at a step that is not on this page. The weights differ.") == (
        int(step) not in on_page
    )
    forget = tab.locator(".map canvas").nth(1)
    box = forget.bounding_box()
    forget.hover(position={"x": box["width"] * 30.5 / 40, "y": 1})
    step, unit, shown = re.match(
        r"f, step (\d+), unit (\d+): about (\S+)", tab.locator(".readout").text_content()
    ).groups()
    value = after["f"][int(step), 0, int(unit)].item() - before["f"][int(step), 0, int(unit)].item()
    assert as_number(shown) == pytest.approx(value, abs=0.012)  # two means in 8 bits, two decimals


@needs_browser
@pytest.mark.slow
def test_differences_of_steps_that_the_page_computes(open_page: OpenPage) -> None:
    after, before = two_traces(ur.GRU(4, 20), torch.randn(90, 4))
    tab = open_page(after, baseline=before, limit=24_000, address="#show=difference&step=70&unit=7&number=h")
    layer = tab.evaluate("JSON.parse(document.getElementById('trace').textContent).layers[0]")
    assert layer["computed"] is not None
    for name, step, unit in (("h", 70, 7), ("z", 3, 19), ("r", 89, 0)):
        tab.evaluate(f"location.hash = '#show=difference&step={step}&unit={unit}&number={name}'")
        ours, theirs = (float(trace[name][step, 0, unit]) for trace in (after, before))
        found = re.search(
            r"= (\S+), baseline (\S+), difference (\S+)", tab.locator(".arithmetic .value").text_content()
        )
        assert found is not None
        numbers = list(map(as_number, found.groups()))
        assert numbers == pytest.approx([ours, theirs, ours - theirs], abs=6e-5)
    update = tab.locator(".map canvas").nth(1)
    box = update.bounding_box()
    update.hover(position={"x": box["width"] * 0.5, "y": 1})
    assert "about" in tab.locator(".sequence .readout").text_content()


@needs_browser
@pytest.mark.slow
def test_a_problem_is_named_beside_the_comparison(open_page: OpenPage) -> None:
    layer, x = ur.LSTM(2, 3), torch.randn(4, 2)
    before = ur.trace(layer, x)
    with torch.no_grad():
        layer.weight_ih_l0[3, 1] = float("nan")
    tab = open_page(ur.trace(layer, x), baseline=before)
    assert "NaN" in tab.locator(".guide:not(.comparison)").text_content()
    assert "NaN, baseline" in tab.locator(".comparison").text_content()
    mode(tab, "difference")
    assert "NaN" in tab.locator(".strip .n").all_text_contents()
    assert "undefined" not in tab.locator("body").inner_text()


def summary(trace: ur.Trace, baseline: ur.Trace) -> dict[str, Any]:
    layers = page_data(trace, None, None, "numbers", None, 1_000_000)["layers"]
    return comparison_summary(trace, baseline, range(trace.layers[0].input.shape[1]), layers)


def test_summary() -> None:
    layer, x = ur.GRU(2, 3), torch.randn(4, 2, 2)
    double = ur.GRU(2, 3, dtype=torch.float64)
    double.load_state_dict(layer.state_dict())
    trace = ur.trace(layer, x)
    same = summary(trace, ur.trace(layer, x))
    assert (same["status"], same["largest"]) == ("identical", None)
    assert not any(same[name] for name in ("inputs", "initialStates", "parameters"))
    assert same["count"] == sum(values.numel() for values in trace.layers[0].values.values())
    assert summary(trace, ur.trace(double, x.double()))["status"] == "rounding"
    y = x.clone()
    y[2, 1, 0] += 1
    other = summary(ur.trace(layer, y), trace)
    assert (other["status"], other["inputs"], other["parameters"]) == ("different", True, False)
    assert other["largest"]["row"] == 1
    assert other["largest"]["number"]["t"] >= 2
    assert summary(ur.trace(layer, x, torch.ones(1, 2, 3)), trace)["initialStates"]
    x[3, 0, 1] = float("nan")
    broken = ur.trace(layer, x)
    assert summary(broken, broken)["status"] == "identical"
    place = summary(broken, trace)["largest"]
    assert (place["row"], place["number"]["t"]) == (0, 3)


def test_the_baseline_stores_only_what_differs() -> None:
    after, before = two_traces(ur.LSTM(2, 3), torch.randn(4, 3, 2))
    data = page_data(after, None, None, "numbers", None, 1_000_000, baseline=before)
    assert set(data["baseline"]["layers"][0]) == {"diagram", "parameters"}
    for row in data["rows"]:
        assert set(row["layers"][0]) == {"diagram", "tensorNames"}
        assert set(row["baseline"]["layers"][0]) == {"diagram", "tensorNames"}
        assert set(row["baseline"]["layers"][0]["diagram"]) == {"values"}


class Branching(ur.Cell):
    """Computes other operations for large inputs."""

    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.weight.T + h)
        if x.sum() > 100:
            h = torch.sigmoid(h)
        return h


def test_traces_that_can_not_be_compared(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    others: list[tuple[Any, type[Exception], str]] = [
        (3, TypeError, "baseline should be a trace, got int"),
        (
            ur.trace(ur.GRU(2, 3), torch.randn(4, 2)),
            ValueError,
            r"of the same cell and sizes, but it is of GRU\(2, 3\) and this trace is of LSTM\(2, 3\)",
        ),
        (ur.trace(ur.LSTM(2, 4), torch.randn(4, 2)), ValueError, "of the same cell and sizes"),
        (ur.trace(ur.LSTM(2, 3, num_layers=2), torch.randn(4, 2)), ValueError, "of the same cell and sizes"),
        (
            ur.trace(ur.LSTM(2, 3), torch.randn(5, 2)),
            ValueError,
            r"input of the same shape \(time, batch, features\), \(4, 1, 2\), got \(5, 1, 2\)",
        ),
    ]
    for baseline, error, message in others:
        with pytest.raises(error, match=message):
            trace.to_html(file, baseline=baseline)
    rows = [
        ur.trace(ur.RNN(2, 3), nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in lengths]))
        for lengths in ((4, 3), (4, 2))
    ]
    with pytest.raises(ValueError, match="baseline should have the same sequence lengths"):
        rows[0].to_html(file, baseline=rows[1])
    layer = ur.Recurrent(Branching, 2, 3)
    with pytest.raises(ValueError, match="baseline should compute the same operations"):
        ur.trace(layer, torch.ones(3, 2)).to_html(file, baseline=ur.trace(layer, 100 * torch.ones(3, 2)))
    model = nn.LSTM(2, 3)
    with ur.record(model, steps=[0]) as rec:
        model(torch.randn(4, 2))
    (part,) = rec.values()
    with pytest.raises(ValueError, match="a comparison needs all steps, quantities and units"):
        trace.to_html(file, baseline=part)

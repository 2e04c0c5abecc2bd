"""The contents of the page in a browser, without a network: texts, gradients, large traces, notebooks."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from page_helpers import Mixed, OpenPage, arithmetic_on_page, needs_browser, pixel_color
from torch import nn

import unrolled as ur
from unrolled import page
from unrolled.page import assets
from unrolled.page.contents import page_data
from unrolled.tracing.explain import format_number
from unrolled.tracing.gradient_flow import gradient_flow

pytestmark = needs_browser


def test_user_texts_are_escaped(open_page: OpenPage) -> None:
    texts = [
        "</script><script>window.hit = 1</script>",
        "<img src=x onerror='window.hit = 1'>",
        "\u2028&amp;\ud800",
    ]
    t = ur.trace(ur.Recurrent(Mixed, 2, 3), torch.randn(3, 2))
    tab = open_page(t, labels=texts, title=texts[0])
    assert tab.evaluate("window.hit") is None
    assert tab.locator("h1").text_content() == tab.title() == texts[0]
    assert tab.locator(".column .in").all_text_contents() == [*texts[:2], "\u2028&amp;?"]
    assert tab.locator("header .description").text_content().endswith("<b>in the docstring</b>.")
    assert "<script>alert(1)</script>" in tab.locator("tr[data-key='quantity both']").text_content()
    assert tab.locator("script").count() == 2


@pytest.mark.slow
def test_labels_sizes_and_messages(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)), labels=["a", " ", "b\n", "\t"], width=1280)
    assert tab.locator(".column .in").all_text_contents() == ["a", "␣", "b⏎", "⇥"]
    tab.get_by_role("button", name="next step").click()
    assert tab.locator(".step-label").text_content() == "step 1 (0–3): ␣"
    assert "4*hidden × hidden)" in tab.locator(".parameters-section").text_content()
    assert "proj_size" not in tab.locator(".parameters-section").text_content()
    assert "12 output values and the 6 values of the final state" in tab.locator(".comparison").text_content()
    assert "Call trace.backward(loss) before trace.to_html" in tab.locator(".gradient-section").text_content()
    tab.locator(".parameters td").first.hover()
    assert "learned" not in tab.locator(".arithmetic").text_content()
    tab = open_page(ur.trace(ur.LSTM(2, 4, proj_size=2), torch.randn(4, 2)), width=1280)
    assert "4*hidden × proj_size)" in tab.locator(".parameters-section").text_content()


def test_gradients_and_the_comparison_with_torch(open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 3)
    weights = layer.weight_hh_l0[:3].detach().numpy()
    t = ur.trace(layer, torch.randn(5, 2))
    assert "trace.backward(loss)" in open_page(t).locator(".gradient-section").text_content()
    tab = open_page(t.backward(lambda output: output[-1].sum()))
    tab.get_by_text("gradient norms as a table").click()
    names = tab.locator(".gradients thead th").all_text_contents()[1:]
    assert set(names) == set(t.names)
    for step, row in enumerate(tab.locator(".gradients tbody tr").all()):
        norms = [format_number(t.gradient(name)[step, 0].double().norm().item()) for name in names]
        assert row.locator("td").all_text_contents() == norms
    assert tab.locator(".chart path").count() == len(names)
    for name in ("h", "c"):
        assert gradient_flow(t.layers[0], name).summary[1:] in tab.locator(".gradients").text_content()
    radius = f"{numpy.abs(numpy.linalg.eigvals(weights)).max():.4f}"
    assert f"weight_hh[i]: {radius}" in tab.locator(".gradients").text_content()
    text = tab.locator(".comparison p").text_content()
    assert text.startswith("torch.nn.LSTM gives the same result")


@pytest.mark.slow
def test_gradients_that_are_exactly_zero_are_marked(open_page: OpenPage) -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(12, 2)).backward(lambda output: output[8].sum())
    tab = open_page(t, width=1280)
    zeros = sum(int((t.gradient(name)[:, 0].norm(dim=-1) == 0).sum()) for name in t.names)
    assert zeros >= 3 * len(t.names)
    assert tab.locator(".chart .zero").count() == zeros
    assert "a ring marks a gradient of exactly 0" in tab.locator(".gradient-section").text_content()
    colors = tab.locator(".chart path").evaluate_all(
        "(paths) => paths.map((one) => one.getAttribute('stroke'))"
    )
    assert len(set(colors)) == len(t.names)
    ticks = tab.locator(".chart text[text-anchor=middle]").all_text_contents()
    assert ticks == ["0", "2", "4", "6", "8", "10"]


def test_page_of_a_recorded_layer(open_page: OpenPage, tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(2, 3, num_layers=2, dropout=0.5)})
    with ur.record(model, rows=[1], gradients=True) as rec:
        model["encoder"](torch.randn(4, 3, 2))[0].sum().backward()
    tab = open_page(rec["encoder"])
    text = tab.locator(".comparison p").text_content()
    assert text.startswith("The comparison with torch.nn needs the whole batch")
    tab.get_by_label("layer", exact=True).select_option("1")
    tab.locator('td[data-key="input"]').first.click()
    assert "after dropout" in tab.locator(".arithmetic").text_content()
    with ur.record(model, steps=[0]) as rec:
        model["encoder"](torch.randn(4, 3, 2))
    with pytest.raises(ValueError, match="a page needs all steps, quantities and units"):
        rec["encoder"].to_html(tmp_path / "layer.html")


def test_labels_images_rows_and_lengths(open_page: OpenPage) -> None:
    rows = nn.utils.rnn.pack_sequence([torch.rand(n, 4) for n in (3, 5)], enforce_sorted=False)
    t = ur.trace(ur.GRU(4, 3), rows)
    tab = open_page(t, batch=0, labels=["a", "b", "c"], inputs="image")
    assert tab.locator(".step-label").text_content() == "step 0 (0–2): a"
    assert tab.get_by_text("Row 0 of a batch of 2.").is_visible()
    gray = round(255 * float(t["x"][1, 0, 2] / t["x"][:3, 0].max()))
    picture = tab.locator("figure.heat-map canvas").first
    assert pixel_color(picture, 2, 1) == [gray] * 3  # the rows of the image are the time steps
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 2.5 / 4, "y": box["height"] * 1.5 / 3})
    assert tab.locator(".explanation h3").text_content() == f"x₁[2] = {format_number(t['x'][1, 0, 2].item())}"


@pytest.mark.slow
def test_large_trace_is_sampled_with_a_note(open_page: OpenPage, tmp_path: Path) -> None:
    t = ur.trace(ur.LSTM(4, 40), torch.randn(600, 4))
    with pytest.warns(UserWarning, match=r"contains (\d+) of the 600 time steps of layer 0, forward"):
        tab = open_page(t, limit=60_000)
    note = tab.locator(".note").text_content()
    steps = int(re.search(r"contains (\d+) of", note)[1])
    assert (tmp_path / "layer.html").stat().st_size < 60_000 * 5.5 + 1_100_000
    assert int(tab.get_by_role("slider", name="time step").get_attribute("max")) == steps - 1
    canvas = tab.locator("figure.heat-map canvas").nth(1)
    assert canvas.get_attribute("aria-label").endswith("each color is the mean of 3 steps")
    assert "Similar units are grouped." in tab.locator(".sequence-section").text_content()
    mean = t["i"][300:303, 0].double().mean(0)
    canvas.hover(position={"x": canvas.bounding_box()["width"] * 100.5 / 200, "y": 1})
    unit, value = re.search(
        r"step 300, unit (\d+): (\S+)", tab.locator(".sequence-section .readout").text_content()
    ).groups()
    assert float(value) == pytest.approx(float(mean[int(unit)]), abs=1e-4)
    canvas.click(position={"x": canvas.bounding_box()["width"] - 2, "y": 1})
    assert tab.locator(".step-label").text_content() == "step 599 (0–599)"
    index = int(tab.locator('td[data-key="quantity hidden_sum"]').first.get_attribute("data-index"))
    tab.locator(f'td[data-key="quantity hidden_sum"][data-index="{index}"]').click()
    assert tab.locator(".arithmetic").text_content() == arithmetic_on_page(
        t.layers[0], "hidden_sum", 599, index
    )
    with pytest.warns(UserWarning, match="the trace is too large for a page") as warned:
        tab = open_page(t, limit=5_000)
    assert any("does not contain the parameters of layer 0, forward" in str(one.message) for one in warned)
    tab.locator('td[data-key="quantity hidden_sum"][data-index="3"]').click()
    call = re.search(r"explain\(.*\)$", tab.locator(".arithmetic").text_content())[0]
    assert eval(f"t.layers[0].{call}", {"t": t}) == t.explain("hidden_sum", 0, 3)


def test_complex_values_and_invalid_arguments(tmp_path: Path, open_page: OpenPage) -> None:
    class Rotating(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            z = torch.complex(x, h)
            h = z.real + z.imag
            return h

    class Complex(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return h * 1j + x

    complex_trace = ur.trace(ur.Recurrent(Complex, 2, 2, dtype=torch.complex64), torch.randn(2, 2) + 0j)
    with pytest.raises(ValueError, match="the state h of Complex because it is complex: split it"):
        complex_trace.to_html(tmp_path / "layer.html")
    t = ur.trace(ur.Recurrent(Rotating, 2, 2), torch.randn(2, 2))
    with pytest.warns(UserWarning, match="z is not shown because its values are complex"):
        tab = open_page(t)
    tab.locator('td[data-key="quantity h"]').first.click()
    assert "Some values behind this number are not on this page" in tab.locator(".arithmetic").text_content()
    file = tmp_path / "layer.html"
    for options, message in (
        ({"title": 5}, "title should be a str, got 5"),
        ({"labels": 3}, "labels should be an iterable of strings, one per time step, got int"),
        ({"labels": b"ab"}, "labels should be an iterable of strings, one per time step, got bytes"),
        ({"labels": "abc"}, "labels should have one entry per time step \\(2\\), got 3"),
        ({"inputs": "picture"}, "inputs should be 'numbers' or 'image', got 'picture'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            t.to_html(file, **options)
    with pytest.raises(IndexError, match="row 1 is out of range"):
        t.to_html(file, batch=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        t.to_html(tmp_path / "nowhere" / "layer.html")
    with pytest.raises(IsADirectoryError, match="expected the path of a file"):
        t.to_html(tmp_path)
    with pytest.raises(ValueError, match="limit must be greater than zero, got 0"):
        t.to_html(file, limit=0)


def test_page_size_and_bundled_scripts(tmp_path: Path) -> None:
    path = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).to_html(tmp_path / "layer.html")
    assert path.stat().st_size < 200_000
    text = path.read_text()
    assert "import " not in re.search(r'<script type="module">(.*)</script>', text, re.DOTALL)[1]
    assert {file.stem for file in Path(page.__file__).parent.glob("*.js")} == set(assets._SCRIPTS)


def test_notebook_widget_shows_the_same_values(browser: Any) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    bundle = t._repr_mimebundle_()
    assert bundle["text/plain"] == repr(t)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    from unrolled.page.widget import TraceView

    view = TraceView(contents=json.dumps(page_data(t, 0, None, "numbers", None, 1000)))
    tab = browser.new_page()
    tab.set_content("<div id='cell'></div>")
    script = str(view._esm).replace("export default", "window.widget =")
    tab.add_script_tag(type="module", content=script)
    tab.add_style_tag(content=str(view._css))
    cell = "document.getElementById('cell')"
    tab.evaluate(f"(text) => widget.render({{ model: {{ get: () => text }}, el: {cell} }})", view.contents)
    assert tab.locator('td[data-key="quantity h"]').first.text_content() == format_number(
        t["h"][0, 0, 0].item()
    )
    tab.close()


@pytest.mark.slow
def test_notebook_shows_the_page_in_a_frame_without_anywidget(browser: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "anywidget", None)
    monkeypatch.delitem(__import__("sys").modules, "unrolled.page.widget", raising=False)
    t = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    shown = t._repr_mimebundle_()["text/html"]
    tab = browser.new_page()
    tab.set_content(shown)
    frame = tab.frame_locator("iframe")
    assert frame.locator('td[data-key="quantity h"]').first.text_content() == format_number(
        t["h"][0, 0, 0].item()
    )
    assert html.escape(repr(t)) in shown
    tab.close()

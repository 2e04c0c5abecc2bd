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
from page_helpers import (
    READ_CELLS,
    ExpectedNumbers,
    Mixed,
    OpenPage,
    Rare,
    needs_browser,
    pixel_color,
    printed,
)
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
    trace = ur.trace(ur.Recurrent(Mixed, 2, 3), torch.randn(3, 2))
    tab = open_page(trace, labels=texts, title=texts[0])
    assert tab.evaluate("window.hit") is None
    assert tab.locator("h1").text_content() == texts[0]
    assert tab.title().endswith(texts[0])
    assert tab.locator(".strip .title b").all_text_contents() == [
        f" {text}" for text in [*texts[:2], "\u2028&amp;?"]
    ]
    assert tab.locator(".about p").first.text_content().endswith("<b>in the docstring</b>.")
    tab.locator('.gate[data-node="a"] .n').last.click()
    assert "<script>alert(1)</script>" in tab.locator(".arithmetic .say").text_content()
    assert tab.locator("script").count() == 2


@pytest.mark.slow
def test_labels_and_messages(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)), labels=["a", " ", "b\n", "\t"])
    assert tab.locator(".strip .title b").all_text_contents() == [" a", " ␣", " b⏎", " ⇥"]
    assert "12 output values and the 6 values of the final state" in tab.locator(".about").text_content()
    advice = "Call trace.backward(target) or trace.backward(lambda y: y.sum()) before trace.to_html"
    assert advice in tab.locator(".gradients").text_content()
    paper = open_page(ur.trace(ur.Recurrent(ur.cells.MinGRU, 2, 3), torch.randn(4, 2))).locator(".about a")
    assert paper.get_attribute("href") == f"https://arxiv.org/abs/{paper.text_content()[6:]}"


@pytest.mark.slow
def test_gradients_and_the_comparison_with_torch(open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 3)
    weights = layer.weight_hh_l0[:3].detach().numpy()
    trace = ur.trace(layer, torch.randn(5, 2)).backward(lambda output: output[-1].sum())
    tab = open_page(trace)
    tab.get_by_text("gradient norms as a table").click()
    names = tab.locator(".gradients details thead th").all_text_contents()[1:]
    assert set(names) == set(trace.names)
    for step, row in enumerate(tab.locator(".gradients details tbody tr").all()):
        norms = [format_number(trace.gradient(name)[step, 0].double().norm().item()) for name in names]
        assert row.locator("td").all_text_contents() == norms
    assert tab.locator(".chart path").count() == len(names)
    for name in ("h", "c"):
        assert gradient_flow(trace.layers[0], name).summary[1:] in tab.locator(".gradients").text_content()
    radius = f"{numpy.abs(numpy.linalg.eigvals(weights)).max():.4f}"
    assert f"weight_hh[i]: {radius}" in tab.locator(".gradients").text_content()
    assert "torch.nn.LSTM gives the same result" in tab.locator(".about").text_content()


@pytest.mark.slow
def test_gradients_that_are_exactly_zero_are_marked(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(12, 2)).backward(lambda output: output[8].sum())
    tab = open_page(trace)
    zeros = sum(int((trace.gradient(name)[:, 0].norm(dim=-1) == 0).sum()) for name in trace.names)
    assert zeros >= 3 * len(trace.names)
    assert tab.locator(".chart .zero").count() == zeros
    assert "a ring marks a gradient of exactly 0" in tab.locator(".gradients").text_content()
    colors = tab.locator(".chart path").evaluate_all(
        "(paths) => paths.map((one) => one.getAttribute('stroke'))"
    )
    assert len(set(colors)) == len(trace.names)
    ticks = tab.locator(".chart text[text-anchor=middle]").all_text_contents()
    assert ticks == ["step 0", "2", "4", "6", "8", "10"]


@pytest.mark.slow
def test_page_of_a_recorded_layer(open_page: OpenPage, tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(2, 3, num_layers=2, dropout=0.5)})
    with ur.record(model, rows=[1], gradients=True) as rec:
        model["encoder"](torch.randn(4, 3, 2))[0].sum().backward()
    tab = open_page(rec["encoder"])
    assert "The comparison with torch.nn needs the whole batch" in tab.locator(".about").text_content()
    with ur.record(model, steps=[0]) as rec:
        model["encoder"](torch.randn(4, 3, 2))
    with pytest.raises(ValueError, match="a page needs all steps, quantities and units"):
        rec["encoder"].to_html(tmp_path / "layer.html")


@pytest.mark.slow
def test_images_labels_and_heat_maps(open_page: OpenPage) -> None:
    rows = nn.utils.rnn.pack_sequence([torch.rand(n, 4) for n in (3, 5)], enforce_sorted=False)
    trace = ur.trace(ur.GRU(4, 9), rows)
    address = "#step=2&unit=1&number=h&order=weights"
    tab = open_page(trace, batch=0, labels=["a", "b", "c"], inputs="image", address=address)
    gray = round(255 * float(trace["x"][1, 0, 2] / trace["x"][:3, 0].max()))
    picture, first = tab.locator(".map canvas").nth(0), tab.locator(".map canvas").nth(1)
    assert pixel_color(picture, 2, 1) == [gray] * 3  # the rows of the image are the time steps
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 2.5 / 4, "y": box["height"] * 1.5 / 3})
    value = printed(trace["x"][1, 0, 2].item(), is_given=True)
    assert tab.locator(".arithmetic .value").text_content() == f"x1[2] = {value}"
    box = first.bounding_box()
    first.hover(position={"x": box["width"] * 2.5 / 3, "y": box["height"] * 7.5 / 9})
    name = first.get_attribute("aria-label").split(",")[0]
    value = printed(trace[name][2, 0, 7].item())
    assert tab.locator(".sequence .readout").text_content() == f"{name}, step 2 (c), unit 7: {value}"
    first.press("ArrowRight")
    assert f"{name}1[0]" in tab.locator(".arithmetic .value").text_content().replace("hiddenn,1", "hidden_n1")


@pytest.mark.slow
@pytest.mark.parametrize(("units", "steps", "limit"), [(40, 600, 30_000), (256, 1000, 200_000)])
def test_large_trace_is_sampled_with_a_note(
    units: int, steps: int, limit: int, open_page: OpenPage, tmp_path: Path
) -> None:
    trace = ur.trace(ur.Recurrent(Rare, 4, units), torch.randn(steps, 4))
    with pytest.warns(
        UserWarning, match=rf"contains ([\d,]+) of the {steps:,} time steps of layer 0, forward"
    ):
        tab = open_page(trace, limit=limit)
    note = tab.locator("p.note[role=note]").first.text_content()
    count = int(re.search(r"contains ([\d,]+) of", note)[1].replace(",", ""))
    assert 2 <= count < steps
    assert (tmp_path / "layer.html").stat().st_size < limit * 5.5 + 1_100_000
    last = steps - 1
    canvas = tab.locator(".map canvas").nth(1)
    assert "each color is the mean of" in canvas.get_attribute("aria-label")
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] - 2, "y": 1})
    expected = ExpectedNumbers(trace.layers[0])
    for step in (last, 0):
        tab.evaluate(f"location.hash = 'step={step}&unit=3&number=h'")
        tab.wait_for_function(f"() => document.querySelector('.why h2').textContent.includes('h{step}[3]')")
        cells = tab.evaluate(READ_CELLS, ".tables .n")
        assert len(cells) > 20
        assert [text for _, text in cells] == [expected.text(number) for number, _ in cells]
    assert "because it uses torch.lgamma" in tab.locator(".whatif").text_content()


@pytest.mark.slow
def test_a_page_without_parameters(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(4, 40), torch.randn(600, 4))
    with pytest.warns(UserWarning, match="the trace is too large for a page") as warned:
        tab = open_page(trace, limit=5_000)
    assert any("does not contain the parameters of layer 0, forward" in str(one.message) for one in warned)
    tab.keyboard.press("w")
    assert tab.locator(".weights .n").count() == 0
    tab.keyboard.press("w")
    for cell in tab.locator(".tables .n").all()[:8]:
        cell.click()
    assert "does not contain the parameters" in tab.locator("p.note[role=note]").last.text_content()


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
    trace = ur.trace(ur.Recurrent(Rotating, 2, 2), torch.randn(2, 2))
    with pytest.warns(UserWarning, match="z is not shown because its values are complex"):
        tab = open_page(trace, address="#step=1&unit=0&number=h")
    assert "its step computes complex numbers" in tab.locator(".drawing").text_content()
    assert (
        tab.locator(".arithmetic .value").text_content() == f"h1[0] = {printed(trace['h'][1, 0, 0].item())}"
    )
    file = tmp_path / "layer.html"
    for options, message in (
        ({"title": 5}, "title should be a str, got 5"),
        ({"labels": 3}, "labels should be an iterable of strings, one per time step, got int"),
        ({"labels": b"ab"}, "labels should be an iterable of strings, one per time step, got bytes"),
        ({"labels": "abc"}, "labels should have one entry per time step \\(2\\), got 3"),
        ({"inputs": "picture"}, "inputs should be 'numbers' or 'image', got 'picture'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            trace.to_html(file, **options)
    with pytest.raises(IndexError, match="row 1 is out of range"):
        trace.to_html(file, batch=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trace.to_html(tmp_path / "nowhere" / "layer.html")
    with pytest.raises(IsADirectoryError, match="expected the path of a file"):
        trace.to_html(tmp_path)
    with pytest.raises(ValueError, match="limit must be greater than zero, got 0"):
        trace.to_html(file, limit=0)


@pytest.mark.slow
def test_the_documentation_that_a_page_names(open_page: OpenPage) -> None:
    class Own(ur.cells.GRU):
        pass

    for layer, cell in ((nn.LSTM(2, 3), ur.cells.LSTM), (ur.Recurrent(ur.cells.MGU, 2, 3), ur.cells.MGU)):
        name, trace = page_data(ur.trace(layer, torch.randn(2, 2)), 0, None, "numbers", None, 1_000)[
            "documentation"
        ]
        assert eval(name, {"unrolled": ur}) is cell
        assert eval(trace, {"unrolled": ur}) is ur.Trace
    tab = open_page(ur.trace(nn.LSTM(2, 3), torch.randn(2, 2)))
    links = tab.get_by_role("region", name="About LSTM").locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://doi.org/10.1162/neco.1997.9.8.1735",
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html",
    ]
    tab = open_page(ur.trace(ur.Recurrent(Own, 2, 3), torch.randn(2, 2)))
    text = tab.get_by_role("region", name="About Own").text_content()
    assert text.endswith("Documentation in Python: help(unrolled.Trace).")


def test_page_size_and_bundled_scripts(tmp_path: Path) -> None:
    path = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).to_html(tmp_path / "layer.html")
    assert path.stat().st_size < 400_000
    text = path.read_text()
    assert "import " not in re.search(r'<script type="module">(.*)</script>', text, re.DOTALL)[1]
    assert {file.stem for file in Path(page.__file__).parent.glob("*.js")} == set(assets._SCRIPTS)


def test_notebook_widget_shows_the_same_values(browser: Any) -> None:
    trace = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    bundle = trace._repr_mimebundle_()
    assert bundle["text/plain"] == repr(trace)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    from unrolled.page.widget import TraceView

    view = TraceView(contents=json.dumps(page_data(trace, 0, None, "numbers", None, 1000)))
    tab = browser.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.set_content("<div id='cell'></div>")
    script = str(view._esm).replace("export default", "window.widget =")
    tab.add_script_tag(type="module", content=script)
    tab.add_style_tag(content=str(view._css))
    cell = "document.getElementById('cell')"
    render = f"(text) => {{ window.close = widget.render({{ model: {{ get: () => text }}, el: {cell} }}); }}"
    tab.evaluate(render, view.contents)
    expected = ExpectedNumbers(trace.layers[0])
    cells = tab.evaluate(READ_CELLS, ".tables .n")
    assert len(cells) == 12
    assert [text for _, text in cells] == [expected.text(number) for number, _ in cells]
    tab.locator(".tables .n").first.click()
    assert not tab.evaluate("location.hash")  # it isn't the widget's own
    tab.evaluate("window.close()")
    tab.close()
    assert not errors


@pytest.mark.slow
def test_notebook_shows_the_page_in_a_frame_without_anywidget(browser: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "anywidget", None)
    monkeypatch.delitem(__import__("sys").modules, "unrolled.page.widget", raising=False)
    trace = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    shown = trace._repr_mimebundle_()["text/html"]
    tab = browser.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.set_content(shown)
    frame = tab.frame_locator("iframe")
    value = printed(trace["h"][0, 0, 0].item())
    assert frame.locator('.strip .step[data-step="0"] .n').first.text_content() == value
    frame.locator('.strip .step[data-step="0"] .n').first.click()
    assert value in frame.locator(".arithmetic .value").text_content()
    assert html.escape(repr(trace)) in shown
    tab.close()
    assert not errors

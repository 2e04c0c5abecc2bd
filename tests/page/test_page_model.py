"""The page of a model: the recurrent layers in the order of their calls, and the page of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from page_helpers import go, needs_browser, printed
from torch import nn

import unrolled as ur
from helpers.recorded_models import Translator
from unrolled.page import page_data
from unrolled.page.model_data import model_data
from unrolled.tracing.findings import where

OpenModel = Callable[..., Any]


def recorded(**options: Any) -> ur.Record:
    model = Translator()
    with torch.no_grad():
        model.encoder.bias_ih_l0[8:10] = -12  # shut two forget gates
    with ur.record(model, **options) as rec:
        model(torch.randint(0, 20, (5, 2)))
    return rec


@pytest.fixture
def open_model(browser: Any, tmp_path: Path) -> Iterator[OpenModel]:
    """Opens the page of a record. Fails if the page writes to the console or makes a network request."""
    problems: list[str] = []
    contexts = []

    def open_record(record: ur.Record, address: str = "", width: int = 1366, **options: Any) -> Any:
        path = record.to_html(tmp_path / "model.html", **options)
        context = browser.new_context(offline=True, viewport={"width": width, "height": 768})
        context.set_default_timeout(300_000)  # ms; long enough for a busy machine
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: problems.append(request.url) if "http" in request.url else None)
        tab.goto(path.as_uri() + address)
        tab.wait_for_selector(".calls, .arithmetic .value")
        return tab

    yield open_record
    for context in contexts:
        context.close()
    assert not problems


READ_CARDS = """(items) => items.map((one) => {
  const facts = [...one.querySelectorAll('dl div')].map((fact) => [fact.querySelector('dt').textContent,
    [...fact.querySelectorAll('dd')].map((dd) => dd.textContent).join('; ')]);
  return { ...Object.fromEntries(facts), head: one.querySelector('h2').textContent,
    health: one.querySelector(':scope > p')?.textContent ?? '' };
})"""


def cards(tab: Any) -> list[dict[str, str]]:
    """Return the texts of each call of a recurrent layer."""
    return list(tab.locator(".calls .call").evaluate_all(READ_CARDS))


@pytest.mark.slow
@needs_browser
def test_overview_shows_the_calls_in_order(open_model: OpenModel) -> None:
    rec = recorded(calls=2)
    tab = open_model(rec)
    assert tab.locator("h1").text_content() == "Translator"
    assert tab.locator("header .what").text_content() == "2 recurrent layers, 3 calls"
    encoder, first, second = cards(tab)
    assert encoder["head"] == "encoderLSTM(6, 8, bidirectional=True)called onceOpen"
    assert encoder["input"] == "(5, 2, 6); output of embed"
    assert encoder["output"] == "(5, 2, 16)"
    assert encoder["final state"] == "(2, 2, 8), (2, 2, 8)"
    worst = next(iter(rec["encoder"].health()))
    assert encoder["health"] == f"Problem: {where(worst)}{worst.message}"
    assert tab.locator(".guide.alarm p").text_content() == f"Problem: encoder, {where(worst)}{worst.message}"
    assert first["head"] == "decoderLSTM(5, 4)call 1 of 2Open"
    assert first["initial state"] == "zeros"
    assert second["head"] == "decoderLSTM(5, 4)call 2 of 2Open"
    assert second["input"] == "(5, 2, 5)"
    assert second["initial state"] == "(1, 2, 4), (1, 2, 4); final state of decoder, call 1"
    between = tab.locator(".calls .between").all_text_contents()
    assert [text.split()[0] for text in between] == ["embed", "between.0", "between.1", "head"]
    assert between[1].endswith("Linear(in_features=16, out_features=5, bias=True) (5, 2, 16) → (5, 2, 5)")
    order = [item.split()[0] for item in tab.locator(".calls > li").all_text_contents()]
    assert order[1].startswith("encoder")
    assert order[2] == "between.0"
    assert tab.locator(".missing").text_content() == "Not shown: unused (not called)."


def address(tab: Any) -> str:
    """Return the address of a page. Playwright doesn't learn of all changes in Firefox."""
    return str(tab.evaluate("location.href"))


@pytest.mark.slow
@needs_browser
def test_layers_open_and_have_an_address(open_model: OpenModel) -> None:
    rec = recorded(calls=2)
    tab = open_model(rec, batch=1)
    home = address(tab)
    tab.get_by_role("link", name="Open decoder, call 2 of 2").click()
    value = printed(rec["decoder"]["h"][2, 1, 1].item())
    assert tab.locator(".arithmetic .value").text_content() == f"h2[1] = {value}"
    assert tab.locator("h1").text_content() == "decoder, call 2: LSTM(5, 4)"
    tab.locator('.strip .step[data-step="3"] .title').click()
    number = address(tab)
    assert number == f"{home}#module=decoder&call=2&step=3&unit=1&number=h"
    go(tab, -2)
    tab.wait_for_selector(".calls")
    assert address(tab) == home
    go(tab, 2)
    assert tab.locator(".arithmetic .value").text_content().startswith("h3[1] = ")
    tab.get_by_role("button", name="back to Translator").click()
    assert tab.locator(".calls .call").count() == 3
    assert address(tab) == home

    deep = open_model(rec, number[len(home) :].replace("call=2", "call=1"), batch=1)
    value = printed(rec.calls("decoder")[0]["h"][3, 1, 1].item())
    assert deep.locator(".arithmetic .value").text_content() == f"h3[1] = {value}"
    assert open_model(rec, "#module=other&step=1", width=360).locator(".calls .call").count() == 3


@needs_browser
@pytest.mark.slow
def test_calls_without_a_page_say_why(open_model: OpenModel) -> None:
    tab = open_model(recorded())
    _, first, _ = cards(tab)
    assert first["health"] == ""
    assert "No page: only later calls were kept: see record(calls=)." in first["head"]
    assert (
        tab.get_by_role("link", name="Open decoder, call 2 of 2").get_attribute("href") == "#module=decoder"
    )
    tab.get_by_role("link", name="Open encoder, called once").click()
    tab.keyboard.press("Escape")
    tab.keyboard.press("ArrowRight")
    assert "module=encoder&step=3" in tab.url


@needs_browser
@pytest.mark.slow
def test_rows_of_each_layer(open_model: OpenModel) -> None:
    rec = recorded()
    labels = [[f"{row}{step}" for step in range(5)] for row in range(2)]
    tab = open_model(rec, labels=[labels[1], labels[0]], batch=[1, 0])
    for name in ("encoder", "decoder"):
        tab.locator(f'.call[data-name="{name}"] a.go').last.click()
        rows = tab.get_by_label("row", exact=True)
        for row in (1, 0):
            rows.select_option(label=f"row {row} of 2")
            text = tab.locator(".arithmetic .value").text_content()
            step, unit = map(int, re.findall(r"\d+", text)[:2])
            assert text == f"h{step}[{unit}] = {printed(rec[name]['h'][step, row, unit].item())}"
            title = tab.locator(f'.strip .step[data-step="{step}"] .title b')
            assert title.text_content().strip() == labels[row][step]
        assert "row=0" in tab.evaluate("location.hash")
        tab.get_by_role("button", name="back to Translator").click()
        assert tab.evaluate("location.hash") == ""


@needs_browser
@pytest.mark.slow
def test_a_layer_that_is_called_in_a_loop(open_model: OpenModel) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = ur.GRU(2, 3), ur.GRU(3, 3), nn.LayerNorm(3)

        def forward(self, x: torch.Tensor) -> Any:
            x, state = self.first(x)
            for _ in range(100):
                x, state = self.second(x, state)
            for _ in range(100):
                x = self.norm(self.second(x, state)[0])
            return x

    model = Loop()
    with ur.record(model) as rec:
        model(torch.randn(2, 1, 2))
    tab = open_model(rec)
    heads = [card["head"] for card in cards(tab)]
    assert heads[0].startswith("firstGRU(2, 3)called once")
    assert heads[1].startswith("secondGRU(3, 3)calls 1 to 101 of 200")
    assert heads[-1].startswith("secondGRU(3, 3)call 200 of 200")
    assert tab.locator(".calls > li").count() == 61
    assert tab.get_by_text("more calls of these modules").count() == 1


@pytest.mark.slow
def test_data_of_the_pages_is_that_of_the_traces() -> None:
    rec = recorded(calls=2)
    data = model_data(rec, 1, None, None, 9_000)
    traces = [rec["encoder"], *rec.calls("decoder")]
    names = ["encoder", "decoder, call 1", "decoder, call 2"]
    for page, trace, name in zip(data["pages"], traces, names, strict=True):
        title = f"{name}: {trace.module!r}"
        assert page == {**page_data(trace, 1, None, "numbers", title, 3_000), "call": name}
    assert [call["page"] for call in data["calls"]] == [None, 0, None, None, 1, 2, None]


def test_one_recorded_layer_gives_its_own_page(tmp_path: Path) -> None:
    model = nn.Sequential(ur.LSTM(2, 3))
    with ur.record(model) as rec:
        model(torch.randn(4, 1, 2))
    assert model_data(rec, 0, list("abcd"), None, 1_000) == {
        **page_data(rec["0"], 0, "abcd", "numbers", None, 1_000),
        "call": "0",
    }
    assert rec.to_html(tmp_path / "page.html", title="A title") == tmp_path / "page.html"
    assert "<title>A title</title>" in (tmp_path / "page.html").read_text()


def test_error_messages(tmp_path: Path) -> None:
    path, model = tmp_path / "page.html", Translator()
    with pytest.raises(ValueError, match="nothing was recorded: call the model inside of the with block"):
        ur.record(model).to_html(path)
    rec = recorded()
    message = r"labels should have one entry per time step \(5\), got 3"
    with pytest.raises(ValueError, match=f"^'encoder': {message}; 'decoder, call 2': {message}$"):
        rec.to_html(path, labels="abc")
    with pytest.raises(ValueError, match=r"labels should have one list per row \(2\), got 1"):
        rec.to_html(path, labels=[list("abcde")])
    with pytest.raises(IndexError, match="row 2 is out of range"):
        rec.to_html(path, batch=2)
    with pytest.raises(ValueError, match="a page needs all steps, quantities and units"):
        recorded(steps=[0]).to_html(path)
    with pytest.raises(FileNotFoundError):
        rec.to_html(tmp_path / "missing" / "page.html")
    assert not path.exists()

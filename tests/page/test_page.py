"""The page in a real browser, from disk and without a network, against the trace that it was made of."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import expect
from torch import nn
from torch.nn.functional import linear

import unrolled as ur
from helpers import browser as browsers
from helpers.layer_pairs import OddCell
from unrolled import page
from unrolled.cli import example
from unrolled.tracing.explain import number
from unrolled.tracing.gradient_flow import flow

pytestmark = pytest.mark.skipif(browsers.find() is None, reason=browsers.LACK)

Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.launched() as running:
        yield running


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """Opens the page of a trace; at the end: no message of the console, nothing asked of the network."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_it(trace: ur.Trace, scheme: str = "light", width: int = 1200, **options: Any) -> Any:
        path = trace.to_html(tmp_path / "layer.html", **options)
        context = browser.new_context(
            offline=True,
            color_scheme=scheme,
            viewport={"width": width, "height": 900},
            reduced_motion="reduce",
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("table.numbers td")
        return tab

    yield open_it
    for context in contexts:
        context.close()
    assert not said
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


class Awkward(ur.Cell):
    """Names, sizes and kinds that are easily mistaken."""

    weight = ur.Param("hidden", "input")
    turn = ur.Param("hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        x = x * 2
        constructor = linear(torch.relu(h), self.turn)
        toString = linear(x, self.weight.abs()) / 3
        positive = h > 0
        best = h.argmax(-1)  # noqa: F841
        total = x.sum(-1)  # noqa: F841
        none = h[:, :0]  # noqa: F841
        running = h.cumsum(-1)
        heads = torch.matmul(h.view(-1, 2, 2), constructor.view(-1, 2, 2))
        ratio = (constructor / 3) / 2 * toString
        h = torch.softmax(linear(x, self.weight) + h, -1) + heads.flatten(1) + running + ratio * positive
        return h


class Mixed(ur.Cell):
    """Parameters cut in parts, joined rows, a matrix that is computed, and a label <b>in the docstring</b>.

    Quantities:
        both: <script>alert(1)</script>
    """

    state = ("h", "memory")
    weight = ur.Param("2*hidden", "hidden + input")
    turn = ur.Param("hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor, memory: torch.Tensor) -> Any:
        first, second = self.weight.chunk(2)
        both = torch.cat([h * 2, x], -1)
        a = linear(both, first)
        memory = memory @ (self.turn - self.turn.T) + a.flip(-1)
        h = torch.tanh(linear(both, second) - memory)
        return h, memory


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
LONG = ("gru", "peephole", "odd")  # whose kinds of numbers others have too
READ = """() => {
  const found = [];
  const all = (kind) => [...document.querySelectorAll(`table.numbers[role=grid] ${kind}`)];
  const turn = (way) => all(`.pager button[aria-label^=${way}]`).find((button) => !button.disabled);
  while (turn('earlier')) turn('earlier').click();
  do {
    for (const cell of all('td')) {
      cell.focus();
      found.push([cell.dataset.key, Number(cell.dataset.place), cell.textContent,
        document.querySelector('.arithmetic').textContent]);
    }
    if (!turn('later')) return found;
    turn('later').click();
  } while (true);
}"""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.exhaustive if kind in LONG else ()) for kind in LAYERS],
)
def test_every_number_and_its_arithmetic_are_those_of_the_trace(kind: str, opened: Opener) -> None:
    t = ur.trace(LAYERS[kind](), torch.randn(3, 2, 12 if kind == "reset before" else 2).to(
        torch.float64 if kind == "gru" else torch.float32))  # fmt: skip
    tab = opened(t, batch=1)
    for which, part in enumerate(t.layers):
        if len(t.layers) > 1:
            tab.get_by_label("layer", exact=True).select_option(str(which))
        for step in range(3):
            tab.get_by_role("button", name=f"step {step}", exact=False).first.click()
            seen = set()
            for key, place, text, arithmetic in tab.evaluate(READ):
                sort, _, name = key.partition(" ")
                if sort == "quantity":
                    assert text == number(part[name][step, 1].flatten()[place].item())
                    assert arithmetic == part.explain(name, step, place, batch=1)
                elif sort == "before":
                    assert text == number(part.state_before(step, 1)[name][place].item())
                else:
                    assert text == number(part.input[step, 1, place].item())
                seen.add((key, place))
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


def test_numbers_are_written_as_in_python(browser: Any) -> None:
    tab = browser.new_page()
    tab.add_script_tag(content=page.script() + "\nwindow.write = (texts) => texts.map(Number).map(number);")

    @settings(max_examples=30, deadline=None)
    @given(st.lists(numbers, min_size=50, max_size=200))
    def check(values: list[float]) -> None:
        texts = [repr(value).replace("inf", "Infinity").replace("nan", "NaN") for value in values]
        assert tab.evaluate("(texts) => write(texts)", texts) == [number(value) for value in values]

    check()
    halves = [k / 32 for k in range(-65, 66)]
    halves += [123450.0, 123550.0, 1.2345e9, 5e-5, 4.9999e-5, 99999.99995, -0.0]
    assert tab.evaluate("(texts) => write(texts)", list(map(repr, halves))) == list(map(number, halves))
    tab.close()


def test_what_a_number_is_made_of_lights_up_and_can_be_followed_back(opened: Opener) -> None:
    layer, x = example.example(ur.cells.RNN, None, 0, {})
    tab = opened(ur.trace(layer, x))
    tab.get_by_role("button", name="step 2").click()
    tab.locator('td[data-key="quantity hidden_sum"][data-place="1"]').hover()
    lit = tab.locator("table[role=grid] td.lit")
    assert [one.get_attribute("data-key") for one in lit.all()] == ["before h"] * 3
    assert tab.locator(".parameters table[aria-label=weight_hh] td.lit").all_text_contents() == [
        number(value) for value in layer.weight_hh_l0[1].tolist()
    ]
    assert tab.locator(".parameters table[aria-label=bias_hh] td.lit").count() == 1
    assert tab.locator(".code li[aria-current]").all_text_contents() == [
        "hidden_sum = linear(h, self.weight_hh, self.bias_hh)"
    ]
    assert tab.locator(".formulas li[aria-current]").count() == 1
    # a parameter says what it is, where it is pointed at and where it is gone to
    tab.locator(".parameters table[aria-label=weight_ih] td").nth(1).hover()
    assert tab.locator(".explanation h3").text_content() == "weight_ih[0, 1] = -0.1051"
    assert "is a parameter: the same at every step" in tab.locator(".arithmetic").text_content()
    tab.locator('td[data-key="quantity hidden_sum"][data-place="1"]').click()
    tab.locator(".made .weight button").first.press("Enter")
    assert "is a parameter" in tab.locator(".arithmetic").text_content()
    assert tab.evaluate("document.activeElement.matches('.explanation')")
    # back from h of step 2 to what h of step 1 was made of
    tab.locator('td[data-key="quantity hidden_sum"][data-place="1"]').click()
    tab.get_by_role("button", name="h₁[0] = 0.2971").click()
    assert tab.locator(".explanation h3").text_content() == "h₁[0] = 0.2971"
    assert tab.locator(".where").text_content() == "step 1 of 0–3"
    assert tab.locator("td[aria-selected=true]").get_attribute("data-key") == "quantity h"
    # the keyboard is on it, and its arrows count, wherever the pointer rests
    tab.locator('td[data-key="quantity hidden_sum"][data-place="0"]').hover()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".explanation h3").text_content() == "h₁[1] = 0.9556"


def test_keys_buttons_slider_and_playing(opened: Opener) -> None:
    tab = opened(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)))
    where = tab.locator(".where")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Shift+Tab")  # the keys work on a page where nothing was touched
    assert tab.evaluate("document.activeElement == document.body")
    tab.keyboard.press("ArrowRight")
    assert where.text_content() == "step 1 of 0–3"
    tab.keyboard.press("ArrowLeft")
    tab.locator('td[data-key="quantity i"][data-place="0"]').focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset") == {"key": "quantity f", "place": "1"}
    tab.keyboard.press("]")
    assert where.text_content() == "step 1 of 0–3"
    assert tab.evaluate("document.activeElement.dataset") == {"key": "quantity f", "place": "1"}
    assert tab.locator(".explanation h3").text_content().startswith("f₁[1] = ")
    tab.get_by_role("slider", name="time step").focus()
    tab.keyboard.press("End")
    assert where.text_content() == "step 3 of 0–3"
    assert tab.get_by_role("button", name="next step").get_attribute("aria-disabled") == "true"
    tab.get_by_role("button", name="first step").click()
    tab.locator("#page").focus()
    tab.keyboard.press(" ")
    assert tab.get_by_role("button", name="pause").is_visible()
    expect(where).to_have_text("step 3 of 0–3")
    expect(tab.get_by_role("button", name="play")).to_be_visible()


STYLE = "(cell) => cell.style.background"


def pixel(canvas: Any, x: int, y: int) -> list[int]:
    """The colour of a point of a picture."""
    data = canvas.evaluate("(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]", [x, y])
    return list(data[:3])


def test_the_keyboard_stays_where_it_was_when_what_it_is_on_is_drawn_anew(opened: Opener) -> None:
    tab = opened(ur.trace(ur.RNN(2, 3), torch.randn(60, 2)))
    boxes = tab.locator(".box")
    boxes.nth(20).focus()
    tab.keyboard.press("Enter")
    expect(tab.locator(".box:focus")).to_contain_text("step 20")
    tab.keyboard.press("]")
    expect(tab.locator(".box:focus")).to_contain_text("step 21")
    tab.locator("td[data-key='quantity h']").first.focus()
    tab.locator(".made button").first.focus()
    tab.keyboard.press("]")
    expect(tab.locator(".where")).to_contain_text("step 22")
    expect(tab.locator(".explanation:focus")).to_have_count(1)
    tab.keyboard.press("Tab")
    expect(tab.locator(".made li:first-child button:focus")).to_have_count(1)


def test_on_paper_colours_are_those_for_white_and_nothing_is_cut_off(opened: Opener) -> None:
    tab = opened(ur.trace(ur.LSTM(2, 4), torch.randn(30, 2)), "dark", width=718)  # A4 within its margins
    page_of = tab.locator("#page")
    tab.evaluate("addEventListener('beforeprint', () => { "
                 "window.printed = document.querySelector('#page').dataset.theme; })")  # fmt: skip
    tab.pdf(format="A4")
    assert tab.evaluate("window.printed") == "light"
    expect(page_of).to_have_attribute("data-theme", "dark")
    tab.emulate_media(media="print")
    assert (
        page_of.evaluate("""page => [...page.querySelectorAll('td, .box, .code code')].filter(
        one => one.getBoundingClientRect().right > innerWidth).length""")
        == 0
    )
    cell = tab.locator("table.numbers td").first
    assert cell.evaluate("cell => getComputedStyle(cell).printColorAdjust") == "exact"


def test_long_names_do_not_widen_the_page(opened: Opener) -> None:
    tab = opened(ur.trace(ur.Recurrent(LongNames, 2, 3), torch.randn(4, 2)), width=640)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


class LongNames(ur.Cell):
    """Names of parameters and quantities that are wider than a window."""

    a_parameter_with_a_name_which_takes_more_room_than_a_narrow_window_has = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        weight = self.a_parameter_with_a_name_which_takes_more_room_than_a_narrow_window_has
        a_quantity_with_a_name_which_takes_more_room_than_a_narrow_window_has = x @ weight.T
        h = torch.tanh(a_quantity_with_a_name_which_takes_more_room_than_a_narrow_window_has)
        return h


def test_a_click_on_a_heat_map_goes_to_that_step_and_unit(opened: Opener) -> None:
    t = ur.trace(ur.GRU(2, 5), torch.randn(8, 2))
    tab = opened(t)
    canvas = tab.locator("figure.map", has=tab.get_by_text("z", exact=True)).locator("canvas")
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 6.5 / 8, "y": box["height"] * 3.5 / 5})
    assert tab.locator(".where").text_content() == "step 6 of 0–7"
    shown = tab.locator(".explanation h3").text_content()
    assert shown == f"z₆[3] = {number(t['z'][6, 0, 3].item())}"
    style = tab.locator('td[data-key="quantity z"][data-place="3"]').evaluate(STYLE)
    assert style == f"rgb({', '.join(map(str, pixel(canvas, 6, 3)))})"
    # sorted: another unit stands there, the one that the order says
    tab.get_by_label("sort units by what they do").check()
    canvas.click(position={"x": box["width"] * 6.5 / 8, "y": box["height"] * 3.5 / 5})
    unit = page.contents(t, 0, None, "numbers", None, 10_000)["parts"][0]["order"][3]
    shown = tab.locator(".explanation h3").text_content()
    assert shown == f"z₆[{unit}] = {number(t['z'][6, 0, unit].item())}"
    canvas.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".where").text_content() == "step 7 of 0–7"
    assert f"z₇[{unit}]" in tab.locator(".explanation h3").text_content()


def grown() -> ur.Trace:
    """Two layers, in the lower one a cell state that counts the steps and gates that stay open."""
    layer = nn.LSTM(3, 12, num_layers=2)
    with torch.no_grad():
        layer.bias_ih_l0.fill_(4)
    return ur.trace(layer, torch.randn(8, 3))


def test_what_would_leave_the_others_pale_has_a_scale_of_its_own(opened: Opener) -> None:
    t = grown()
    tab = opened(t)
    for _ in range(7):
        tab.get_by_role("button", name="next step").click()
    assert "x, input_sum, hidden_sum, c: each on a scale of its own" in tab.locator(".scale").text_content()
    assert f"{number(float(t['c'].abs().max()))}" in tab.locator("figure.map", has=tab.get_by_text(
        "c", exact=True)).locator("figcaption").text_content()  # fmt: skip
    full = [178, 24, 43]  # the red end of the scale
    for name in ("f", "c"):
        unit = int(t[name][7, 0].argmax())
        cell = tab.locator(f'td[data-key="quantity {name}"][data-place="{unit}"]')
        shade = [int(part) for part in re.findall(r"\d+", cell.evaluate(STYLE))]
        assert shade == pytest.approx(full, abs=12), name


def test_dark_light_and_narrow(opened: Opener) -> None:
    t = ur.trace(ur.LSTM(3, 40), torch.randn(30, 3)).backward(torch.sum)
    tab = opened(t, scheme="dark", width=360)
    assert tab.locator("#page").get_attribute("data-theme") == "dark"
    ground = "getComputedStyle(document.getElementById('page')).backgroundColor"
    assert tab.evaluate(ground) == "rgb(20, 23, 27)"
    tab.get_by_role("button", name="light colours").click()
    assert tab.evaluate(ground) == "rgb(255, 255, 255)"
    tab.get_by_role("button", name="dark colours").click()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        expect(tab.locator("#page")).to_have_attribute("data-theme", scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


CONTRAST = """() => {
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll('td')].filter((cell) => cell.style.background).map((cell) => {
    const [a, b] = [light(getComputedStyle(cell).backgroundColor), light(getComputedStyle(cell).color)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_number_can_be_read_on_its_colour(scheme: str, opened: Opener) -> None:
    x = torch.linspace(-1, 1, 24).unsqueeze(0)
    tab = opened(ur.trace(ur.LSTM(24, 12), x), scheme=scheme)
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 120
    assert min(ratios) >= 4.5  # WCAG 2.2, 1.4.3


def test_what_a_screen_reader_is_told(opened: Opener) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    tree = opened(t).locator("#page").aria_snapshot()
    for line in (
        '- region "The layer, unrolled through time"', '- slider "time step"', '- button "play"',
        '- grid "numbers of the step"', f'''- 'gridcell "h₀, unit 2: {number(t["h"][0, 0, 2].item())}"': ''',
        '- region "where a number comes from"', '- region "Its equations"', '- region "The whole sequence"',
        'application "h, hidden state: 3 units over 3 steps', '- table "weight_ih"', "- math:",
        '- region "Beside torch.nn"',
    ):  # fmt: skip
        assert line in tree, line


def test_what_has_no_name_is_followed_to_what_has(opened: Opener) -> None:
    t = ur.trace(ur.Recurrent(Awkward, 2, 4), torch.randn(3, 2)).backward(torch.sum)
    tab = opened(t)
    tab.get_by_role("button", name="step 1").click()

    def lit(name: str, place: int) -> set[tuple[str, int]]:
        tab.locator(f'td[data-key="quantity {name}"][data-place="{place}"]').focus()
        cells = tab.locator("table[role=grid] td.lit").all()
        return {(one.get_attribute("data-key"), int(one.get_attribute("data-place"))) for one in cells}

    states = {("before h", unit) for unit in range(4)}
    assert lit("constructor", 2) == states  # through relu
    assert lit("toString", 1) == {("quantity x", 0), ("quantity x", 1)}
    assert tab.locator(".parameters table[aria-label=weight] td.lit").count() == 2  # through abs
    assert lit("heads", 3) == states | {("quantity constructor", unit) for unit in range(4)}
    assert lit("ratio", 0) == {("quantity constructor", 0), ("quantity toString", 0)}
    assert tab.locator(".arithmetic").text_content() == t.explain("ratio", 1, 0)
    assert re.fullmatch(r"\(\(\S+ / 3\) / 2\)·\S+ = \S+", t.explain("ratio", 1, 0))
    assert lit("h", 1) >= states
    assert lit("x", 0) == {("input", 0)}
    assert tab.locator(".explanation h3").text_content().startswith("x₁[0]")
    assert "given x₁" in tab.locator(".made").text_content()
    # at the zero state it began from, nothing is taken for a function of single elements
    assert t.explain("running", 0, 1).startswith("cumsum([")
    assert t.explain("heads", 0, 1).startswith("matmul([")


def test_named_numbers_are_those_of_the_trace() -> None:
    class Noisy(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            noise = torch.randn_like(h)
            clear = (noise - x) * 0  # the same whatever was drawn
            return h + clear

    t = ur.trace(ur.Recurrent(Noisy, 2, 2), torch.randn(3, 2).abs())
    noise, x = t["noise"][1, 0, 1].item(), t["x"][1, 0, 1].item()
    assert t.explain("noise", 1, 1) == f"{number(noise)} = {number(noise)}"
    assert f"({number(noise)} - {number(x)})" in t.explain("clear", 1, 1)


def test_parameters_that_are_pictures_can_be_read(opened: Opener) -> None:
    layer = ur.LSTM(2, 8)
    tab = opened(ur.trace(layer, torch.randn(2, 2)))
    figure = tab.locator("figure", has=tab.get_by_text("weight_hh", exact=True))
    box = figure.locator("canvas").bounding_box()
    figure.locator("canvas").hover(position={"x": box["width"] * 5.5 / 8, "y": box["height"] * 20.5 / 32})
    value = number(layer.weight_hh_l0[20, 5].item())
    assert figure.locator(".read").text_content() == f"weight_hh[20, 5]: {value}"
    figure.locator("canvas").focus()
    tab.keyboard.press("ArrowUp")
    assert figure.locator(".read").text_content().startswith("weight_hh[19, 5]: ")
    tab.mouse.move(0, 0)  # where the page scrolls below it, it isn't over another number
    tab.locator('td[data-key="quantity hidden_sum"][data-place="3"]').focus()
    mark, box = (figure.locator(one).bounding_box() for one in (".mark", "canvas"))
    assert mark["y"] - box["y"] == pytest.approx(box["height"] * 3 / 32 - 2, abs=1)
    assert figure.locator(".mark").count() == 1


def test_texts_of_users_stay_texts(opened: Opener) -> None:
    bad = [
        "</script><script>window.hit = 1</script>",
        "<img src=x onerror='window.hit = 1'>",
        "\u2028&amp;\ud800",
    ]
    t = ur.trace(ur.Recurrent(Mixed, 2, 3), torch.randn(3, 2))
    tab = opened(t, labels=bad, title=bad[0])
    assert tab.evaluate("window.hit") is None
    assert tab.locator("h1").text_content() == tab.title() == bad[0]
    assert tab.locator(".column .in").all_text_contents() == [*bad[:2], "\u2028&amp;?"]
    assert tab.locator("header .words").text_content().endswith("<b>in the docstring</b>.")
    assert "<script>alert(1)</script>" in tab.locator("tr[data-key='quantity both']").text_content()
    assert tab.locator("script").count() == 2


def test_what_is_not_finite_has_colours_of_its_own(opened: Opener) -> None:
    x = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [float("-inf"), 3.0]])
    tab = opened(ur.trace(ur.RNN(2, 3, nonlinearity="relu"), x).backward(torch.sum))
    seen = []
    for _ in range(3):
        cell = tab.locator('td[data-key="input"][data-place="0"]')
        seen.append((cell.text_content(), cell.evaluate(STYLE)))
        tab.get_by_role("button", name="next step").click(force=True)
    assert seen[1:] == [("nan", "rgb(240, 228, 66)"), ("-inf", "rgb(204, 121, 167)")]
    assert tab.locator(".scale").text_content().startswith("-")  # and the scale is of the finite ones


def test_what_the_page_says_in_words(opened: Opener) -> None:
    tab = opened(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)), labels=["a", " ", "b\n", "\t"], width=1280)
    assert tab.locator(".column .in").all_text_contents() == ["a", "␣", "b⏎", "⇥"]
    tab.get_by_role("button", name="next step").click()
    assert tab.locator(".where").text_content() == "step 1 of 0–3: ␣"
    assert "4*hidden × hidden)" in tab.locator(".weights").text_content()
    assert "proj_size" not in tab.locator(".weights").text_content()
    assert "12 numbers of the output and the 6 of the final state" in tab.locator(".check").text_content()
    assert "In Python trace.backward(loss) before trace.to_html" in tab.locator(".slopes").text_content()
    tab.locator(".parameters td").first.hover()
    assert "learned" not in tab.locator(".arithmetic").text_content()
    tab = opened(ur.trace(ur.LSTM(2, 4, proj_size=2), torch.randn(4, 2)), width=1280)
    assert "4*hidden × proj_size)" in tab.locator(".weights").text_content()


def test_gradients_and_the_check(opened: Opener) -> None:
    layer = ur.LSTM(2, 3)
    weights = layer.weight_hh_l0[:3].detach().numpy()
    t = ur.trace(layer, torch.randn(5, 2))
    assert "trace.backward(loss)" in opened(t).locator(".slopes").text_content()
    tab = opened(t.backward(lambda output: output[-1].sum()))
    tab.get_by_text("the sizes as a table").click()
    names = tab.locator(".gradients thead th").all_text_contents()[1:]
    assert set(names) == set(t.names)
    for step, row in enumerate(tab.locator(".gradients tbody tr").all()):
        norms = [number(t.gradient(name)[step, 0].double().norm().item()) for name in names]
        assert row.locator("td").all_text_contents() == norms
    assert tab.locator(".chart path").count() == len(names)
    for name in ("h", "c"):
        assert flow(t.layers[0], name).words[1:] in tab.locator(".gradients").text_content()
    radius = f"{numpy.abs(numpy.linalg.eigvals(weights)).max():.4f}"
    assert f"weight_hh: {radius}" in tab.locator(".gradients").text_content()
    text = tab.locator(".check p").text_content()
    assert text.startswith("torch.nn.LSTM gives the same numbers")


def test_a_gradient_that_is_exactly_zero_is_marked(opened: Opener) -> None:
    t = ur.trace(ur.LSTM(2, 3), torch.randn(12, 2)).backward(lambda output: output[8].sum())
    tab = opened(t, width=1280)
    zeros = sum(int((t.gradient(name)[:, 0].norm(dim=-1) == 0).sum()) for name in t.names)
    assert zeros >= 3 * len(t.names)
    assert tab.locator(".chart .zero").count() == zeros
    assert "a ring where a gradient is exactly 0" in tab.locator(".slopes").text_content()
    lines = tab.locator(".chart path").evaluate_all(
        "(paths) => paths.map((one) => one.getAttribute('stroke'))"
    )
    assert len(set(lines)) == len(t.names)
    ticks = tab.locator(".chart text[text-anchor=middle]").all_text_contents()
    assert ticks == ["0", "2", "4", "6", "8", "10"]


def test_indices_stand_at_one_height_and_long_lines_are_whole(opened: Opener) -> None:
    tab = opened(ur.trace(ur.Recurrent(Awkward, 2, 4), torch.randn(2, 2)), width=360)
    assert tab.locator("ol.code").evaluate("(list) => list.scrollWidth <= list.clientWidth")
    tab = opened(ur.trace(ur.LSTM(2, 3), torch.randn(2, 2)), width=1280)
    heights = tab.locator(".formulas li").nth(2).locator("msub").evaluate_all(
        "(all) => all.map((one) => one.lastElementChild.getBoundingClientRect().bottom)")  # fmt: skip
    assert len(heights) == 6
    assert max(heights[-2:]) - min(heights[-2:]) < 1.5  # of input and of hidden


def test_what_was_recorded_is_a_page_too(opened: Opener, tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(2, 3, num_layers=2, dropout=0.5)})
    with ur.record(model, rows=[1], gradients=True) as rec:
        model["encoder"](torch.randn(4, 3, 2))[0].sum().backward()
    tab = opened(rec["encoder"])
    assert tab.locator(".check p").text_content().startswith("A check needs the whole batch")
    tab.get_by_label("layer", exact=True).select_option("1")
    tab.locator('td[data-key="input"]').first.click()
    assert "after dropout" in tab.locator(".arithmetic").text_content()
    with ur.record(model, steps=[0]) as rec:
        model["encoder"](torch.randn(4, 3, 2))
    with pytest.raises(ValueError, match="a page needs every step, quantity and unit"):
        rec["encoder"].to_html(tmp_path / "layer.html")


def test_labels_images_rows_and_lengths(opened: Opener) -> None:
    rows = nn.utils.rnn.pack_sequence([torch.rand(n, 4) for n in (3, 5)], enforce_sorted=False)
    t = ur.trace(ur.GRU(4, 3), rows)
    tab = opened(t, batch=0, labels=["a", "b", "c"], inputs="image")
    assert tab.locator(".where").text_content() == "step 0 of 0–2: a"
    assert tab.get_by_text("Row 0 of a batch of 2.").is_visible()
    grey = round(255 * float(t["x"][1, 0, 2] / t["x"][:3, 0].max()))
    picture = tab.locator("figure.map canvas").first
    assert pixel(picture, 2, 1) == [grey] * 3  # upright: the rows of the image are the time steps
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 2.5 / 4, "y": box["height"] * 1.5 / 3})
    assert tab.locator(".explanation h3").text_content() == f"x₁[2] = {number(t['x'][1, 0, 2].item())}"


def test_backwards_the_arrows_and_the_play_run_backwards(opened: Opener) -> None:
    t = ur.trace(ur.GRU(2, 3, bidirectional=True), torch.randn(3, 2))
    tab = opened(t)
    tab.get_by_label("layer", exact=True).select_option("1")
    assert tab.locator(".where").text_content() == "step 2 of 0–2"
    assert tab.locator(".arrow.left").count() == 4
    tab.locator('td[data-key="quantity hidden_sum"]').first.click()
    assert "initial h" in tab.locator(".made").text_content()
    tab.get_by_role("button", name="previous step").click()
    assert "h₂[0]" in tab.locator(".made").text_content()


def test_a_large_trace_is_cut_down_and_says_so(opened: Opener, tmp_path: Path) -> None:
    t = ur.trace(ur.LSTM(4, 40), torch.randn(600, 4))
    with pytest.warns(UserWarning, match=r"of the 600 time steps of layer 0, forward, (\d+) are kept"):
        tab = opened(t, limit=60_000)
    note = tab.locator(".note").text_content()
    kept = int(re.search(r"(\d+) are kept", note)[1])
    assert (tmp_path / "layer.html").stat().st_size < 60_000 * 5.5 + 1_100_000
    assert int(tab.get_by_role("slider", name="time step").get_attribute("max")) == kept - 1
    canvas = tab.locator("figure.map canvas").nth(1)
    assert canvas.get_attribute("aria-label").endswith("each colour is the mean of 3 steps")
    assert "Units are sorted by what they do." in tab.locator(".whole").text_content()
    mean = t["i"][300:303, 0].double().mean(0)
    canvas.hover(position={"x": canvas.bounding_box()["width"] * 100.5 / 200, "y": 1})
    unit, value = re.search(
        r"step 300, unit (\d+): (\S+)", tab.locator(".whole .read").text_content()
    ).groups()
    assert float(value) == pytest.approx(float(mean[int(unit)]), abs=1e-4)
    canvas.click(position={"x": canvas.bounding_box()["width"] - 2, "y": 1})
    assert tab.locator(".where").text_content() == "step 599 of 0–599"
    place = int(tab.locator('td[data-key="quantity hidden_sum"]').first.get_attribute("data-place"))
    tab.locator(f'td[data-key="quantity hidden_sum"][data-place="{place}"]').click()
    assert tab.locator(".arithmetic").text_content() == t.explain("hidden_sum", 599, place)
    with pytest.warns(UserWarning, match="Too large for a page") as warned:
        tab = opened(t, limit=5_000)
    assert any("parameters of layer 0, forward are left out" in str(one.message) for one in warned)
    tab.locator('td[data-key="quantity hidden_sum"][data-place="3"]').click()
    call = re.search(r"explain\(.*\)$", tab.locator(".arithmetic").text_content())[0]
    assert eval(f"t.layers[0].{call}", {"t": t}) == t.explain("hidden_sum", 0, 3)


VIEW = """(cells) => cells.every((cell) => {
  const [box, frame] = [cell.getBoundingClientRect(), cell.closest('.scroll').getBoundingClientRect()];
  return box.left >= frame.left && box.right <= frame.right + 1 && box.right <= innerWidth; })"""


@pytest.mark.parametrize("width", [360, 1280])
def test_the_columns_fit_and_what_lights_up_stands_below_each_other(width: int, opened: Opener) -> None:
    t = grown()
    tab = opened(t, width=width)
    assert tab.locator("table[role=grid] td").evaluate_all(VIEW)
    shown = tab.locator('tr[data-key="quantity f"] td').count()
    assert (4 if width > 1000 else 3) <= shown < 12
    numbers = tab.locator("table[role=grid] thead th").all_text_contents()
    assert numbers[0] == f"unit‹0–{shown - 1} of 12›"
    assert numbers[1:] == list(map(str, range(shown)))
    lines = tab.locator('tr[data-key="quantity input_sum"]')
    assert [one.text_content() for one in lines.locator(".range").all()] == [
        "0–11",
        "12–23",
        "24–35",
        "36–47",
    ]
    cell = tab.locator('td[data-key="quantity f"][data-place="1"]')
    cell.click()
    lit = tab.locator("table[role=grid] td.lit")
    assert [(one.get_attribute("data-key"), one.get_attribute("data-place")) for one in lit.all()] == [
        ("quantity input_sum", "13"), ("quantity hidden_sum", "13"),
    ]  # fmt: skip
    assert {one.bounding_box()["x"] for one in [*lit.all(), cell]} == {cell.bounding_box()["x"]}
    # the arrows go down from block to block, and on to where no column is yet
    tab.locator('td[data-key="quantity input_sum"][data-place="14"]').focus()
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset.place") == "26"
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.dataset.place") == "47"
    assert tab.locator('td[data-key="quantity f"][data-place="11"]').is_visible()


def test_wide_layers_are_shown_part_by_part(opened: Opener) -> None:
    t = ur.trace(ur.RNN(20, 70), torch.randn(2, 20))
    tab = opened(t, width=1280)
    line = tab.locator('tr[data-key="quantity h"]')
    shown = line.locator("td").count()
    later = tab.get_by_role("button", name="later units")
    later.click()
    assert line.locator("td").first.text_content() == number(t["h"][0, 0, shown].item())
    assert tab.locator('tr[data-key="before h"] td').first.get_attribute("data-place") == str(shown)
    assert tab.locator('tr[data-key="input"] td').first.get_attribute("data-place") == "0"  # has others
    tab.get_by_role("button", name="later numbers of x").click()
    assert tab.locator('tr[data-key="input"] td').first.get_attribute("data-place") == str(shown)
    while later.is_enabled():
        later.click()
    last = int(line.locator("td").first.get_attribute("data-place"))
    assert last + line.locator("td").count() == 70
    tab.keyboard.press("Enter")  # what was pressed keeps the keyboard, or its neighbour does
    assert line.locator("td").first.get_attribute("data-place") == str(last - shown)
    tab.get_by_role("button", name="next step").click()
    assert line.locator("td").first.get_attribute("data-place") == str(last - shown)
    tab.locator(f'td[data-key="quantity h"][data-place="{last - 1}"]').focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.place") == str(last)


def test_the_chain_goes_on_to_the_step_before_and_the_layer_below(opened: Opener) -> None:
    layer = nn.LSTM(2, 3, num_layers=2, bidirectional=True)
    t = ur.trace(layer, torch.randn(3, 2))
    tab = opened(t, width=1280)
    tab.get_by_label("layer", exact=True).select_option("2")
    tab.get_by_role("button", name="step 1", exact=False).first.click()
    text = tab.locator(".arithmetic")
    tab.locator('td[data-key="before c"][data-place="2"]').click()
    assert text.text_content() == f"As step 0 left it: {t.layer(1).explain('c', 0, 2)}"
    tab.get_by_role(
        "button", name=f"go to c₀[2] = {number(t.layer(1)['c'][0, 0, 2].item())} of step 0"
    ).click()
    assert tab.locator(".where").text_content().startswith("step 0")
    assert text.text_content() == t.layer(1).explain("c", 0, 2)
    assert tab.evaluate("document.activeElement.dataset") == {"key": "quantity c", "place": "2"}
    # the input of the upper layer: the outputs of both directions of the lower one
    tab.get_by_role("button", name="step 2", exact=False).first.click()
    for place, direction in ((1, "forward"), (4, "backward")):
        tab.get_by_label("layer", exact=True).select_option("2")
        tab.get_by_role("button", name="step 2", exact=False).first.click()
        tab.locator(f'td[data-key="input"][data-place="{place}"]').click()
        below = t.layer(0, direction)
        arithmetic = below.explain("h", 2, place % 3)
        assert text.text_content() == f"The output of layer 0, {direction}: {arithmetic}"
        tab.get_by_role("button", name=f"go to h₂[{place % 3}]").click()
        assert tab.get_by_label("layer", exact=True).input_value() == str(t.layers.index(below))
        assert tab.locator(".where").text_content().startswith("step 2")
        assert text.text_content() == arithmetic


def test_the_explanation_stays_in_sight(opened: Opener) -> None:
    tab = opened(grown(), width=1280)
    box = tab.locator(".explanation")
    canvas = tab.locator("figure.map canvas").nth(4)
    canvas.scroll_into_view_if_needed()
    canvas.click(position={"x": 300, "y": 40})
    expect(box).to_be_in_viewport(ratio=1)
    tab.locator('td[data-key="before h"]').first.hover()
    expect(box).to_be_in_viewport(ratio=1)
    tab.locator('td[data-key="quantity h"]').first.focus()
    cell, top = tab.locator('td[data-key="quantity h"]').first.bounding_box(), box.bounding_box()["y"]
    assert cell["y"] + cell["height"] <= top  # nothing that has the keyboard is below it


def test_complex_numbers_and_other_bad_requests(tmp_path: Path, opened: Opener) -> None:
    class Turning(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            z = torch.complex(x, h)
            h = z.real + z.imag
            return h

    class Complex(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return h * 1j + x

    turned = ur.trace(ur.Recurrent(Complex, 2, 2, dtype=torch.complex64), torch.randn(2, 2) + 0j)
    with pytest.raises(ValueError, match="the state h of Complex is complex: keep its real"):
        turned.to_html(tmp_path / "layer.html")
    t = ur.trace(ur.Recurrent(Turning, 2, 2), torch.randn(2, 2))
    with pytest.warns(UserWarning, match="z is not shown: its numbers are complex"):
        tab = opened(t)
    tab.locator('td[data-key="quantity h"]').first.click()
    assert "Not all that this number is made of is on this page" in tab.locator(".arithmetic").text_content()
    file = tmp_path / "layer.html"
    for options, words in (
        ({"title": 5}, "title should be of type str, got 5"),
        ({"labels": 3}, "labels should be texts, one for each time step, got int"),
        ({"labels": b"ab"}, "labels should be texts, one for each time step, got bytes"),
        ({"labels": "abc"}, "labels should be one for each of the 2 time steps, got 3"),
        ({"inputs": "picture"}, "inputs should be 'numbers' or 'image', got 'picture'"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            t.to_html(file, **options)
    with pytest.raises(IndexError, match="there is no row 1"):
        t.to_html(file, batch=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        t.to_html(tmp_path / "nowhere" / "layer.html")
    with pytest.raises(IsADirectoryError, match="give the path of a file"):
        t.to_html(tmp_path)
    with pytest.raises(ValueError, match="limit must be greater than zero, got 0"):
        t.to_html(file, limit=0)


def test_a_small_page_is_small_and_the_bundle_is_whole(tmp_path: Path) -> None:
    path = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).to_html(tmp_path / "layer.html")
    assert path.stat().st_size < 200_000
    text = path.read_text()
    assert "import " not in re.search(r'<script type="module">(.*)</script>', text, re.DOTALL)[1]
    assert {file.stem for file in Path(page.__file__).parent.glob("*.js")} == set(page._SCRIPTS)


def test_a_notebook_shows_the_same(browser: Any) -> None:
    t = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    bundle = t._repr_mimebundle_()
    assert bundle["text/plain"] == repr(t)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    from unrolled.page.widget import TraceView

    view = TraceView(contents=json.dumps(page.contents(t, 0, None, "numbers", None, 1000)))
    tab = browser.new_page()
    tab.set_content("<div id='cell'></div>")
    script = str(view._esm).replace("export default", "window.widget =")
    tab.add_script_tag(type="module", content=script)
    tab.add_style_tag(content=str(view._css))
    cell = "document.getElementById('cell')"
    tab.evaluate(f"(text) => widget.render({{ model: {{ get: () => text }}, el: {cell} }})", view.contents)
    assert tab.locator('td[data-key="quantity h"]').first.text_content() == number(t["h"][0, 0, 0].item())
    tab.close()


def test_without_anywidget_a_notebook_shows_the_page_in_a_frame(browser: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "anywidget", None)
    monkeypatch.delitem(__import__("sys").modules, "unrolled.page.widget", raising=False)
    t = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    shown = t._repr_mimebundle_()["text/html"]
    tab = browser.new_page()
    tab.set_content(shown)
    frame = tab.frame_locator("iframe")
    assert frame.locator('td[data-key="quantity h"]').first.text_content() == number(t["h"][0, 0, 0].item())
    assert html.escape(repr(t)) in shown
    tab.close()

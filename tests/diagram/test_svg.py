"""Pictures of diagrams: the numbers in them, and how they look."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
import torch

import unrolled as ur
from diagram.random_diagrams import random_diagram
from helpers.browser import find_browser, running_browser
from unrolled.diagram.graph import build
from unrolled.diagram.groups import fold
from unrolled.diagram.layout import ORIENTATIONS, layout
from unrolled.diagram.model import DiagramTrace
from unrolled.diagram.numbers import scales
from unrolled.diagram.shapes import BOX_HEIGHT
from unrolled.diagram.svg import svg
from unrolled.diagram.text import digits, width

SVG = "{http://www.w3.org/2000/svg}"


def trace_of(cell: str, steps: int = 3) -> DiagramTrace:
    layer = ur.Recurrent(getattr(ur.cells, cell), 3, 4)
    return build(ur.trace(layer, 2 * torch.randn(steps, 3)).layers[0])


def picture(trace: DiagramTrace, step: int = 1, **options: object) -> str:
    options.setdefault("limits", scales(trace.diagram, trace.values))
    return svg(trace.diagram, layout(trace.diagram), trace.values[step], **options)


def groups(text: str, name: str) -> Iterator[ElementTree.Element]:
    for element in ElementTree.fromstring(text).iter(f"{SVG}g"):
        if name in element.get("class", "").split():
            yield element


def node(text: str, identifier: str) -> ElementTree.Element:
    return next(group for group in groups(text, "node") if group.get("data-node") == identifier)


def texts(element: ElementTree.Element, name: str) -> list[str]:
    return ["".join(e.itertext()) for e in element.iter(f"{SVG}text") if name in e.get("class", "").split()]


@pytest.mark.parametrize("unit", [0, 3])
def test_numbers_of_nodes(unit: int) -> None:
    trace = trace_of("LSTM")
    text = picture(trace, step=2, unit=unit)
    for item in trace.diagram.nodes:
        value = float(trace.values[2][item.value][unit])
        title = next(node(text, item.id).iter(f"{SVG}title")).text
        assert title.endswith(f": {value:.4g}".replace("-", "−"))
        shown = texts(node(text, item.id), "digits")
        is_new_state = item.id in {state.end for state in trace.diagram.states}
        assert shown == ([] if is_new_state else [f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00")])
    for state in trace.diagram.states:
        before = f"{float(trace.values[2][state.value][unit]):.2f}".replace("-", "−")
        assert before in texts(ElementTree.fromstring(text), "digits")


def test_gates_are_filled_as_far_as_they_are_open() -> None:
    trace = trace_of("LSTM")
    text = picture(trace)
    for item in trace.diagram.nodes:
        if item.range == "gate":
            fill = next(e for e in node(text, item.id).iter(f"{SVG}rect") if e.get("class") == "fill")
            share = float(trace.values[1][item.value][0])
            assert float(fill.get("height")) == pytest.approx(BOX_HEIGHT * share, abs=0.01)
            assert float(fill.get("y")) == pytest.approx(BOX_HEIGHT * (0.5 - share), abs=0.01)
    rings = [e for e in ElementTree.fromstring(text).iter(f"{SVG}circle") if e.get("class") == "ring"]
    shares = {float(re.search(r"dasharray:([\d.]+)", ring.get("style")).group(1)) for ring in rings}
    gates = [item for item in trace.diagram.nodes if item.range == "gate"]
    values = [100 * float(trace.values[1][item.value][0]) for item in gates]
    assert sorted(shares) == pytest.approx(sorted(values), abs=0.01)


def test_lines_are_as_wide_as_their_number() -> None:
    trace = trace_of("LSTM")
    values = [[tensor.clone() for tensor in step] for step in trace.values]
    state = next(state for state in trace.diagram.states if state.name == "c")
    limits = scales(trace.diagram, values)
    found = []
    for share in (0.0, 0.5, -1.0):
        values[1][state.value][0] = share * limits["before:c"]
        text = svg(trace.diagram, layout(trace.diagram), values[1], limits=limits)
        lane = next(g for g in groups(text, "scalar") if "M14 " in ElementTree.tostring(g, "unicode"))
        stroke = re.search(r"stroke-width:([\d.]+)", ElementTree.tostring(lane, "unicode"))
        found.append((float(stroke.group(1)), lane.get("class").split()[-1]))
    (zero, _), (half, positive), (full, negative) = found
    assert zero < half < full
    assert half - zero == pytest.approx((full - zero) / 2, abs=0.01)
    assert (positive, negative) == ("positive", "negative")


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞")])
def test_numbers_that_are_not_finite(value: float, text: str) -> None:
    trace = trace_of("GRU")
    item = next(item for item in trace.diagram.nodes if item.name == "n")
    trace.values[1][item.value][2] = value
    found = picture(trace, unit=2)
    assert "alarm" in node(found, item.id).get("class").split()
    assert texts(node(found, item.id), "digits") == [text]
    assert f": {text}" in next(node(found, item.id).iter(f"{SVG}title")).text
    lines = [g for g in groups(found, "wire") if "alarm" in g.get("class").split()]
    assert len(lines) == 1
    assert "alarm" not in node(picture(trace, unit=1), item.id).get("class").split()


def test_scales() -> None:
    trace = trace_of("LSTM")
    limits = scales(trace.diagram, trace.values)
    for item in trace.diagram.nodes:
        if item.range:
            assert limits[item.id] == 1
    states = trace.diagram.states
    ends = {state.end for state in states}
    indices = [state.value for state in states]
    indices += [item.value for item in trace.diagram.nodes if item.id in ends]
    largest = max(float(step[index].abs().max()) for step in trace.values for index in indices)
    assert limits["before:c"] == limits["before:h"] == largest
    trace.values[0][states[0].value][0] = math.inf  # doesn't flatten the rest
    assert math.isfinite(max(scales(trace.diagram, trace.values).values()))


def test_softmax_has_shares_and_lerp_a_slider() -> None:
    class Mixer(ur.Cell):
        weight = ur.Param("hidden", "hidden")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            a = torch.softmax(torch.nn.functional.linear(h, self.weight), -1)
            h = torch.lerp(h, x, a)
            return h

    layer = ur.Recurrent(Mixer, 4, 4)
    trace = build(ur.trace(layer, torch.randn(3, 4)).layers[0])
    text = picture(trace, step=2, unit=3)
    item = next(item for item in trace.diagram.nodes if item.name == "a")
    shares = [e for e in node(text, item.id).iter(f"{SVG}rect") if "share" in e.get("class", "")]
    whole = sum(float(share.get("width")) for share in shares)
    values = [float(value) for value in trace.values[2][item.value].flatten()]
    assert [float(share.get("width")) / whole for share in shares] == pytest.approx(values, abs=1e-3)
    assert [share.get("class") for share in shares] == [*["share"] * 3, "share mine"]
    knob = next(e for e in ElementTree.fromstring(text).iter(f"{SVG}circle") if e.get("class") == "knob")
    track = next(e for e in ElementTree.fromstring(text).iter(f"{SVG}path") if e.get("class") == "fader")
    left, length = re.fullmatch(r"M(-?[\d.]+) 8h([\d.]+)", track.get("d")).groups()
    assert float(knob.get("cx")) == pytest.approx(float(left) + values[3] * float(length), abs=0.01)


def test_the_picture_stands_alone() -> None:
    text = picture(trace_of("LSTM"), meanings={"f": 'keeps <the> "old" value'})
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "One step of LSTM, unit 0"
    assert "script" not in text
    assert not re.search(r"(href|src|url)\s*[=(]\s*[\"']?(?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert any(title.text.startswith('f, keeps <the> "old" value: ') for title in root.iter(f"{SVG}title"))
    assert "prefers-color-scheme" not in picture(trace_of("LSTM"), theme="dark")


def test_wrong_arguments() -> None:
    trace = trace_of("RNN")
    with pytest.raises(ValueError, match="theme must be one of auto, light, dark, but got 'blue'"):
        picture(trace, theme="blue")
    with pytest.raises(ValueError, match="unit must be from 0 to 3, but got 4"):
        picture(trace, unit=4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"), (-0.0, "0.00"), (-0.004, "0.00"), (-0.005001, "−0.01"), (9.994, "9.99"),
        (9.996, "10.0"),
        (-99.96, "−100"), (998.6, "999"), (999.6, "1e3"), (-1.26e15, "−1e15"), (3e-9, "0.00"),
    ],
)  # fmt: skip
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="Chromium not found")
def test_texts_in_the_browser() -> None:
    """No text lies on another or on a node, and none leaves its box, as measured in Chromium."""
    script = """() => {
      const wrong = [];
      for (const svg of document.querySelectorAll("svg")) {
        const name = svg.getAttribute("aria-label");
        const texts = [...svg.querySelectorAll("text")].map((t) => ({ t, r: t.getBoundingClientRect() }));
        const hit = (a, b, s) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > s
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > s + 4;  // higher than glyphs
        texts.forEach((a, i) => texts.slice(i + 1).forEach((b) => {
          if (hit(a.r, b.r, 1.5)) wrong.push(`${name}: ${a.t.textContent} on ${b.t.textContent}`);
        }));
        for (const n of svg.querySelectorAll(".node")) {
          const body = n.querySelector(".body").getBoundingClientRect();
          for (const { t, r } of texts) {
            if (!n.contains(t)) { if (hit(r, body, 1.5)) wrong.push(`${name}: ${t.textContent} on a node`); }
            else if (Math.abs((r.left + r.right - body.left - body.right) / 2) < body.width / 2
              && r.top > body.top - 4 && r.bottom < body.bottom + 4
              && (r.left < body.left - 1 || r.right > body.right + 1))
              wrong.push(`${name}: ${t.textContent} leaves its box`);
          }
        }
      }
      return wrong;
    }"""
    pictures = []
    for cell in ur.cells.__all__:
        trace = trace_of(cell)
        for diagram in dict.fromkeys((trace.diagram, fold(trace.diagram))):
            for orientation in ORIENTATIONS:
                placed = layout(diagram, orientation)
                pictures += [svg(diagram, placed, values) for values in trace.values[1:]]
    for seed in range(6):
        diagram = random_diagram(seed)
        large = [torch.full((2,), -1e30 * 1.5**k) for k in range(diagram.input_value + 1)]
        pictures.append(svg(diagram, layout(diagram), large))
    with running_browser() as browser:
        page = browser.new_page()
        page.set_content("<!doctype html><meta charset=utf-8>" + "".join(pictures))
        assert page.evaluate(script) == []
        planted = pictures[0].replace(
            "</svg>", '<text x="60" y="60">planted</text><text x="60" y="60">on</text></svg>'
        )
        page.set_content(f"<!doctype html><meta charset=utf-8>{planted}")
        assert page.evaluate(script)


def test_widths_are_upper_bounds() -> None:
    """The widths agree with those of a widespread, wide font."""
    font = pytest.importorskip("matplotlib.font_manager")
    paths = pytest.importorskip("matplotlib.textpath")
    family = font.FontProperties(family="DejaVu Sans", size=10)
    for text in (
        "candidate",
        "hidden",
        "input",
        "forget",
        "tanh",
        "softplus",
        "−0.53",
        "−1e15",
        "×across",
        "log σ",
    ):
        measured = paths.TextPath((0, 0), text, prop=family).get_extents().x1
        assert measured <= width(text, 10) * 1.02, text

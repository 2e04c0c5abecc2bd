"""The drawing, the equations and the strip: groups, softmax and lerp, long formulas, and the steps shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from page_helpers import OpenPage, assert_numbers_are_those_of_the_trace, needs_browser, small_trace
from torch.nn.functional import linear

import unrolled as ur
from helpers.sampling import sample
from unrolled.diagram.graph import build

pytestmark = needs_browser


class Attention(ur.Cell):
    """A softmax over units, and a mix of two vectors."""

    query = ur.Param("hidden", "input")
    gate = ur.Param("hidden", "hidden")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        a = torch.softmax(linear(x, self.query) * h, -1)
        z = torch.sigmoid(linear(h, self.gate))
        h = torch.lerp(h, 3 * a, z)
        return h


class OneLetter(ur.Cell):
    """A parameter whose rows compute h and a gate."""

    weight_ih = ur.Param("2*hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        first, second = linear(x, self.weight_ih).chunk(2, -1)
        z = torch.sigmoid(second)
        h = torch.tanh(first) * z + h * (1 - z)
        return h


# The frame of each end of the drawing, and the boxes of its texts, as [left, top, right, bottom].
READ_FRAMES = """() => [...document.querySelectorAll('svg.cell .port')].map((port) => {
  const sides = (one) => {
    const { x, y, width, height } = one.getBBox();
    return [x, y, x + width, y + height];
  };
  return [sides(port.querySelector('rect')), ...[...port.querySelectorAll('text')].map(sides)];
})"""


@pytest.mark.parametrize("name", sample(sorted(ur.cells.__all__), ("RNN",)))
def test_frames_hold_their_digits_and_nothing_else(open_page: OpenPage, name: str) -> None:
    tab = open_page(small_trace(getattr(ur.cells, name)))
    tops = []
    for width in (1366, 360):
        tab.set_viewport_size({"width": width, "height": 768})
        tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        ports = tab.evaluate(READ_FRAMES)
        tops.append(ports[0][0][1])
        assert len(ports) > 2
        for (left, top, right, bottom), *texts in ports:
            assert top > 0  # not cut off
            assert all(left <= x1 < x2 <= right for x1, _, x2, _ in texts)
            for (x1, y1, x2, y2), *_ in ports:
                is_same = (x1, y1, x2, y2) == (left, top, right, bottom)
                assert is_same or x1 >= right or x2 <= left or y1 >= bottom or y2 <= top
    assert tops[0] != tops[1]  # the drawing of a narrow screen is another one


@pytest.mark.slow
def test_groups_open_and_fold(open_page: OpenPage) -> None:
    trace = small_trace(ur.cells.RHN)
    diagram = build(trace.layers[0]).diagram
    assert len(diagram.groups) == 3
    tab = open_page(trace)
    nodes = tab.locator("svg.cell .node")
    assert nodes.count() == len(diagram.nodes) - sum(len(group.nodes) - 1 for group in diagram.groups)
    group = diagram.groups[1]
    button = tab.get_by_role("button", name="Open pass 2: 6 nodes")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert nodes.count() == len(diagram.nodes)
    assert tab.evaluate("document.activeElement.dataset.group") == group.nodes[-1]
    tab.keyboard.press("Enter")
    assert nodes.count() == 3
    tab.keyboard.press(" ")
    assert nodes.count() == len(diagram.nodes)
    assert assert_numbers_are_those_of_the_trace(tab, trace.layers[0]) > 100


@pytest.mark.slow
def test_a_folded_node_shows_that_it_has_the_chosen_number(open_page: OpenPage) -> None:
    tab = open_page(small_trace(ur.cells.RHN))
    holds = tab.locator("svg.cell .node.holds")
    assert holds.count() == 0
    tab.locator(".tables .gate").first.locator(".n").last.click()
    assert holds.count() == 1
    tab.locator(".fold").first.click()
    assert holds.count() == 0
    assert tab.locator("svg.cell .node.on").count() == 1


@pytest.mark.slow
def test_softmax_has_shares_and_lerp_a_slider(open_page: OpenPage) -> None:
    trace = small_trace(Attention)
    tab = open_page(trace, address="#step=1&unit=2&number=h")
    left, right = tab.locator(".fader").evaluate(
        "(one) => [0, one.getTotalLength()].map((at) => one.getPointAtLength(at).x)"
    )
    for step in (1, 3):
        tab.locator(f'.strip .step[data-step="{step}"] .title').click()
        widths = tab.locator(".share").evaluate_all("(all) => all.map((one) => one.width.baseVal.value)")
        shares = trace["a"][step, 0]
        assert widths == pytest.approx([float(share) * sum(widths) for share in shares], rel=1e-3)
        weight = float(trace["z"][step, 0, 2])
        at = float(tab.locator(".knob").get_attribute("cx"))
        assert at == pytest.approx(left + weight * (right - left), abs=1e-3)
    assert tab.locator(".share.mine").count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("width", [pytest.param(360, marks=pytest.mark.slow), 1366])
def test_long_equations_are_not_cut_off(width: int, open_page: OpenPage) -> None:
    tab = open_page(small_trace(ur.cells.RHN), width=width)
    lines = tab.locator(".equations li")
    texts = lines.all_text_contents()
    assert texts[-1].startswith("st = ht ⊙ tt + v")
    assert max(map(len, texts)) < 120
    outside = """(all) => all.filter((one) => one.scrollWidth > one.clientWidth
      || one.getBoundingClientRect().right > innerWidth).length"""
    assert lines.evaluate_all(outside) == 0


@pytest.mark.slow
def test_rows_of_a_parameter_are_not_part_of_its_subscript(open_page: OpenPage) -> None:
    tab = open_page(small_trace(OneLetter))
    lines = tab.locator(".equations li").evaluate_all("(all) => all.map((one) => one.innerHTML)")
    assert any("<var>W</var><sub>ih</sub>[first] <var>x" in line for line in lines), lines
    for row, symbol in ((1, "<sub>ih</sub>[first]"), (4, "<sub>iz</sub>")):
        tab.evaluate(f"location.hash = 'number=weight_ih&unit={row}&column=0'")
        tab.wait_for_function("(row) => document.querySelector('.n.on')?.refer().u === row", arg=row)
        name = tab.locator(".arithmetic .value .symbol").inner_html()
        assert name == f'<var>W</var>{symbol}<span class="ix">[1,0]</span>'


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_initial_state_is_only_before_the_first_step(backward: bool, open_page: OpenPage) -> None:
    layer = ur.LSTM(2, 3, bidirectional=backward)
    tab = open_page(ur.trace(layer, torch.randn(20, 2)), address=f"#step=1&unit=0&number=h&layer={+backward}")
    columns = tab.locator(".strip .step")

    def titles_at(step: int) -> list[str]:
        tab.evaluate(f"location.hash = 'step={step}&unit=0&number=h&layer={+backward}'")
        tab.wait_for_selector(f'.strip .step[data-step="{step}"][aria-current]', timeout=60_000)
        return list(columns.locator(".title").all_text_contents())

    count = columns.count()
    assert 3 < count < 20
    first, last = (19, 0) if backward else (0, 19)
    assert "start" not in titles_at(10)
    assert columns.count() == count
    assert "start" not in titles_at(last)
    shown = titles_at(first)
    assert shown[-1 if backward else 0] == "start"
    assert shown[-2 if backward else 1] == f"step {first}"
    assert columns.count() == count

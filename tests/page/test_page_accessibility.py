"""The page for screen readers and the keyboard: names, roles, tables, focus, announcements and motion."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from page_helpers import OpenPage, needs_browser

import unrolled as ur

pytestmark = needs_browser

ROOT = Path(__file__).parents[2]
NO_AXE = (
    "axe-core not found: install it with npm install --no-save axe-core, or npm install --global axe-core."
)
# The name of a node says more than the text in it, "forget gate f: 0.5312" and not "0.53".
AXE_OPTIONS = {"resultTypes": ["violations"], "rules": {"label-content-name-mismatch": {"enabled": False}}}


@cache
def axe() -> str | None:
    """Return the script of axe-core, or None if it isn't installed."""
    folders = [ROOT / "node_modules"]
    if npm := shutil.which("npm"):
        found = subprocess.run([npm, "root", "--global"], capture_output=True, text=True, check=False)
        folders.append(Path(found.stdout.strip()))
    files = [folder / "axe-core" / "axe.min.js" for folder in folders]
    return next((file.read_text() for file in files if file.exists()), None)


TRACES = {
    "RNN": lambda: ur.trace(ur.RNN(2, 3), torch.randn(4, 2)),
    "LSTM": lambda: ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)).backward(torch.sum),
    "GRU": lambda: ur.trace(ur.GRU(2, 3), torch.randn(4, 2)),
    "SLSTM": lambda: ur.trace(ur.Recurrent(ur.cells.SLSTM, 2, 3), torch.randn(4, 2)),
    "wide": lambda: ur.trace(ur.LSTM(2, 20), torch.randn(40, 2)),
    "broken": lambda: ur.trace(ur.LSTM(2, 3), torch.full((3, 2), float("nan"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", TRACES)
def test_axe_finds_nothing(name: str, scheme: str, open_page: OpenPage) -> None:
    script = axe()
    if script is None:
        pytest.skip(NO_AXE)
    tab = open_page(TRACES[name](), scheme)
    tab.evaluate(f"() => {{ {script} }}")
    actions = ["", "w", "w", "?"] if name in ("wide", "broken") else ["", "w", "w", "t", "?"]
    for key in actions:  # as it opens, the weights, the tour, the list of keys
        if key:
            tab.keyboard.press(key)
        found = tab.evaluate("(options) => axe.run(document, options)", AXE_OPTIONS)["violations"]
        problems = [(one["id"], node["html"][:200]) for one in found for node in one["nodes"]]
        assert not problems, (key, problems[:5])


def test_accessibility_tree(open_page: OpenPage) -> None:
    trace = ur.trace(ur.RNN(2, 3), torch.randn(3, 2))
    tab = open_page(trace)
    tree = tab.locator("#page").aria_snapshot()
    value = f"{trace['h'][2, 0, 1].item():.4f}".replace("-", "−")
    for line in (
        '- heading "RNN(2, 3)" [level=1]', "- status:", '- navigation "The sequence"', '- button "step 1"',
        '- heading "Weights, the same at every step"', '- heading "Every number of step 2',
        f"""- 'button "h, step 2, unit 1: {value}"'""",
        '- group "One step of the cell, with the numbers of one unit"', '- list "Equations of one step"',
        '- region "The cell"', '- region "The numbers of the step"', '- region "The chosen number"',
        '- heading "The cell at step 2, unit 1"', '- region "The whole sequence"',
        '- region "Gradient through time"',
        '- region "Diagnosis"', '- region "About RNN"', '- region "Keyboard"',
    ):  # fmt: skip
        assert line in tree, line
    assert not re.search(
        r"^ *- (button|slider|textbox|link|combobox|checkbox|tab|region|canvas)(?: \[|:|$)",
        tree,
        re.MULTILINE,
    )


# The tables of an element as lists of rows, by name. A cell is its text, or those of its buttons.
READ_TABLES = """(selector) => [...document.querySelectorAll(`${selector} [role=table]`)].map((table) =>
  [table.getAttribute('aria-label'), [...table.querySelectorAll('[role=row]')].map((row) =>
    [...row.querySelectorAll('[role=columnheader], [role=rowheader], [role=cell]')].map((cell) =>
      [...cell.querySelectorAll('button')].map((one) => one.textContent).join(' ') || cell.textContent))])"""


@pytest.mark.slow
def test_numbers_are_in_tables(open_page: OpenPage) -> None:
    trace = ur.trace(ur.GRU(2, 3), torch.randn(3, 2))
    tab = open_page(trace)

    def text(name: str, step: int, unit: int) -> str:
        return f"{trace[name][step, 0, unit].item():.4f}".replace("-", "−")

    [(_, strip)] = tab.evaluate(READ_TABLES, ".strip")
    assert strip[0] == ["step", "hhidden state, output", "xinput"]
    assert [row[0] for row in strip[1:]] == ["start", "step 0", "step 1", "step 2"]
    assert strip[3][1].split() == [text("h", 1, unit) for unit in range(3)]
    tables = dict(tab.evaluate(READ_TABLES, ".tables"))
    gate = tables["update gate z: how much of the old h is kept"]
    assert gate[0] == ["unit", "from theinput", "from the lasthidden state", "sum", "σ or sum"]
    assert [row[0] for row in gate[1:]] == ["[0]", "[1]", "[2]"]
    assert [row[-1] for row in gate[1:]] == [text("z", 2, unit) for unit in range(3)]
    reset = tables["reset gate r: how much of the old h enters n"]  # its heads aren't visible
    assert reset[0] == ["unit", "from theinput", "from the lasthidden state", "sum", "σ"]
    for table in (strip, *tables.values()):
        assert len(set(map(len, table))) == 1
    units = dict(tab.evaluate(READ_TABLES, ".sequence"))
    assert units["unit 1"][1] == ["z", *(text("z", step, 1) for step in range(3))]
    tab.keyboard.press("w")
    weights = dict(tab.evaluate(READ_TABLES, ".weights"))["weights of z"]
    assert weights[0] == ["unit", "weight_ih", "bias_ih", "weight_hh", "bias_hh"]


@pytest.mark.slow
def test_drawing_with_the_keyboard(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace)
    nodes = tab.locator("svg.cell .node")
    labels = nodes.evaluate_all("(all) => all.map((one) => one.getAttribute('aria-label'))")
    assert len(labels) > 8
    assert f"forget gate f: {trace['f'][2, 0, 1].item():.4f}" in labels
    ports = tab.locator("svg.cell .port").evaluate_all("(all) => all.map((one) => one.ariaLabel)")
    before = f"{trace['c'][1, 0, 1].item():.4f}".replace("-", "−")
    assert f"previous cell state c: {before}" in ports
    tab.locator("svg.cell .port").first.focus()
    seen = set()
    for _ in range(len(labels) + 6):
        tab.keyboard.press("Tab")
        seen.add(tab.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert seen >= set(labels)
    tab.locator("svg.cell .node").last.focus()
    name = tab.evaluate("document.activeElement.refer().q")
    tab.keyboard.press("Enter")
    assert f"number={name}" in tab.evaluate("location.hash")


@pytest.mark.slow
def test_focus_is_visible_and_in_order(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.LSTM(2, 3), torch.randn(4, 2)))
    parts: list[str] = []
    while "sequence" not in parts and len(parts) < 20:
        tab.keyboard.press("Tab")
        part, is_visible = tab.evaluate(FOCUS)
        assert is_visible, part
        if part and part not in parts:
            parts.append(part)
    assert parts == ["HEADER", "guide", "strip", "draw", "step-values", "why", "sequence"]


# The part of the page that has the focus, and whether the focus can be seen.
FOCUS = """() => {
  const one = document.activeElement;
  if (one === document.body) return ['', true];
  const part = one.closest('header, .guide, .strip, .draw, .step-values, .why, .more > section');
  const ring = one.querySelector('.focus, .hit') ?? one.querySelector('circle') ?? one;
  const isSvg = one.namespaceURI.endsWith('svg');
  const style = getComputedStyle(isSvg ? ring : one);
  const isVisible = isSvg ? style.stroke !== 'none' && parseFloat(style.strokeWidth) >= 2
    : style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
  const names = part ? part.className.split(' ').filter((one) => one !== 'wide') : [];
  return [names[0] || part?.tagName, isVisible];
}"""


@pytest.mark.slow
def test_choices_are_announced_and_keep_the_focus(open_page: OpenPage) -> None:
    trace = ur.trace(ur.LSTM(2, 3), torch.randn(4, 2))
    tab = open_page(trace, address="#step=1&unit=0&number=f")
    announced = tab.locator(".arithmetic [role=status]")
    value = f"{trace['f'][1, 0, 0].item():.4f}"
    assert announced.text_content().startswith(f"f, step 1, unit 0: {value}. The forget gate of unit 0")
    guide = tab.locator(".guide[role=status]")
    guide.evaluate("(one) => { one.firstChild.mark = true; }")
    tab.keyboard.press("ArrowRight")
    assert announced.text_content().startswith("f, step 2, unit 0: ")
    assert guide.evaluate("(one) => one.firstChild.mark")  # it isn't announced again
    shut = tab.get_by_role("button", name="Shut the forget gate of unit 0")
    shut.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function(
        "() => document.querySelector('.arithmetic [role=status]').textContent"
        ".startsWith('f, step 2, unit 0: 0.0000.')"
    )
    assert tab.evaluate("document.activeElement.textContent") == "Shut the forget gate of unit 0"
    tab.get_by_role("button", name="Start the tour").focus()
    for _ in range(3):
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.textContent").startswith("Next")
    assert tab.locator(".guide .count").text_content() == "3 of 6"


@pytest.mark.slow
def test_reduced_motion_is_obeyed(open_page: OpenPage) -> None:
    tab = open_page(ur.trace(ur.RNN(2, 3), torch.randn(3, 2)))
    durations = "(all) => all.map((one) => getComputedStyle(one).transitionDuration)"
    moving = tab.locator(".n i, svg.cell .line").evaluate_all(durations)
    assert set(moving) == {"0s"}

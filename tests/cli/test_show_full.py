"""What ``unrolled show`` prints: nothing is left out without a word, and every line is right by hand."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from torch import nn

import unrolled as ur
from helpers.by_hand import is_right
from unrolled.cli import example, main, terminal
from unrolled.cli.arguments import new_console
from unrolled.tracing.explain import format_number
from unrolled.tracing.trace import Trace

NUMBER = r"-?\d+\.\d{4}(?![\d.])|-?\d\.\d{3}e[+-]\d+|nan|-?inf\b"
OMITTED = "Use --full"


def printed(trace: Trace, width: int = 80, **options: Any) -> str:
    console = new_console()
    console.file, console.width = io.StringIO(), width
    terminal.print_trace(console, trace, **options)
    return console.file.getvalue()


def example_trace(cell: str, **options: Any) -> Trace:
    return ur.trace(*example.example(getattr(ur.cells, cell), None, 0, options))


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"\n\n(?=\S)", text.split(f"\n{heading}", 1)[1])[0]


def arithmetic_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """The step, name and text of each line of arithmetic, with what was wrapped put together again."""
    step, name, line = -1, "", ""
    for row in [*section(text, "How the numbers are computed\n").splitlines(), "  end"]:
        if found := re.match(r"    (?!more terms)(\w+(?: \w+)?(?:\[\d+\])?): (.*)", row):
            if line:
                yield step, name, line
            name, line = found[1], found[2].strip()
        elif row.startswith("    ") and line:
            line += f" {row.strip()}"
        else:
            if line:
                yield step, name, line
            line = ""
            step = int(re.match(r"  Step (\d+)", row)[1]) if row.startswith("  Step") else step


def check_arithmetic(trace: Trace, text: str) -> int:
    """Recompute each line of arithmetic from its printed digits. Returns the number of lines."""
    part, count = trace.layers[0], 0
    for step, name, line in arithmetic_lines(text):
        quantities = {other: part[other][step, 0].flatten().tolist() for other in part.names}
        assert is_right(line, quantities) is not False, (name, line)
        result = float(line.rpartition(" ")[2].replace("−", "-"))
        quantity = quantities[name.split(" ")[0].split("[")[0]]
        assert any(result == pytest.approx(value, abs=5.1e-5, rel=1e-3) for value in quantity)
        count += 1
    return count


def check_numbers(trace: Trace, text: str) -> None:
    """Check that each number of the trace and its parameters is printed, in order."""
    parameters = [format_number(v) for p in trace.recurrent.parameters() for v in p.flatten().tolist()]
    assert re.findall(NUMBER, section(text, "Parameters\n")) == parameters
    blocks = re.findall(r"\nStep \d+[^\n]*\n((?:.+\n)+)", text)
    positions = [(part, step) for part in trace.layers for step in range(len(part.input))]
    assert len(blocks) == len(positions)
    for (part, step), block in zip(positions, blocks, strict=True):
        tensors = [part.input[step, 0], *(part[name][step, 0] for name in part.names)]
        assert re.findall(NUMBER, block) == [format_number(v) for t in tensors for v in t.flatten().tolist()]


@pytest.mark.parametrize("width", [80, *(pytest.param(w, marks=pytest.mark.slow) for w in (40, 120))])
def test_the_whole_lstm_is_shown(width: int) -> None:
    trace = example_trace("LSTM")
    text = printed(trace, width)
    assert check_arithmetic(trace, text) == 2 * (2 * 4 + 6)
    assert max(map(cell_len, text.splitlines())) <= width
    if width > 40:
        check_numbers(trace, text)
    text = printed(trace, width, full=True)
    check_numbers(trace, text)
    assert check_arithmetic(trace, text) == 4 * 3 * (2 * 4 + 6)
    assert OMITTED not in text
    assert "…" not in text
    for gate in "ifgo":
        assert len(re.findall(rf"^ +{gate}\[\d\]  +\[", section(text, "Parameters\n"), re.M)) == 2 * 3
    assert max(map(cell_len, text.splitlines())) <= width


def test_a_wide_layer() -> None:
    layer, x = nn.LSTM(40, 24), torch.randn(9, 40)
    trace = ur.trace(layer, x)
    text = printed(trace)
    assert check_arithmetic(trace, text) == 2 * 14
    assert "(32 more terms: " in text
    for line in (
        "Weights are left out. Use --full to see them all.",
        "5 of 9 steps hidden; use --steps all to see them.",
        "Numbers are left out. Use --full to see them all.",
        "Sums show their 8 largest terms. Use --full to see all terms.",
        "Only unit 0 in 2 steps. Use --full to see all units and steps.",
    ):
        assert re.sub(r"\s+", " ", text).count(line) == 1, line
    forget = trace.recurrent.weight_ih_l0[24:48].detach()
    numbers = f"min {forget.min():.4f}, mean {forget.mean():.4f}, max {forget.max():.4f}"
    assert re.search(rf"^    f  {numbers}", text, re.M)
    h = trace["h"][0, 0]
    assert f"24 numbers: min {h.min():.4f}, mean {h.mean():.4f}, max {h.max():.4f}" in text
    trace = ur.trace(layer, x[:1])
    full = printed(trace, full=True)
    assert OMITTED not in full
    assert "hidden; use" not in full
    check_numbers(trace, full)


def test_saturated_and_missing_numbers() -> None:
    layer = nn.LSTM(3, 20)
    with torch.no_grad():
        layer.bias_ih_l0[20:35] = -12  # 15 of 20 forget gates are shut
        layer.bias_ih_l0[0] = torch.nan
    step = " ".join(printed(ur.trace(layer, torch.randn(1, 3))).split("\nStep 0\n")[1].split())
    assert re.search(
        r"old c is kept \[\S+ [^]]*\] 20 numbers: min \S+, mean \S+, max \S+, 75 % saturated", step
    )
    assert re.search(r"g is written \[nan, [^]]*\] 20 numbers: [^%]* 0 % saturated, 1 NaN or infinite", step)


def test_the_worst_finding_comes_first() -> None:
    layer, x = example.example(ur.cells.LSTM, None, 0, {})
    text = printed(ur.trace(layer, x))
    assert text.splitlines()[1] == "No problem found. Use --full to see what was checked."
    assert "Fine: all numbers are finite, " in printed(ur.trace(layer, x), full=True)
    assert re.search(r" [a-z] \[", text)
    assert not re.search(r"\w[ifgo] \[", text)  # a gate is apart from the description before it
    with torch.no_grad():
        layer.bias_ih_l0[4] = -12
        layer.bias_ih_l0[9] = 15
    trace = ur.trace(layer, x)
    report = trace.health()
    assert len(report) > 1
    text = printed(trace, 200)
    assert text.splitlines()[1] == f"Warning: {report[0].message}"
    assert text.splitlines()[2].startswith(f"Use --full to see {len(report) - 1} other finding")
    full = printed(trace, 200, full=True)
    assert [full.splitlines()[1 + k] for k in range(len(report))] == [f"Warning: {f}" for f in report]
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = torch.nan
    assert re.search(r"^Error: .*(NaN|not finite)", printed(ur.trace(layer, x), 200), re.M)


@pytest.mark.slow
def test_several_layers_and_directions() -> None:
    trace = ur.trace(nn.GRU(3, 18, 2, bidirectional=True), torch.randn(2, 3))
    text = printed(trace)
    assert "Only unit 0 in 2 steps of layer 0, forward." in text
    text = printed(trace, full=True)
    assert OMITTED not in text
    check_numbers(trace, text)
    elements = sum(part[name].shape[2] for part in trace.layers for name in part.names)
    assert len(list(arithmetic_lines(text))) == 2 * elements


def test_chosen_digits(capsys: Any) -> None:
    assert main.main(["show", "--digits", "2", "--steps", "0"]) == 0
    out = capsys.readouterr()[0]
    assert "[0.25, 0.79, -0.05]" in out
    lines = [line for _, _, line in arithmetic_lines(out)]
    assert lines[0] == "0.54·1 − 0.11·1 − 0.56 = −0.13"
    assert all(is_right(line) for line in lines)
    assert main.main(["show", "--digits", "exact", "--cell", "lstm", "--full"]) == 0
    out = capsys.readouterr()[0]
    trace = example_trace("LSTM")
    shown = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", out)}
    for name in trace.names:
        exact = {float(format_number(value, None, torch.float32)) for value in trace[name].flatten().tolist()}
        assert torch.equal(torch.tensor(sorted(exact)), trace[name].flatten().unique())
        assert exact <= shown
    for step, name, line in arithmetic_lines(out):
        assert is_right(line) is not False, (step, name, line)
    assert "≈" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--full", "--json"), "--full can't be combined with --json"),
        (("--full", "--html", "a.html"), "--full can't be combined with --html"),
        (("--digits", "3", "--json"), "--digits can't be combined with --json"),
        (("--digits", "0"), "expected a number from 1 to 15 or exact, got '0'"),
        (("--digits", "all"), "expected a number from 1 to 15 or exact, got 'all'"),
    ],
)
def test_options_without_effect(options: tuple[str, ...], message: str, capsys: Any) -> None:
    assert main.main(["show", *options]) == 2
    assert message in capsys.readouterr()[1]


def test_the_example_remembers_its_input() -> None:
    trace = example_trace("LSTM")
    assert trace["x"][:, 0].tolist() == [[1, 0.5], [-1, 2], [0.5, -1.5], [0, 0]]
    for parameter in trace.recurrent.parameters():
        torch.testing.assert_close(parameter * 100, (parameter * 100).round(), rtol=0, atol=1e-5)
    assert example_trace("RNN")["x"][:, 0].tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("cell", sorted(ur.cells.__all__))
def test_every_cell_is_shown_in_full(cell: str) -> None:
    trace = example_trace(cell)
    for width in (40, 80, 120):
        text = printed(trace, width, full=True)
        assert OMITTED not in text
        assert "…" not in text
        assert max(map(cell_len, text.splitlines())) <= width
        check_numbers(trace, text)
    elements = sum(trace[name].shape[2:].numel() for name in trace.names)
    assert check_arithmetic(trace, text) == 4 * elements
    check_arithmetic(trace, printed(trace))

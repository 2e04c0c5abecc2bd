"""``unrolled show --watch`` in a pseudo-terminal: it shows the numbers of the trace, and the keys work."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.terminal import ALTERNATE, Terminal
from unrolled import cli
from unrolled.cli import example, main, stepper
from unrolled.cli.arguments import TORCH_CELLS
from unrolled.tracing.color_scales import ColorScales

COMMAND = (sys.executable, "-m", "unrolled", "show")
RIGHT, LEFT, UP, DOWN, HOME, END, SHIFT_TAB = (f"\x1b[{letter}" for letter in "CDABHFZ")
KEYS = "q quit  ←→ step  ↑↓ quantity  [ ] unit  space play  g/G first/last"


def rows_of(part: Any) -> list[tuple[str, str, int, int]]:
    """Return label, quantity, first element and size of each row of the screen: a row for each gate."""
    rows = [("x", "x", 0, part.input.shape[-1])]
    for name in part.names:
        names, size = part.row_names, part[name].shape[-1]
        if names.is_split(name):
            rows += [
                (f"{name} {block.gate}", name, block.rows.start, len(block.rows))
                for block in names.blocks[name]
            ]
        else:
            rows.append((name, name, 0, size))
    return rows


def shows(part: Any, step: int, label: str, unit: int) -> Callable[[list[str]], bool]:
    """Return a check: the screen shows this time step, with this number marked and explained."""
    name, first = next((name, first) for row, name, first, _ in rows_of(part) if row == label)
    value = f"[{part[name][step, 0, first + unit]:.4f}]"

    def check(lines: list[str]) -> bool:
        if not lines[-1].startswith("q quit") or not re.match(rf"Step {step} ", lines[1]):
            return False
        headings = [k for k, line in enumerate(lines) if line.startswith(f"{label}[{unit}]  ")]
        if not headings or not any(re.match(rf"▸ {label} ", line) and value in line for line in lines):
            return False
        text = " ".join(" ".join(lines[headings[0] + 1 :]).split())
        return text.startswith(
            part.explain(name, step, first + unit) if name in part.values else "input of the"
        )

    return check


def numbers(lines: list[str], label: str) -> list[float]:
    line = next(line for line in lines if re.match(rf"[▸ ] {label} ", line))
    return [float(text) for text in re.findall(r"-?\d+\.\d{4}|nan|-?inf", line)]


@pytest.mark.slow
def test_the_keys_reach_every_number() -> None:
    layer, x = example.example(TORCH_CELLS["lstm"], None, 3, {})
    (part,) = ur.trace(layer, x).layers
    arguments = (*COMMAND, "--cell", "lstm", "--seed", 3, "--watch")
    with Terminal(arguments, 80, 40, COLORTERM="truecolor") as terminal:
        lines = terminal.until(shows(part, 0, "input_sum i", 0))
        assert lines[0] == "LSTM(2, 3, batch_first=True)"
        assert lines[-1] == KEYS
        assert "  input_sum = linear(x, self.weight_ih, self.bias_ih)" in lines, (
            "at least the selected line of the step is shown"
        )
        assert lines[-2].startswith("Colors of input_sum, on its own scale: -")
        terminal.press(UP)
        terminal.until(shows(part, 0, "x", 0))
        colors = re.compile(r"Colors of x: -\d\.\d{4} 0\.0000 \d\.\d{4}  of other quantities: -")
        terminal.until(lambda lines: colors.match(lines[-2]))
        terminal.press(DOWN)
        terminal.until(shows(part, 0, "input_sum i", 0))
        for key, to in ((RIGHT, 1), ("l", 2), ("n", 3), (RIGHT, 3), (LEFT, 2), ("h", 1), ("p", 0), (LEFT, 0),
                        (END, 3), (HOME, 0), ("G", 3), ("g", 0), (RIGHT + RIGHT, 2)):  # fmt: skip
            terminal.press(key)
            lines = terminal.until(shows(part, to, "input_sum i", 0))
            for label, name, first, count in rows_of(part):
                expected = part[name][to, 0, first : first + count].tolist()
                assert numbers(lines, label) == pytest.approx(expected, abs=5.1e-5)
        for key, label, unit in (
            (DOWN, "input_sum f", 0), ("]", "input_sum f", 1), (">", "input_sum f", 2),
            (".", "input_sum f", 2), (DOWN, "input_sum g", 2), ("j", "input_sum o", 2),
            ("[", "input_sum o", 1), ("k", "input_sum g", 1), ("<", "input_sum g", 0),
            (",", "input_sum g", 0), (UP * 9, "x", 0), ("]]]", "x", 1), (DOWN * 20, "h", 1),
        ):  # fmt: skip
            terminal.press(key)
            terminal.until(shows(part, 2, label, unit))
        terminal.press("g ")  # play to the end
        terminal.until(lambda lines: "▶" in lines[1])
        terminal.until(shows(part, 3, "h", 1))
        terminal.until(lambda lines: "▶" not in lines[1])
        terminal.press(" ")  # play again, from the first step
        terminal.until(shows(part, 1, "h", 1))
        terminal.press(" ")
        terminal.until(lambda lines: "●" in lines[1])
        assert "Step 3" not in terminal.lines[1], "pausing keeps the step"
        scales, to = (
            ColorScales.for_console(
                Console(force_terminal=True, color_system="truecolor"), ur.trace(layer, x)
            ),
            int(terminal.lines[1].split()[1]),
        )
        for label, name, first, _ in rows_of(part):
            row = next(k for k, line in enumerate(terminal.lines) if re.match(rf"[▸ ] {label} ", line))
            for unit, text in enumerate(re.finditer(r"-?\d\.\d+", terminal.lines[row])):
                color = scales.of_quantity(part, name).color(part[name][to, 0, first + unit].item())
                background = terminal.screen.buffer[row][text.start()].bg
                assert background == (color or "#default")[1:]
        terminal.resize(60, 12)
        lines = terminal.until(lambda lines: lines[0].startswith("LSTM") and lines[-1].endswith("…"))
        assert any(line.startswith("▸ h ") for line in lines)
        terminal.press("\x1b")
        assert terminal.exit_code() == 0


@pytest.fixture
def deep(tmp_path: Path) -> tuple[tuple[Any, ...], ur.Trace]:
    torch.manual_seed(0)
    model = nn.GRU(3, 40, num_layers=2, bidirectional=True)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    x = numpy.random.default_rng(1).normal(size=(300, 3))
    numpy.save(tmp_path / "x.npy", x)
    arguments = (*COMMAND, tmp_path / "w.pt", "--input", tmp_path / "x.npy", "--watch")
    return arguments, ur.trace(model, torch.tensor(x, dtype=torch.float32))


@pytest.mark.slow
def test_scrolling_in_a_small_window(deep: Any) -> None:
    arguments, trace = deep
    with Terminal(arguments, 50, 9, NO_COLOR="1") as terminal:
        _, (label, name, first, _), *_ = rows_of(trace.layer(0))
        terminal.until(shows(trace.layer(0), 0, label, 0))
        terminal.press("G" + "]" * 30)
        lines = terminal.until(lambda lines: any(line.startswith(f"{label}[30]") for line in lines))
        assert f"[{trace[name][299, 0, first + 30]:.4f}]" in "".join(lines)
        assert lines[2].split()[-1] == "30", "the units scroll"
        assert {cell.bg for row in terminal.screen.buffer.values() for cell in row.values()} == {"default"}
        for key, layer, direction in (("\t", 0, "backward"), ("\t", 1, "forward"), ("\t", 1, "backward"),
                                      ("\t", 0, "forward"), (SHIFT_TAB, 1, "backward")):  # fmt: skip
            terminal.press(key)
            marked = f"[{trace.layer(layer, direction)[name][299, 0, first + 30]:.4f}]"
            terminal.until(lambda lines, marked=marked: any(marked in line for line in lines))
            assert lines[-1].startswith("q quit")
        terminal.press(UP * 2)  # up from the first quantity: the last one of the previous layer
        last = trace.names[-1]
        marked = f"[{trace.layer(1, 'forward')[last][299, 0, 30]:.4f}]"
        terminal.until(lambda lines: any(marked in line and line.startswith(f"▸ {last} ") for line in lines))
        for rows in (5, 3, 1):
            terminal.resize(20, rows)
            terminal.until(lambda lines: lines[-1].startswith("q quit"))
            if rows > 4:
                terminal.until(
                    lambda lines: lines[0].startswith("GRU") and lines[-2].startswith(f"▸ {last} ")
                )
        terminal.resize(80, 24)
        terminal.until(lambda lines: lines[-1] == KEYS.replace("unit", "unit  Tab layer"))
        terminal.press("\x03")  # Ctrl-C
        assert terminal.exit_code() == 0


@pytest.mark.slow
def test_selected_steps_of_a_custom_cell(tmp_path: Path) -> None:
    (tmp_path / "cells.py").write_text(
        "import torch, unrolled as ur\n\n\n"
        "class Kinds(ur.Cell):\n"
        "    weight = ur.Param('hidden', 'input')\n\n"
        "    def step(self, x, h):\n"
        "        mean = x.mean(-1)\n"
        "        turned = torch.complex(h, x @ self.weight.T)\n"
        "        h = turned.abs() / mean.unsqueeze(-1).sub(0.5)\n"
        "        return h\n"
    )
    arguments = ("--cell", f"{tmp_path}/cells.py:Kinds", "--steps", "1,3", "--watch", "--labels", "a bc")
    with Terminal((*COMMAND, *arguments)) as terminal:
        lines = terminal.until(lambda lines: lines[-1] == KEYS)
        assert lines[1].startswith("Step 1 ' '  1 ")
        assert re.search(r"▸ mean +\[0\.5000\]", "\n".join(lines))
        assert "mean" in lines, "a single number has no index"
        assert numbers(lines, "h") == [float("inf")] * 3
        bold = [line for k, line in enumerate(lines) if terminal.screen.buffer[k][2].bold]
        assert bold[-1] == "  mean = x.mean(-1)"
        assert "  return h" in lines, "the whole step is shown, with one line in bold"
        terminal.press("l")
        lines = terminal.until(lambda lines: lines[1].startswith("Step 3 'c'  1 "))
        assert lines[1].endswith("● 3")
        row = next(k for k, line in enumerate(lines) if line.startswith("  h "))
        assert {terminal.screen.buffer[row][k].bg for k in range(80)} > {"default"}
        terminal.press("q")
        assert terminal.exit_code() == 0


def test_the_input_is_shown_beside_an_x_that_the_step_computes() -> None:
    class Doubled(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            x = x * 2
            return torch.tanh(linear(x, self.weight) + h)

    given = torch.randn(3, 2)
    view = stepper._View(ur.trace(ur.Recurrent(Doubled, 2, 3), given), range(3), None)
    view.do("next")
    lines = [line.plain for line in view.lines(80, 24)]
    assert numbers(lines, r"x \(input\)") == pytest.approx(given[1].tolist(), abs=5.1e-5)
    assert numbers(lines, r"x(?! \(input)") == pytest.approx((2 * given[1]).tolist(), abs=1.1e-4)
    view.do("up")
    assert "  input of the layer" in [line.plain for line in view.lines(80, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=str)
def test_signals_restore_the_terminal(number: signal.Signals) -> None:
    with Terminal((*COMMAND, "--watch")) as terminal:
        terminal.until(lambda lines: lines[-1] == KEYS)
        terminal.send(number)
        assert terminal.exit_code() == (0 if number == signal.SIGINT else -number)
        assert "Traceback" not in "".join(terminal.lines)


@pytest.mark.slow
def test_ctrl_z_pauses_and_fg_resumes() -> None:
    job = 'set -m; "$@"; echo paused; read line; fg; echo ended with $?'
    with Terminal(("/bin/sh", "-c", job, "sh", *COMMAND, "--watch")) as terminal:
        terminal.until(lambda lines: lines[-1] == KEYS)
        terminal.press("l")
        terminal.until(lambda lines: lines[1].startswith("Step 1"))
        terminal.press("\x1a")  # Ctrl-Z
        terminal.until(lambda lines: "paused" in lines)
        assert ALTERNATE not in terminal.screen.mode
        terminal.press("\n")
        terminal.until(lambda lines: lines[1].startswith("Step 1") and lines[-1] == KEYS)
        terminal.press("l")
        terminal.until(lambda lines: lines[1].startswith("Step 2"))
        terminal.press("q")
        terminal.until(lambda lines: "ended with 0" in lines)
        assert terminal.exit_code() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch"], "--watch needs an interactive terminal"),
        (["--watch", "--json"], "argument --json: not allowed with argument --watch"),
    ],
    ids=str,
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main.main(["show", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("terminal", "message"),
    [
        ("dumb", "--watch needs an interactive terminal"),
        ("xterm", "--watch needs an input sequence: add --in"),
    ],
)
def test_dumb_terminal_or_missing_input(
    deep: Any, terminal: str, message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("TERM", terminal)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main.main(["show", str(deep[0][4]), "--watch"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_missing_package_gives_the_install_command(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit.input", None)
    monkeypatch.delitem(sys.modules, "unrolled.cli.stepper", raising=False)
    monkeypatch.delattr(cli, "stepper", raising=False)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main.main(["show", "--watch"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "unrolled: --watch needs prompt_toolkit: pip install prompt_toolkit\n")

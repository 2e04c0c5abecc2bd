"""The colours of numbers in the terminal: what they say, and that they change nothing else."""

from __future__ import annotations

import io
import math
import os
import re
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from torch import nn

import unrolled as ur
from helpers import processes
from helpers.terminal import Terminal
from unrolled.cli import terminal
from unrolled.tracing.color_scales import ranges
from unrolled.tracing.colors import INFINITY, NAN, NEGATIVE, POSITIVE, Scale

COMMAND = (sys.executable, "-m", "unrolled", "show")
NUMBER = re.compile(r"-?\d+\.\d{4}|-?\d\.\d{3}e[+-]\d\d|nan|-?inf")


def printed(trace: ur.Trace, width: int = 80, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, **options)
    terminal.say(console, trace)
    return console.file.getvalue()


def backgrounds(ansi: str) -> list[tuple[str, str | None]]:
    """Every number of a text, and the background that all of its characters have."""
    found = []
    for line in ansi.splitlines():
        text = Text.from_ansi(line)
        for number in NUMBER.finditer(text.plain):
            colors = set()
            for place in range(number.start(), number.end()):
                style = text.get_style_at_offset(Console(), place)
                colors.add(style.bgcolor.triplet.hex if style.bgcolor else None)
            assert len(colors) == 1, line
            found.append((number[0], colors.pop()))
    return found


@pytest.fixture(scope="module")
def trace() -> ur.Trace:
    torch.manual_seed(0)
    layer = nn.LSTM(2, 3, num_layers=2, bidirectional=True)
    with torch.no_grad():
        layer.weight_ih_l0[0, 0] = 0
        layer.bias_hh_l0[4], layer.bias_hh_l0[10] = torch.inf, torch.nan
    return ur.trace(layer, torch.tensor([[0.0, 3.0], [-4.0, 1e-3], [1.0, 2.0]]))


def test_colours_add_a_legend_and_nothing_else(trace: ur.Trace) -> None:
    plain = printed(trace)
    ansi = printed(trace, force_terminal=True, color_system="truecolor")
    lines = [Text.from_ansi(line).plain for line in ansi.splitlines()]
    legends = [line for line in lines if line.startswith("  Colours")]
    assert [line.split(":")[0].removeprefix("  Colours") for line in legends] == [
        "", " of the input", " of input_sum", " of hidden_sum", " of all else that is computed",
    ]  # fmt: skip
    assert [line for line in lines if line not in legends] == plain.splitlines()
    assert "\x1b[" not in plain


def test_a_terminal_of_256_colours() -> None:
    plain = processes.run(*COMMAND[1:], env={**os.environ, "COLUMNS": "80"})
    with Terminal(COMMAND, 80, 90) as terminal:
        lines = terminal.until(lambda lines: any("largest difference" in line for line in lines))
        assert terminal.end() == 0
        kept = [line for line in lines if not line.startswith("  Colours")]
        assert len(kept) < len(lines)
        assert kept[: plain.stdout.count("\n")] == [line.rstrip() for line in plain.stdout.splitlines()]
        found = {cell.bg for row in terminal.screen.buffer.values() for cell in row.values()}
        assert {"005faf", "af0000", "default"} < found
        for color in found - {"default"}:  # of no other hue than these ends
            red, green, blue = bytes.fromhex(color)
            assert red > green == blue or blue > green >= red, color


@pytest.mark.parametrize("options", [{"color_system": "standard"}, {"no_color": True}], ids=str)
def test_without_enough_colours_there_are_none(trace: ur.Trace, options: dict[str, object]) -> None:
    given = {"force_terminal": True, "color_system": "truecolor", **options}
    ansi = printed(trace, **given)
    assert "Colours" not in ansi
    assert all(background is None for _, background in backgrounds(ansi))


def test_what_the_colours_say(trace: ur.Trace) -> None:
    ansi = printed(trace, 200, force_terminal=True, color_system="truecolor")  # wide enough for all numbers
    parameters, steps = ansi.split("One step")[0], "Step 0" + ansi.split("Step 0", 1)[1].split("Where a")[0]
    largest = {
        "parameters": max(
            float(p.detach().abs().nan_to_num(0, 0, 0).max()) for p in trace.module.parameters()
        ),
        "x": 4.0,
    }
    for part in trace.layers:
        for name, values in part.values.items():
            kind = (
                name if name.endswith("_sum") else "computed"
            )  # sums of four gates have scales of their own
            largest[kind] = max(largest.get(kind, 0.0), float(values.abs().nan_to_num(0, 0, 0).max()))
    lines, upper = dict.fromkeys(set(largest) - {"parameters"}, ""), False
    for line in steps.splitlines():
        upper = "(layer 1" in line or (upper and "(layer 0" not in line)
        name = line[2:].partition(" ")[0] if line.startswith("  ") else ""
        kind = name if name.endswith("_sum") or (name == "x" and not upper) else "computed"
        lines[kind] += f"{line}\n"
    seen: dict[str, int] = dict.fromkeys(("red", "blue", "none", NAN, INFINITY), 0)
    for kind, text in {"parameters": parameters, **lines}.items():
        found = [(float(number), color) for number, color in backgrounds(text)]
        strengths = []
        for value, color in found:
            if not math.isfinite(value):
                assert color == (NAN if math.isnan(value) else INFINITY)
                seen[color] += 1
            elif color is None:
                assert abs(value) < 0.051 * largest[kind]
                seen["none"] += 1
            else:
                red, _, blue = bytes.fromhex(color[1:])
                assert (red > blue) == (value > 0), (value, color)
                seen["red" if value > 0 else "blue"] += 1
                strengths.append((abs(value), value > 0, red if value < 0 else blue))
                assert abs(value) > 0.049 * largest[kind]
                if abs(value) > largest[kind] - 5.1e-5:
                    assert color == (POSITIVE if value > 0 else NEGATIVE)
                elif abs(value) < 0.98 * largest[kind]:
                    assert color not in (POSITIVE, NEGATIVE)
        for sign in (True, False):  # the larger, the further from the pale end
            other = [channel for _, positive, channel in sorted(strengths) if positive is sign]
            assert other == sorted(other, reverse=True)
        assert max(strengths)[0] == pytest.approx(largest[kind], abs=1e-4), "one scale, which reaches its end"
    assert all(seen.values()), seen


@pytest.mark.parametrize("scale", [Scale(1.0), Scale(0.0), Scale(1.0, coarse=True)])
def test_text_stands_out_on_every_colour(scale: Scale) -> None:
    def luminance(channels: bytes) -> float:  # WCAG 2.2, relative luminance
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4
                  for c in channels]  # fmt: skip
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for value in [*torch.linspace(-1.5, 1.5, 301).tolist(), math.nan, math.inf, complex(1, math.inf)]:
        style = scale.style(value)
        if style.bgcolor:
            light, dark = sorted(luminance(bytes(c.triplet)) for c in (style.color, style.bgcolor))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5, value
    assert scale.color(0) is scale.color(1 + 2j) is None


def test_a_scale_of_nothing_real() -> None:
    assert Scale.of([]) == Scale.of([torch.empty(0), torch.tensor([1 + 2j])]) == Scale(0.0)
    assert Scale.of([torch.tensor([True]), torch.tensor([-3]), torch.tensor(torch.inf)]) == Scale(3.0)


class Growing(ur.Cell):
    """A state that counts far beyond its gate, and a sum for two gates."""

    state = ("h", "memory")
    weight = ur.Param("2*hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor, memory: torch.Tensor) -> Any:
        both = torch.nn.functional.linear(x, self.weight)
        gate, other = torch.sigmoid(both).chunk(2, -1)
        memory = memory + gate * other
        h = gate * torch.tanh(memory)
        return h, memory


def test_what_would_leave_the_others_pale_has_a_scale_of_its_own() -> None:
    layer = ur.Recurrent(Growing, 2, 3)
    torch.nn.init.zeros_(layer.weight_l0)
    t = ur.trace(layer, torch.randn(9, 2))
    shared, own = ranges(t.layers, 9)
    assert set(own) == {"both", "memory"}
    assert own["memory"] == float(t["memory"].max()) == 2.25
    assert shared == max(float(t[name].abs().max()) for name in ("gate", "other", "h"))
    shared, own = ranges(t.layers, 1)  # at the first step it is no larger than the others by far
    assert set(own) == {"both"}
    assert shared == 0.5
    still = ur.trace(ur.RNN(2, 3), torch.zeros(2, 2))
    for value in still.layers[0].values.values():
        value.zero_()
    assert ranges(still.layers, 2) == (0.0, {})

"""Colors of numbers in the terminal: the scales, the contrast, and that the text is unchanged."""

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
from unrolled.tracing.color_scales import color_ranges
from unrolled.tracing.colors import INFINITY, NAN, NEGATIVE, POSITIVE, ColorScale

COMMAND = (sys.executable, "-m", "unrolled", "show")
NUMBER = re.compile(r"-?\d+\.\d{4}|-?\d\.\d{3}e[+-]\d\d|\bnan\b|-?\binf\b")


def print_to_text(trace: ur.Trace, width: int = 80, full: bool = False, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, **options)
    terminal.print_trace(console, trace, full=full)
    return console.file.getvalue()


def backgrounds(ansi: str) -> list[tuple[str, str | None]]:
    """Return every number of a text with its background color, which all of its characters must have."""
    numbers = []
    for line in ansi.splitlines():
        text = Text.from_ansi(line)
        for number in NUMBER.finditer(text.plain):
            colors = set()
            for position in range(number.start(), number.end()):
                style = text.get_style_at_offset(Console(), position)
                colors.add(style.bgcolor.triplet.hex if style.bgcolor else None)
            assert len(colors) == 1, line
            numbers.append((number[0], colors.pop()))
    return numbers


@pytest.fixture(scope="module")
def trace() -> ur.Trace:
    torch.manual_seed(0)
    layer = nn.LSTM(2, 3, num_layers=2, bidirectional=True)
    with torch.no_grad():
        layer.weight_ih_l0[0, 0] = 0
        layer.bias_hh_l0[4], layer.bias_hh_l0[10] = torch.inf, torch.nan
    return ur.trace(layer, torch.tensor([[0.0, 3.0], [-4.0, 1e-3], [1.0, 2.0]]))


def test_colors_only_add_legends(trace: ur.Trace) -> None:
    plain = print_to_text(trace)
    ansi = print_to_text(trace, force_terminal=True, color_system="truecolor")
    lines = [Text.from_ansi(line).plain for line in ansi.splitlines()]
    legends = [line for line in lines if line.startswith("  Colors")]
    assert [line.split(":")[0].removeprefix("  Colors") for line in legends] == [
        "", " of the input", " of input_sum", " of hidden_sum", " of all other quantities",
    ]  # fmt: skip
    assert [line for line in lines if line not in legends] == plain.splitlines()
    assert "\x1b[" not in plain


@pytest.mark.slow
def test_terminal_with_256_colors() -> None:
    plain = processes.run(*COMMAND[1:], env={**os.environ, "COLUMNS": "80"})
    with Terminal(COMMAND, 80, 90) as terminal:
        lines = terminal.until(lambda lines: any("largest difference" in line for line in lines))
        assert terminal.exit_code() == 0
        without_legends = [line for line in lines if not line.startswith("  Colors")]
        assert len(without_legends) < len(lines)
        assert without_legends[: plain.stdout.count("\n")] == [
            line.rstrip() for line in plain.stdout.splitlines()
        ]
        colors = {cell.bg for row in terminal.screen.buffer.values() for cell in row.values()}
        assert {"005faf", "af0000", "default"} < colors
        for color in colors - {"default"}:  # only red and blue hues
            red, green, blue = bytes.fromhex(color)
            assert red > green == blue or blue > green >= red, color


@pytest.mark.parametrize("options", [{"color_system": "standard"}, {"no_color": True}], ids=str)
def test_no_colors_below_256(trace: ur.Trace, options: dict[str, object]) -> None:
    console_options = {"force_terminal": True, "color_system": "truecolor", **options}
    ansi = print_to_text(trace, **console_options)
    assert "Colors" not in ansi
    assert all(background is None for _, background in backgrounds(ansi))


def test_colors_match_the_numbers(trace: ur.Trace) -> None:
    # The console is wide enough for all numbers.
    ansi = print_to_text(trace, 200, force_terminal=True, color_system="truecolor", full=True)
    parameters, steps = (
        ansi.split("Parameters", 1)[1].split("One step")[0],  # the text before has numbers, too
        "Step 0" + ansi.split("Step 0", 1)[1].split("How the numbers")[0],
    )
    largest = {
        "parameters": max(
            float(p.detach().abs().nan_to_num(0, 0, 0).max()) for p in trace.module.parameters()
        ),
        "x": 4.0,
    }
    for part in trace.layers:
        for name, values in part.values.items():
            # The pre-activations of all gates have their own scales.
            kind = name if name.endswith("_sum") else "computed"
            largest[kind] = max(largest.get(kind, 0.0), float(values.abs().nan_to_num(0, 0, 0).max()))
    lines, upper, name = dict.fromkeys(set(largest) - {"parameters"}, ""), False, ""
    for line in steps.splitlines():
        upper = "(layer 1" in line or (upper and "(layer 0" not in line)
        if not line.startswith("    "):  # else another gate of the same sum
            name = line[2:].partition(" ")[0] if line.startswith("  ") else ""
        kind = name if name.endswith("_sum") or (name == "x" and not upper) else "computed"
        lines[kind] += f"{line}\n"
    seen: dict[str, int] = dict.fromkeys(("red", "blue", "none", NAN, INFINITY), 0)
    for kind, text in {"parameters": parameters, **lines}.items():
        numbers = [(float(number), color) for number, color in backgrounds(text)]
        strengths = []
        for value, color in numbers:
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
        for sign in (True, False):  # larger numbers have stronger colors
            channels = [channel for _, positive, channel in sorted(strengths) if positive is sign]
            assert channels == sorted(channels, reverse=True)
        assert max(strengths)[0] == pytest.approx(largest[kind], abs=1e-4), (
            "the largest number must have the full color"
        )
    assert all(seen.values()), seen


@pytest.mark.parametrize("scale", [ColorScale(1.0), ColorScale(0.0), ColorScale(1.0, coarse=True)])
def test_text_contrast_on_every_color(scale: ColorScale) -> None:
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


def test_scale_of_unusual_tensors() -> None:
    assert ColorScale.of([]) == ColorScale.of([torch.empty(0), torch.tensor([1 + 2j])]) == ColorScale(0.0)
    assert ColorScale.of([torch.tensor([True]), torch.tensor([-3]), torch.tensor(torch.inf)]) == ColorScale(
        3.0
    )


class LargeMemory(ur.Cell):
    """A state that grows far beyond its gate, and the pre-activations of two gates together."""

    state = ("h", "memory")
    weight = ur.Param("2*hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor, memory: torch.Tensor) -> Any:
        both = torch.nn.functional.linear(x, self.weight)
        gate, other = torch.sigmoid(both).chunk(2, -1)
        memory = memory + gate * other
        h = gate * torch.tanh(memory)
        return h, memory


def test_outliers_have_their_own_scale() -> None:
    layer = ur.Recurrent(LargeMemory, 2, 3)
    torch.nn.init.zeros_(layer.weight_l0)
    t = ur.trace(layer, torch.randn(9, 2))
    shared, own = color_ranges(t.layers, 9)
    assert set(own) == {"both", "memory"}
    assert own["memory"] == float(t["memory"].max()) == 2.25
    assert shared == max(float(t[name].abs().max()) for name in ("gate", "other", "h"))
    shared, own = color_ranges(t.layers, 1)  # after one step, memory is not much larger than the others
    assert set(own) == {"both"}
    assert shared == 0.5
    still = ur.trace(ur.RNN(2, 3), torch.zeros(2, 2))
    for value in still.layers[0].values.values():
        value.zero_()
    assert color_ranges(still.layers, 2) == (0.0, {})

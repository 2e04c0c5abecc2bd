"""``unrolled show --watch``: step through a trace in the terminal with the arrow keys."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence

import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleDimensions, Group
from rich.control import Control
from rich.screen import Screen
from rich.style import Style
from rich.text import Text
from torch import Tensor

from unrolled.cli.terminal import descriptions, element_label, position_label, step_label
from unrolled.equations.source import step_source
from unrolled.tracing.color_scales import ColorScales
from unrolled.tracing.explain import DIGITS, format_number
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.row_names import RowBlock
from unrolled.tracing.trace import Trace

try:
    from prompt_toolkit.input import Input, create_input
except ImportError as error:
    raise ImportError("--watch needs prompt_toolkit: pip install prompt_toolkit") from error

_PLAY_SECONDS = 0.5  # for each step
_POLL_SECONDS = 0.25  # between reads of the window size; a lone Esc counts as a key after this time
_KEYS = {  # keys of each action, by prompt_toolkit's names
    "previous": "left h p",
    "next": "right l n",
    "first": "home g",
    "last": "end G",
    "up": "up k",
    "down": "down j",
    "lower unit": "[ < ,",
    "higher unit": "] > .",
    "next layer": "c-i pagedown",
    "previous layer": "s-tab pageup",
    "quit": "q Q escape c-c c-d",
    "tick": "tick",  # not a key, but the timer while playing
}
_ACTIONS = {key: action for action, keys in _KEYS.items() for key in keys.split()} | {" ": "play"}
_SIGNALS: dict[str, signal.Signals] = {}  # signals that end or pause the program, by key or by name
if sys.platform != "win32":
    _NAMED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCONT)
    _SIGNALS = {"c-z": signal.SIGTSTP} | {number.name: number for number in _NAMED}


def step_through(
    console: Console,
    trace: Trace,
    steps: Sequence[int],
    labels: Sequence[str] | None = None,
    digits: int | None = DIGITS,
) -> None:
    """Step through the first sequence of a trace until the user quits.

    Args:
        console: The console of an interactive terminal. Its state is restored afterwards.
        trace: The trace.
        steps: The time steps to show, at least one.
        labels: A label for each time step of the sequence, such as the characters of a text.
        digits: Number of decimal places; None for as many as the numbers have.
    """
    view = _View(trace, steps, ColorScales.for_console(console, trace), labels, digits)
    while received := asyncio.run(_run(console, view, create_input())):
        # The terminal is restored, so let the signal have its default effect. Ctrl-Z goes to the whole
        # process group: a parent that waits for this process, such as make, must pause as well.
        os.kill(0 if received is _SIGNALS["c-z"] else os.getpid(), received)


async def _run(console: Console, view: _View, source: Input) -> signal.Signals | None:
    """Draw and handle keys until the user quits or a signal arrives; return the signal, if any."""
    keys = asyncio.Queue[str]()

    def read() -> None:
        for press in source.read_keys():
            keys.put_nowait(press.key)

    for name, number in {**_SIGNALS, "c-c": signal.SIGINT}.items() if _SIGNALS else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, keys.put_nowait, name)
    drawn_size: os.terminal_size | None = None
    with console.screen(), source.raw_mode(), source.attach(read):
        while not source.closed:
            size = os.get_terminal_size(sys.stdout.fileno())
            if drawn_size != size and keys.empty():
                console.size = ConsoleDimensions(
                    size.columns or 80, size.lines or 24
                )  # some terminals report zero
                console.control(Control.home())
                console.print(Screen(Group(*view.lines(*console.size))), end="")
                drawn_size = size
            try:
                key = await asyncio.wait_for(keys.get(), _PLAY_SECONDS if view.playing else _POLL_SECONDS)
            except TimeoutError:
                key = "tick" if view.playing else ""
                for press in source.flush_keys():
                    keys.put_nowait(press.key)
            action = _ACTIONS.get(key)
            if action == "quit" or key in _SIGNALS:
                return _SIGNALS.get(key)
            if action:
                view.do(action)
                drawn_size = None
    return None


def _blocks(part: LayerTrace, name: str) -> Sequence[RowBlock]:
    """Return the rows of a quantity that are shown together: those of each gate, or all."""
    if name in part.values and part.row_names.is_split(name):
        return part.row_names.blocks[name]
    return [RowBlock("", range(part[name].shape[2:].numel()), 0)]


def _gate(block: RowBlock) -> str:
    return block.gate or f"{block.rows.start}–{block.rows.stop - 1}"


class _View:
    """The screen: one time step of one layer and direction, with one number explained."""

    def __init__(
        self,
        trace: Trace,
        steps: Sequence[int],
        scales: ColorScales | None,
        labels: Sequence[str] | None = None,
        digits: int | None = DIGITS,
    ) -> None:
        self.playing = False
        self._trace = trace
        self._steps = steps
        self._labels = [step_label(labels, step) for step in steps]
        self._scales = scales
        self._decimals = digits
        self._rows = [
            (part, name, block)
            for part in trace.layers
            for name in (part.input_name, *part.names)
            if name in part.values or part.input.shape[-1]
            if part[name][0, 0].numel()
            for block in _blocks(part, name)
        ]
        self._step_index = 0
        # index of the selected row; at first, the first row that is computed
        self._row = next(k for k, (part, name, _) in enumerate(self._rows) if name in part.values)
        self._unit = 0  # the selected unit; rows with fewer numbers use their last one
        self._first_unit = 0  # the leftmost unit on the screen
        self._digits = len("-0.0000")  # of the widest number so far, so that columns don't move

    def do(self, action: str) -> None:
        """Handle an action: one of `_KEYS`, or ``"play"``."""
        last = len(self._steps) - 1
        if action == "play":
            self.playing = not self.playing and last > 0
            self._step_index = 0 if self.playing and self._step_index == last else self._step_index
        elif action in ("previous", "next", "tick", "first", "last"):
            target = {"previous": self._step_index - 1, "first": 0, "last": last}.get(
                action, self._step_index + 1
            )
            self._step_index = min(max(target, 0), last)
            self.playing = action == "tick" and self._step_index < last
        elif action in ("up", "down"):
            self._row = min(max(self._row + (1 if action == "down" else -1), 0), len(self._rows) - 1)
        elif action in ("lower unit", "higher unit"):
            unit = self._current_unit() + (1 if action == "higher unit" else -1)
            self._unit = min(max(unit, 0), len(self._numbers(self._row)) - 1)
        else:
            self._go_to_layer(1 if action == "next layer" else -1)

    def _go_to_layer(self, offset: int) -> None:
        """Select the same quantity in another layer or direction, cyclically."""
        part, *selected = self._rows[self._row]
        layers = self._trace.layers
        other = layers[(layers.index(part) + offset) % len(layers)]
        rows = self._rows_of(other)
        self._row = next((row for row in rows if [*self._rows[row][1:]] == selected), rows[0])

    def _rows_of(self, part: LayerTrace) -> list[int]:
        return [row for row, (other, *_) in enumerate(self._rows) if other is part]

    def _numbers(self, row: int) -> Tensor:
        part, name, block = self._rows[row]
        return part[name][self._steps[self._step_index], 0].flatten()[block.rows.start : block.rows.stop]

    def _label(self, row: int) -> str:
        """Return the name of a row, with the gate if the quantity has a row for each gate."""
        part, name, block = self._rows[row]
        return f"{name} {_gate(block)}" if len(_blocks(part, name)) > 1 else name

    def _current_unit(self) -> int:
        return min(self._unit, len(self._numbers(self._row)) - 1)

    def lines(self, width: int, height: int) -> list[Text]:
        """Return the lines of the screen, cut to the size of the window. The last one lists the keys."""
        part = self._rows[self._row][0]
        rows, explanation, code = self._rows_of(part), self._explanation(width), self._code()
        room = height - 5  # title, time, units, name of the number and keys are always shown
        visible = max(1, min(len(rows), room - min(len(explanation), 3)))
        top = min(max(self._row - rows[0] - visible // 2, 0), len(rows) - visible)
        spare = room - visible - len(explanation)
        if spare < 0:
            explanation = explanation[: max(0, room - visible)]
            for line in explanation[-1:]:
                line.append(" …")
        gaps = [[Text()] * (spare > count) for count in range(2)]
        above = [
            self._title(part),
            self._time(width),
            *gaps[0],
            *self._table(rows[top : top + visible], width),
        ]
        above += [*gaps[1], self._number_name(), *explanation]
        below = [self._legend(self._scales)] if self._scales and spare > 3 else []
        for code_lines in (code, [line for line in code if line.style == "bold"]):
            if code_lines and len(above) + len(code_lines) + len(below) + 3 <= height:
                above += [Text(), *code_lines]
                break
        lines = above + [Text()] * (height - 1 - len(above) - len(below)) + below
        lines = [*lines[: height - 1], self._keys()]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _title(self, part: LayerTrace) -> Text:
        return Text.assemble((repr(self._trace.module), "bold"), position_label(self._trace, part))

    def _time(self, width: int) -> Text:
        """Return the line with the time step and its position on a time axis."""
        first, last = f"  {self._steps[0]} ", f" {self._steps[-1]}"
        mark = "▶" if self.playing else "●"
        step = f"Step {self._steps[self._step_index]:<{len(last) - 1}}"
        step += f"{self._labels[self._step_index]:<{max(map(len, self._labels))}}"
        room = width - len(step) - len(first) - len(last) - 1
        before = round(self._step_index / max(1, len(self._steps) - 1) * room)
        line = ("━" * before, mark, "─" * (room - before))
        return Text.assemble((step, "bold"), (first, "dim"), *line, (last, "dim"))

    def _table(self, rows: list[int], width: int) -> list[Text]:
        """Return a header with the unit numbers, and a line for each quantity: name, description, numbers."""
        numbers = {row: self._numbers(row) for row in rows}
        texts = (self._format(value, v.dtype) for v in numbers.values() for value in v.tolist())
        self._digits = max(self._digits, *map(len, texts))
        cell = self._digits + 2
        names = 1 + max(cell_len(name) for name in ("unit", *map(self._label, range(len(self._rows)))))
        names = min(names, max(len("unit "), width - 2 - 1 - cell))  # leave room for one number
        words = descriptions(type(self._rows[self._row][0].cell))
        words_width = max(cell_len(words.get(self._rows[row][1], "")) for row in rows) + 2
        most = max(map(len, numbers.values()))
        if 2 + names + 1 + words_width + most * cell > width:  # the numbers need the room
            words, words_width = {}, 0
        fit = max(1, (width - 2 - names - 1 - words_width) // cell)
        unit = self._current_unit()
        self._first_unit = min(max(self._first_unit, unit - fit + 1), unit, max(0, most - fit))
        units = range(self._first_unit, min(self._first_unit + fit, most))
        lines = [
            Text(
                f"  {'unit':<{names}} {'':<{words_width}}" + "".join(f"{k:>{cell - 1}} " for k in units),
                "dim",
            )
        ]
        for row, values in numbers.items():
            part, name, block = self._rows[row]
            chosen = row == self._row
            line = Text("▸ " if chosen else "  ")
            name_text = Text(self._label(row), "bold" if chosen else "")
            name_text.truncate(names, overflow="ellipsis", pad=True)
            line.append_text(name_text).append(" ")
            line.append(set_cell_size("" if block.rows.start else words.get(name, ""), words_width), "dim")
            scale = self._scales.of_quantity(part, name) if self._scales else None
            for k, value in zip(units, values[units.start : units.stop].tolist(), strict=False):
                marked = chosen and k == unit
                text = self._format(value, values.dtype)
                text = f"[{text}]" if marked else f"{text} "
                style = scale.style(value) if scale else Style()
                line.append(f"{text:>{cell}}", style + Style(bold=True) if marked else style)
            lines.append(line)
        return lines

    def _format(self, value: float, dtype: torch.dtype) -> str:
        return format_number(value, self._decimals, dtype)

    def _number_name(self) -> Text:
        """Return the line that names the selected number."""
        part, name, block = self._rows[self._row]
        size = len(self._numbers(self._row))
        label = element_label(part, name, block.rows.start + self._current_unit())
        label = label if size > 1 or block.rows.start else name
        words = descriptions(type(part.cell)).get(name)
        units = f"unit {self._current_unit()} (0–{size - 1})" if size > 1 else ""
        return Text.assemble((label, "bold"), (f"  {'; '.join(filter(None, (words, units)))}", "dim"))

    def _explanation(self, width: int) -> list[Text]:
        """Return the arithmetic behind the selected number, wrapped to the window."""
        part, name, block = self._rows[self._row]
        if name in part.values:
            index = block.rows.start + self._current_unit()
            text = part.explain(name, self._steps[self._step_index], index, digits=self._decimals)
        else:
            text = "output of the layer below" if part.layer else "input of the layer"
        return [Text(f"  {line}") for line in textwrap.wrap(text, max(1, width - 2))]

    def _code(self) -> list[Text]:
        """Return the source of the step; the line that assigns the selected quantity is bold."""
        part, name, _ = self._rows[self._row]
        assignment = re.compile(rf"(?:[\w, ]+, *)?{name}\b[\w, ]*=(?!=)")
        code = step_source(type(part.cell)).splitlines()
        return [Text(f"  {line}", "bold" if assignment.match(line.strip()) else "dim") for line in code]

    def _legend(self, scales: ColorScales) -> Text:
        ends = (-1, 0, 1)
        _, name, _ = self._rows[self._row]
        if name in scales.own:
            return Text.assemble(
                (f"Colors of {name}, on its own scale: ", "dim"), scales.own[name].legend(ends)
            )
        return Text.assemble(
            ("Colors of x: ", "dim"),
            scales.input.legend(ends),
            ("  of other quantities: ", "dim"),
            scales.quantities.legend(ends),
        )

    def _keys(self) -> Text:
        layers = "  Tab layer" if len(self._trace.layers) > 1 else ""
        return Text(f"q quit  ←→ step  ↑↓ quantity  [ ] unit{layers}  space play  g/G first/last", "dim")

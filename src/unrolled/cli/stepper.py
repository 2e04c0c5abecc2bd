"""A trace in the terminal, one time step on the screen, gone through with the keys."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleDimensions, Group
from rich.control import Control
from rich.screen import Screen
from rich.style import Style
from rich.text import Text
from torch import Tensor

from unrolled.cli.terminal import label, where, words_for
from unrolled.equations.source import equations
from unrolled.tracing.color_scales import Scales
from unrolled.tracing.explain import number
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

try:
    from prompt_toolkit.input import Input, create_input
except ImportError as error:
    raise ImportError("--watch needs prompt_toolkit: pip install prompt_toolkit") from error

_PLAY = 0.5  # seconds for each step
_LOOK = 0.25  # seconds until the size of the window is looked at again, and a lone Esc is taken for one
_KEYS = {  # by the names that prompt_toolkit has for them
    "earlier": "left h p",
    "later": "right l n",
    "first": "home g",
    "last": "end G",
    "up": "up k",
    "down": "down j",
    "lower unit": "[ < ,",
    "higher unit": "] > .",
    "next layer": "c-i pagedown",
    "previous layer": "s-tab pageup",
    "quit": "q Q escape c-c c-d",
    "tick": "tick",  # no key: the clock, while it plays
}
_ACTIONS = {key: action for action, keys in _KEYS.items() for key in keys.split()} | {" ": "play"}
_SIGNALS: dict[str, signal.Signals] = {}  # that end or pause the program: by the key, or else the name
if sys.platform != "win32":
    _ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    _SIGNALS = {"c-z": signal.SIGTSTP} | {sent.name: sent for sent in (*_ENDING, signal.SIGCONT)}


def step_through(
    console: Console, trace: Trace, steps: Sequence[int], labels: Sequence[str] | None = None
) -> None:
    """Show one step after another of a trace's first row, until the user leaves.

    Args:
        console: of a terminal that keys are read from too; it is as before afterwards.
        trace: its first row is shown.
        steps: the time steps to go through, at least one.
        labels: what stands for each time step of the sequence, such as the characters of a text.
    """
    view = _View(trace, steps, Scales.on(console, trace), labels)
    while sent := asyncio.run(_run(console, view, create_input())):
        # The terminal is as before, and the signal does what it does to any program. One that has started
        # this one and waits for it, such as make, is to pause with it.
        os.kill(0 if sent is _SIGNALS["c-z"] else os.getpid(), sent)


async def _run(console: Console, view: _View, source: Input) -> signal.Signals | None:
    """Draw, wait for a key, and so on, until the user leaves, or a signal comes, which is returned."""
    keys = asyncio.Queue[str]()

    def read() -> None:
        for press in source.read_keys():
            keys.put_nowait(press.key)

    for name, sent in {**_SIGNALS, "c-c": signal.SIGINT}.items() if _SIGNALS else ():
        if signal.getsignal(sent) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(sent, keys.put_nowait, name)
    drawn: os.terminal_size | None = None
    with console.screen(), source.raw_mode(), source.attach(read):
        while not source.closed:
            size = os.get_terminal_size(sys.stdout.fileno())
            if drawn != size and keys.empty():
                console.size = ConsoleDimensions(size.columns or 80, size.lines or 24)  # some tell none
                console.control(Control.home())
                console.print(Screen(Group(*view.lines(*console.size))), end="")
                drawn = size
            try:
                key = await asyncio.wait_for(keys.get(), _PLAY if view.playing else _LOOK)
            except TimeoutError:
                key = "tick" if view.playing else ""
                for press in source.flush_keys():
                    keys.put_nowait(press.key)
            action = _ACTIONS.get(key)
            if action == "quit" or key in _SIGNALS:
                return _SIGNALS.get(key)
            if action:
                view.do(action)
                drawn = None
    return None


class _View:
    """What is on the screen: one step of one layer and direction, one number of it explained."""

    def __init__(
        self,
        trace: Trace,
        steps: Sequence[int],
        scales: Scales | None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.playing = False
        self._trace = trace
        self._steps = steps
        self._labels = [label(labels, step) for step in steps]
        self._scales = scales
        self._rows = [
            (part, name)
            for part in trace.layers
            for name in dict.fromkeys(("x", *part.names))
            if part[name][0, 0].numel()
        ]
        self._at = 0  # which of the steps
        # which of the rows: the first that has arithmetic behind it
        self._row = next(k for k, (part, name) in enumerate(self._rows) if name in part.values)
        self._unit = 0  # which number of it, or its last one where it has fewer
        self._left = 0  # the first unit that there is room for
        self._digits = len("-0.0000")  # of the widest number so far: columns stay where they are

    def do(self, action: str) -> None:
        """What a key asks for, or a ``tick`` of the clock while it plays."""
        last = len(self._steps) - 1
        if action == "play":
            self.playing = not self.playing and last > 0
            self._at = 0 if self.playing and self._at == last else self._at
        elif action in ("earlier", "later", "tick", "first", "last"):
            to = {"earlier": self._at - 1, "first": 0, "last": last}.get(action, self._at + 1)
            self._at = min(max(to, 0), last)
            self.playing = action == "tick" and self._at < last
        elif action in ("up", "down"):
            self._row = min(max(self._row + (1 if action == "down" else -1), 0), len(self._rows) - 1)
        elif action in ("lower unit", "higher unit"):
            unit = self._shown_unit() + (1 if action == "higher unit" else -1)
            self._unit = min(max(unit, 0), len(self._numbers(self._row)) - 1)
        else:
            self._go_to_layer(1 if action == "next layer" else -1)

    def _go_to_layer(self, by: int) -> None:
        """The same quantity of another layer or direction; after the last comes the first."""
        part, name = self._rows[self._row]
        layers = self._trace.layers
        other = layers[(layers.index(part) + by) % len(layers)]
        rows = self._rows_of(other)
        self._row = next((row for row in rows if self._rows[row][1] == name), rows[0])

    def _rows_of(self, part: LayerTrace) -> list[int]:
        return [row for row, (other, _) in enumerate(self._rows) if other is part]

    def _numbers(self, row: int) -> Tensor:
        part, name = self._rows[row]
        return part[name][self._steps[self._at], 0].flatten()

    def _shown_unit(self) -> int:
        return min(self._unit, len(self._numbers(self._row)) - 1)

    def lines(self, width: int, height: int) -> list[Text]:
        """As many lines as there is room for, none wider than the window; the last names the keys."""
        part = self._rows[self._row][0]
        rows, told, code = self._rows_of(part), self._explained(width), self._code()
        room = height - 5  # title, time, units, the name of the number, and keys stand in any case
        seen = max(1, min(len(rows), room - min(len(told), 3)))
        top = min(max(self._row - rows[0] - seen // 2, 0), len(rows) - seen)
        spare = room - seen - len(told)
        if spare < 0:
            told = told[: max(0, room - seen)]
            for line in told[-1:]:
                line.append(" …")
        gaps = [[Text()] * (spare > count) for count in range(2)]
        above = [self._title(part), self._time(width), *gaps[0], *self._table(rows[top : top + seen], width)]
        above += [*gaps[1], self._named(), *told]
        below = [self._legend(self._scales)] if self._scales and spare > 3 else []
        for part_of_code in (code, [line for line in code if line.style == "bold"]):
            if part_of_code and len(above) + len(part_of_code) + len(below) + 3 <= height:
                above += [Text(), *part_of_code]
                break
        lines = above + [Text()] * (height - 1 - len(above) - len(below)) + below
        lines = [*lines[: height - 1], self._keys()]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _title(self, part: LayerTrace) -> Text:
        return Text.assemble((repr(self._trace.module), "bold"), where(self._trace, part))

    def _time(self, width: int) -> Text:
        """Where the step stands among those to go through."""
        first, last = f"  {self._steps[0]} ", f" {self._steps[-1]}"
        mark = "▶" if self.playing else "●"
        step = f"Step {self._steps[self._at]:<{len(last) - 1}}"
        step += f"{self._labels[self._at]:<{max(map(len, self._labels))}}"
        room = width - len(step) - len(first) - len(last) - 1
        before = round(self._at / max(1, len(self._steps) - 1) * room)
        line = ("━" * before, mark, "─" * (room - before))
        return Text.assemble((step, "bold"), (first, "dim"), *line, (last, "dim"))

    def _table(self, rows: list[int], width: int) -> list[Text]:
        """A line that counts the units, and one for each quantity: its name, words, its numbers."""
        numbers = {row: self._numbers(row) for row in rows}
        texts = (number(value) for values in numbers.values() for value in values.tolist())
        self._digits = max(self._digits, *map(len, texts))
        cell = self._digits + 2
        names = 1 + max(cell_len(name) for name in ("unit", *(name for _, name in self._rows)))
        names = min(names, max(len("unit "), width - 2 - 1 - cell))  # a number has room in any case
        words = words_for(type(self._rows[self._row][0].cell))
        told = max(cell_len(words.get(self._rows[row][1], "")) for row in rows) + 2
        most = max(map(len, numbers.values()))
        if 2 + names + 1 + told + most * cell > width:  # the numbers need that room
            words, told = {}, 0
        fit = max(1, (width - 2 - names - 1 - told) // cell)
        unit = self._shown_unit()
        self._left = min(max(self._left, unit - fit + 1), unit, max(0, most - fit))
        units = range(self._left, min(self._left + fit, most))
        lines = [
            Text(f"  {'unit':<{names}} {'':<{told}}" + "".join(f"{k:>{cell - 1}} " for k in units), "dim")
        ]
        for row, values in numbers.items():
            part, name = self._rows[row]
            chosen = row == self._row
            line = Text("▸ " if chosen else "  ")
            called = Text(name, "bold" if chosen else "")
            called.truncate(names, overflow="ellipsis", pad=True)
            line.append_text(called).append(" ")
            line.append(set_cell_size(words.get(name, ""), told), "dim")
            scale = self._scales.of_quantity(part, name) if self._scales else None
            for k, value in zip(units, values[units.start : units.stop].tolist(), strict=False):
                marked = chosen and k == unit
                text = f"[{number(value)}]" if marked else f"{number(value)} "
                style = scale.style(value) if scale else Style()
                line.append(f"{text:>{cell}}", style + Style(bold=True) if marked else style)
            lines.append(line)
        return lines

    def _named(self) -> Text:
        part, name = self._rows[self._row]
        size = len(self._numbers(self._row))
        index = f"[{self._shown_unit()}]" if size > 1 else ""
        words = words_for(type(part.cell)).get(name)
        of = f"unit {self._shown_unit()} of 0–{size - 1}" if size > 1 else ""
        return Text.assemble((f"{name}{index}", "bold"), (f"  {', '.join(filter(None, (words, of)))}", "dim"))

    def _explained(self, width: int) -> list[Text]:
        """The arithmetic behind the chosen number, in as many lines as it takes."""
        part, name = self._rows[self._row]
        if name in part.values:
            text = part.explain(name, self._steps[self._at], self._shown_unit())
        else:
            text = "the output of the layer below" if part.layer else "given: the input of the layer"
        return [Text(f"  {line}") for line in textwrap.wrap(text, max(1, width - 2))]

    def _code(self) -> list[Text]:
        """The step as the cell has it; the line that makes the chosen quantity stands out."""
        part, name = self._rows[self._row]
        makes = re.compile(rf"(?:[\w, ]+, *)?{name}\b[\w, ]*=(?!=)")
        code = equations(type(part.cell)).splitlines()
        return [Text(f"  {line}", "bold" if makes.match(line.strip()) else "dim") for line in code]

    def _legend(self, scales: Scales) -> Text:
        ends = (-1, 0, 1)
        _, name = self._rows[self._row]
        if name in scales.own:
            told = f"Colours of {name}, on a scale of its own: "
            return Text.assemble((told, "dim"), scales.own[name].legend(ends))
        return Text.assemble(
            ("Colours of x: ", "dim"),
            scales.input.legend(ends),
            ("  of the rest: ", "dim"),
            scales.quantities.legend(ends),
        )

    def _keys(self) -> Text:
        layers = "  Tab layer" if len(self._trace.layers) > 1 else ""
        return Text(f"q quit  ←→ step  ↑↓ quantity  [ ] unit{layers}  space play  g G first, last", "dim")

"""Quantities over time as a rich table or a pandas frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from unrolled.explain import number

if TYPE_CHECKING:
    import pandas

_STEPS = 12  # a longer sequence is shortened to its first and last steps


class StepTable(JupyterMixin):
    """A rich table of quantities: a row for every step and quantity, a column for every unit.

    Args:
        rows: ``(time, size)`` for every quantity, by name.
        chosen: the steps to show; None: all, shortened where there are many.
        units: columns at most; None: as many as the width of the console has room for.
        title: above the table.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], chosen: Sequence[int] | None, units: int | None, title: str = ""
    ) -> None:
        time = len(next(iter(rows.values())))
        self._title = title
        self._units = units
        self._rows = rows
        self._head, self._tail = (list(chosen), []) if chosen is not None else _ends(time, _STEPS)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = list(self._rows)
        texts = {
            step: [[number(value) for value in self._rows[name][step].tolist()] for name in names]
            for step in [*self._head, *self._tail]
        }
        widest = max((len(row) for rows in texts.values() for row in rows), default=0)
        units = self._units
        if units is None:
            column = 2 + max(
                (len(text) for rows in texts.values() for row in rows for text in row), default=0
            )
            room = options.max_width - len("  step  ") - max(map(len, names)) - 4
            units = max(2, room // column if widest <= room // column else (room - 3) // column)
        table = Table(title=self._title or None, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("quantity", no_wrap=True)
        head, tail = _ends(widest, units)
        for unit in head + (["…"] if tail else []) + tail:
            table.add_column(str(unit), justify="right", no_wrap=True, min_width=1)
        for step, rows in texts.items():
            if self._tail and step == self._tail[0]:
                table.add_row("…", f"({step - self._head[-1] - 1} steps more)")
                table.add_section()
            for name, row in zip(names, rows, strict=True):
                cells = _shorten(row, units) if len(row) > units else row
                table.add_row(str(step) if name == names[0] else "", name, *cells)
            table.add_section()
        yield table


def vector(values: Tensor, most: int) -> str:
    """The numbers of a row as ``[0.2529, 0.7949, -0.0466]``, some left out as ``…`` above ``most``."""
    texts = [number(value) for value in values.tolist()]
    return f"[{', '.join(_shorten(texts, most))}]"


def frame(values: Mapping[str, Tensor], lengths: Tensor, layer: int, direction: str) -> pandas.DataFrame:
    """One line for each number of quantities ``(time, batch, size)`` of a layer and direction."""
    import pandas

    frames = []
    for name, whole in values.items():
        flat = whole.flatten(2) if whole.dim() > 2 else whole.unsqueeze(-1)
        step, row, unit = torch.meshgrid(*map(torch.arange, flat.shape), indexing="ij")
        inside = step < lengths[row]
        frames.append(
            pandas.DataFrame(
                {
                    "layer": layer,
                    "direction": direction,
                    "step": step[inside].numpy(),
                    "batch": row[inside].numpy(),
                    "name": name,
                    "unit": unit[inside].numpy(),
                    "value": flat.double().cpu()[inside].numpy(),
                }
            )
        )
    return pandas.concat(frames, ignore_index=True)


def _column(text: int) -> int:
    """The width of a column for a text of that width, padding and the space between included."""
    return text + 3


def _ends(count: int, most: int) -> tuple[list[int], list[int]]:
    """The first and the last positions to show where only ``most`` of ``count`` have room."""
    if count <= most:
        return list(range(count)), []
    last = max(1, most // 4)
    return list(range(most - last)), list(range(count - last, count))


def _shorten(texts: Sequence[str], most: int) -> list[str]:
    head, tail = _ends(len(texts), most)
    return [texts[k] for k in head] + (["…"] if tail else []) + [texts[k] for k in tail]

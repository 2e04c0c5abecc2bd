"""Quantities over time as a rich table or a pandas frame."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from unrolled.tracing.colors import Scale
from unrolled.tracing.explain import number

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
        steps: the number of the step that each of a quantity's rows is of; None: from 0.
        columns: for a quantity that hasn't all of its units, those that it has.
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor],
        chosen: Sequence[int] | None,
        units: int | None,
        title: str = "",
        steps: Sequence[int] | None = None,
        columns: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        time = len(next(iter(rows.values())))
        self._title = title
        self._units = units
        self._rows = rows
        self._at = {step: k for k, step in enumerate(range(time) if steps is None else steps)}
        own = columns or {}
        self._columns = {name: own.get(name, range(values.shape[1])) for name, values in rows.items()}
        self._every = sorted({unit for held in self._columns.values() for unit in held})
        numbers = list(self._at)
        head, tail = _ends(time, _STEPS)
        self._head, self._tail = [numbers[k] for k in head], [numbers[k] for k in tail]
        if chosen is not None:
            self._head, self._tail = list(chosen), []

    def __str__(self) -> str:
        console = Console(file=io.StringIO())
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        units = self._units or max(2, min(len(self._every), options.max_width // len(" 0.0000  ")))
        table, unlimited = self._build(units), options.update_width(10_000)
        while self._units is None and units > 2:
            if console.measure(table, options=unlimited).maximum <= options.max_width:
                break
            units -= 1
            table = self._build(units)
        yield table

    def _build(self, units: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
        table.title = self._title or None
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("quantity", no_wrap=True)
        shown = self._every[:units]
        for unit in shown:
            table.add_column(str(unit), justify="right", no_wrap=True)
        if len(self._every) > units:
            table.add_column("…")
        for step in [*self._head, *self._tail]:
            if self._tail and step == self._tail[0]:
                table.add_row("…")
                table.add_section()
            for index, (name, values) in enumerate(self._rows.items()):
                held = dict(zip(self._columns[name], values[self._at[step]].tolist(), strict=True))
                texts = [number(held[unit]) if unit in held else "" for unit in shown]
                more = ["…"] if any(unit > shown[-1] for unit in held) else []
                table.add_row("" if index else str(step), name, *texts, *more)
            table.add_section()
        if self._tail:
            table.caption = f"{len(self._at) - len(self._head) - len(self._tail)} steps are not shown"
        return table


def vector(values: Tensor, width: int, scale: Scale | None = None) -> Text:
    """The numbers of a row as ``[0.2529, 0.7949, -0.0466]``, some left out as ``…`` to fit the width.

    Args:
        values: ``(size,)``.
        width: in columns; of a row of several numbers two are shown in any case.
        scale: gives each number its background; None: no colours.
    """
    numbers = values.tolist()
    texts = [number(value) for value in numbers]
    shown = list[int | None](range(len(texts)))  # None: the ellipsis
    for most in range(min(len(texts), width), 1, -1):
        head, tail = _ends(len(texts), most)
        shown = [*head, *([None] if tail else []), *tail]
        if 2 + sum(1 if k is None else len(texts[k]) for k in shown) + 2 * (len(shown) - 1) <= width:
            break
    styles = [Style() if k is None or scale is None else scale.style(numbers[k]) for k in shown]
    parts = [Text("…" if k is None else texts[k], style) for k, style in zip(shown, styles, strict=True)]
    return Text.assemble("[", Text(", ").join(parts), "]", style="cyan")


def pandas_or_why() -> Any:
    """The library pandas.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a frame needs pandas: pip install pandas") from error
    return pandas


def frame(
    values: Mapping[str, Tensor],
    lengths: Tensor,
    layer: int,
    direction: str,
    steps: Sequence[int] | None = None,
    columns: Mapping[str, Sequence[int]] | None = None,
) -> pandas.DataFrame:
    """One line for each number of quantities ``(time, batch, size)`` of a layer and direction.

    Args:
        values: the quantities, by name.
        lengths: ``(batch,)``, the steps of every row.
        layer: of which they are.
        direction: of which they are.
        steps: those that the values have; None: all.
        columns: for a quantity that hasn't all of its units, those that it has.

    Raises:
        ImportError: pandas is not installed.
    """
    pandas = pandas_or_why()
    frames = []
    for name, whole in values.items():
        flat = whole.flatten(2) if whole.dim() > 2 else whole.unsqueeze(-1)
        time = torch.arange(len(flat)) if steps is None else torch.tensor(steps)
        units = torch.tensor((columns or {}).get(name, range(flat.shape[2])), dtype=torch.int64)
        step, row, unit = torch.meshgrid(time, torch.arange(flat.shape[1]), units, indexing="ij")
        inside = step < lengths[row]
        flat = flat.cpu().to(torch.complex128 if flat.is_complex() else torch.float64)
        frames.append(
            pandas.DataFrame(
                {
                    "layer": layer,
                    "direction": direction,
                    "step": step[inside].numpy(),
                    "batch": row[inside].numpy(),
                    "name": name,
                    "unit": unit[inside].numpy(),
                    "value": flat[inside].numpy(),
                }
            )
        )
    return pandas.concat(frames, ignore_index=True)


def _ends(count: int, most: int) -> tuple[list[int], list[int]]:
    """The first and the last positions to show where only ``most`` of ``count`` have room."""
    if count <= most:
        return list(range(count)), []
    last = max(1, most // 4)
    return list(range(most - last)), list(range(count - last, count))

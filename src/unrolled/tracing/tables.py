"""Quantities over time as a rich table or a pandas DataFrame."""

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

from unrolled.tracing.colors import ColorScale
from unrolled.tracing.explain import DIGITS, format_number

if TYPE_CHECKING:
    import pandas

_MAX_STEPS = 12  # a longer sequence shows only its first and last steps


class StepTable(JupyterMixin):
    """A rich table of quantities: a row for every step and quantity, a column for every unit.

    Args:
        values: Each quantity by name, ``(time, size)``.
        selected_steps: The steps to show. None shows all, or the first and last ones of a long sequence.
        max_units: Maximum number of unit columns. None shows as many as fit into the console.
        title: Title of the table.
        steps: The number of each step along the time axis of ``values``. None counts from 0.
        columns: For a quantity with only some of its units, the numbers of these units.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        selected_steps: Sequence[int] | None,
        max_units: int | None,
        title: str = "",
        steps: Sequence[int] | None = None,
        columns: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        time = len(next(iter(values.values())))
        self._title = title
        self._max_units = max_units
        self._values = values
        self._position = {step: k for k, step in enumerate(range(time) if steps is None else steps)}
        columns = columns or {}
        self._columns = {name: columns.get(name, range(part.shape[1])) for name, part in values.items()}
        self._all_units = sorted({unit for units in self._columns.values() for unit in units})
        numbers = list(self._position)
        head, tail = _head_and_tail(time, _MAX_STEPS)
        self._head, self._tail = [numbers[k] for k in head], [numbers[k] for k in tail]
        if selected_steps is not None:
            self._head, self._tail = list(selected_steps), []

    def __str__(self) -> str:
        console = Console(file=io.StringIO())
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        units = self._max_units or max(2, min(len(self._all_units), options.max_width // len(" 0.0000  ")))
        table, unlimited = self._build(units), options.update_width(10_000)
        while self._max_units is None and units > 2:
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
        shown = self._all_units[:units]
        for unit in shown:
            table.add_column(str(unit), justify="right", no_wrap=True)
        if len(self._all_units) > units:
            table.add_column("…")
        for step in [*self._head, *self._tail]:
            if self._tail and step == self._tail[0]:
                table.add_row("…")
                table.add_section()
            for index, (name, values) in enumerate(self._values.items()):
                row = values[self._position[step]].tolist()
                by_unit = dict(zip(self._columns[name], row, strict=True))
                texts = [format_number(by_unit[unit]) if unit in by_unit else "" for unit in shown]
                ellipsis = ["…"] if any(unit > shown[-1] for unit in by_unit) else []
                table.add_row("" if index else str(step), name, *texts, *ellipsis)
            table.add_section()
        if self._tail:
            table.caption = f"{len(self._position) - len(self._head) - len(self._tail)} steps hidden"
        return table


def format_vector(
    values: Tensor, width: int, scale: ColorScale | None = None, digits: int | None = DIGITS
) -> Text:
    """Format the numbers of a vector as ``[0.2529, …, -0.0466]``, with an ellipsis if they don't all fit.

    Args:
        values: ``(size,)``.
        width: Available width in characters. Of several numbers, at least two are shown.
        scale: Color scale for the background of each number; None for no colors.
        digits: Number of decimal places; None for all.
    """
    numbers = values.tolist()
    texts = [format_number(value, digits, values.dtype) for value in numbers]
    shown = list[int | None](range(len(texts)))  # None is the ellipsis
    for count in range(min(len(texts), width), 1, -1):
        head, tail = _head_and_tail(len(texts), count)
        shown = [*head, *([None] if tail else []), *tail]
        if 2 + sum(1 if k is None else len(texts[k]) for k in shown) + 2 * (len(shown) - 1) <= width:
            break
    styles = [Style() if k is None or scale is None else scale.style(numbers[k]) for k in shown]
    parts = [Text("…" if k is None else texts[k], style) for k, style in zip(shown, styles, strict=True)]
    return Text.assemble("[", Text(", ").join(parts), "]", style="cyan")


def import_pandas() -> Any:
    """Import pandas.

    Raises:
        ImportError: If pandas isn't installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    return pandas


def data_frame(
    values: Mapping[str, Tensor],
    lengths: Tensor,
    layer: int,
    direction: str,
    steps: Sequence[int] | None = None,
    columns: Mapping[str, Sequence[int]] | None = None,
) -> pandas.DataFrame:
    """Return a DataFrame with one row for each number. Padding is left out.

    Args:
        values: Each quantity by name, ``(time, batch, size)``.
        lengths: Sequence length of each row, ``(batch,)``.
        layer: Index of the layer.
        direction: Direction of the layer.
        steps: The number of each step along the time axis of ``values``. None counts from 0.
        columns: For a quantity with only some of its units, the numbers of these units.

    Raises:
        ImportError: If pandas isn't installed.
    """
    pandas = import_pandas()
    frames = []
    for name, tensor in values.items():
        flat = tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(-1)
        time = torch.arange(len(flat)) if steps is None else torch.tensor(steps)
        units = torch.tensor((columns or {}).get(name, range(flat.shape[2])), dtype=torch.int64)
        step, row, unit = torch.meshgrid(time, torch.arange(flat.shape[1]), units, indexing="ij")
        mask = step < lengths[row]
        flat = flat.cpu().to(torch.complex128 if flat.is_complex() else torch.float64)
        frames.append(
            pandas.DataFrame(
                {
                    "layer": layer,
                    "direction": direction,
                    "step": step[mask].numpy(),
                    "batch": row[mask].numpy(),
                    "name": name,
                    "unit": unit[mask].numpy(),
                    "value": flat[mask].numpy(),
                }
            )
        )
    return pandas.concat(frames, ignore_index=True)


def _head_and_tail(count: int, limit: int) -> tuple[list[int], list[int]]:
    """Return the first and the last positions to show if only ``limit`` of ``count`` fit."""
    if count <= limit:
        return list(range(count)), []
    tail = max(1, limit // 4)
    return list(range(limit - tail)), list(range(count - tail, count))

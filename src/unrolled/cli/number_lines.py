"""Lines of numbers for the terminal: rows named by gate, and statistics instead of numbers that don't fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.text import Text
from torch import Tensor

from unrolled.tracing.colors import ColorScale
from unrolled.tracing.explain import DIGITS, format_number
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.provenance import StepGraph
from unrolled.tracing.row_names import RowBlock
from unrolled.tracing.saturation import SATURATING_FUNCTIONS, saturation_bounds
from unrolled.tracing.tables import format_vector

_SHOWN_ROWS = 16  # of a parameter; a larger one shows statistics
_SHOWN_NUMBERS = 100
_INDENT = 6


@dataclass
class NumberLines:
    """Prints lines of numbers, and notes whether some were left out.

    Attributes:
        console: The console to print to.
        full: Whether to print all numbers, wrapped to the width of the console.
        digits: Number of decimal places; None for as many as the numbers have.
        omitted: Whether numbers were left out so far.
    """

    console: Console
    full: bool = False
    digits: int | None = DIGITS
    omitted: bool = False

    def format(self, value: float | complex, dtype: torch.dtype | None = None) -> str:
        """Format a single number."""
        return format_number(value, self.digits, dtype)

    def vector(
        self,
        label: str,
        values: Tensor,
        scale: ColorScale | None = None,
        saturated: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        """Print a label and the numbers of a vector.

        Numbers that don't fit into a line continue in the next one if everything is printed. Otherwise,
        their statistics are printed.

        Args:
            label: The label, indented.
            values: ``(size,)``.
            scale: Color scale for the background of each number; None for no colors.
            saturated: Returns which values are saturated; None if their function has no flat parts.
        """
        room = max(8, self.console.width - cell_len(label))
        whole = format_vector(values, 10**9, scale, self.digits)
        if cell_len(whole.plain) <= room:
            self.console.print(Text(label) + whole, no_wrap=True)
        elif self.full:
            for start, line in self._wrapped(values, room, scale):
                self.console.print(Text(label if start == 0 else " " * cell_len(label)) + line, no_wrap=True)
        else:
            self.omitted = True
            self.console.print(Text(label) + format_vector(values, room, scale, self.digits), no_wrap=True)
            text = Text(f"{len(values)} numbers: {self.statistics(values, saturated)}", "dim")
            for line in text.wrap(self.console, room):
                self.console.print(Text(" " * cell_len(label)) + line)

    def _wrapped(self, values: Tensor, room: int, scale: ColorScale | None) -> Iterator[tuple[int, Text]]:
        """Yield lines of aligned numbers, each with the index of its first number."""
        numbers = values.tolist()
        texts = [self.format(value, values.dtype) for value in numbers]
        width = max(map(len, texts))
        index_width = len(str(len(texts) - 1)) + 2
        count = max(1, (room - index_width) // (width + 1))
        for start in range(0, len(texts), count):
            line = Text(f"{start}:".rjust(index_width - 1), "dim")
            for k in range(start, min(start + count, len(texts))):
                line.append(" ").append(texts[k].rjust(width), scale.style(numbers[k]) if scale else Style())
            yield start, line

    def statistics(self, values: Tensor, saturated: Callable[[Tensor], Tensor | None] | None = None) -> str:
        """Describe many numbers: minimum, mean and maximum, and the share that is saturated or not finite."""
        flat = values.flatten()
        numbers = flat.abs() if flat.is_complex() else flat
        finite = numbers[numbers.isfinite()].double()
        parts = []
        if len(finite):
            named = {"min": finite.min(), "mean": finite.mean(), "max": finite.max()}
            parts = [
                f"{name} {format_number(value.item(), self.digits or DIGITS)}"
                for name, value in named.items()
            ]
        flags = None if saturated is None else saturated(flat)
        if flags is not None:
            parts.append(f"{100 * flags.double().mean().item():.0f} % saturated")
        if len(finite) < len(numbers):
            parts.append(f"{len(numbers) - len(finite)} NaN or infinite")
        return ", ".join(parts)

    def parameter(self, part: LayerTrace, name: str, values: Tensor, scale: ColorScale | None) -> None:
        """Print the numbers of a parameter, a row at a time, or statistics of each gate if there are many."""
        names = part.row_names
        rows = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.unsqueeze(-1)
        blocks: Sequence[RowBlock] = [RowBlock("", range(len(rows)), 0)]
        if names.is_split(name) and name not in names.by_column:
            blocks = names.blocks[name]
        labels = block_labels(blocks)
        if not self.full and (len(rows) > _SHOWN_ROWS or values.numel() > _SHOWN_NUMBERS):
            self.omitted = True
            for block, label in zip(blocks, labels, strict=True):
                text = self.statistics(rows[block.rows.start : block.rows.stop])
                self.console.print(Padding(Text(f"{label}  {text}", "dim"), (0, 0, 0, 4)))
            return
        if values.dim() < 2:
            for block, label in zip(blocks, labels, strict=True):
                start = f"    {label}  " if len(blocks) > 1 else "    "
                self.vector(start, values.flatten()[block.rows.start : block.rows.stop], scale)
            return
        positions = [
            f"{block.gate}[{block.unit(row)}]" if block.gate else f"[{row}]"
            for block in blocks
            for row in block.rows
        ]
        width = max(map(cell_len, positions), default=0)
        for position, row in zip(positions, rows, strict=True):
            self.vector(f"    {set_cell_size(position, width)}  ", row, scale)

    def quantity(
        self,
        part: LayerTrace,
        name: str,
        values: Tensor,
        label: str,
        left: int,
        scale: ColorScale | None,
        graph: Callable[[], StepGraph],
    ) -> None:
        """Print the numbers of a quantity. The pre-activations of several gates get a line for each gate.

        Args:
            part: The layer and direction.
            name: The quantity.
            values: Its numbers at a step, ``(size,)``.
            label: Name and description. If it ends with a line break, the numbers get lines of their own.
            left: Width of the columns for names and descriptions.
            scale: Color scale for the background of each number; None for no colors.
            graph: Returns the computation graph of the step.
        """
        saturated = functools.partial(_is_saturated, name=name, graph=graph)
        label, line_break, _ = label.partition("\n")
        is_split = name in part.values and part.row_names.is_split(name)
        blocks = part.row_names.blocks[name] if is_split else ()
        gates = block_labels(blocks)
        start = _INDENT if line_break else left - max(map(len, gates), default=0) - 1
        gap = 1 if is_split else 0
        if line_break or cell_len(label.rstrip()) > start - gap:
            self.console.print(Text(label.rstrip()), overflow="fold")
            label = " " * _INDENT
        if not is_split:
            self.vector(label, values, scale, saturated)
        for block, gate in zip(blocks, gates, strict=True):
            label = set_cell_size(label.rstrip(), start)
            self.vector(f"{label}{gate} ", values[block.rows.start : block.rows.stop], scale, saturated)
            label = ""


def block_labels(blocks: Sequence[RowBlock]) -> list[str]:
    """Return labels of the same length for blocks of rows: their gates, or else their rows."""
    labels = [block.gate or f"{block.rows.start}–{block.rows.stop - 1}" for block in blocks]
    width = max(map(cell_len, labels), default=0)
    return [label + " " * (width - cell_len(label)) for label in labels]


def _is_saturated(values: Tensor, name: str, graph: Callable[[], StepGraph]) -> Tensor | None:
    """Return which values of a quantity are saturated; None if no saturating function computed it."""
    node = graph().nodes.get(name)
    if node is None or node.function is None or node.name not in SATURATING_FUNCTIONS:
        return None
    if sum(operand.tensor is not None for operand in node.operands) != 1:
        return None
    low, high = saturation_bounds(node.function)
    return (values <= low) | (values >= high)

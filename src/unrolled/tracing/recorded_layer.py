"""A recurrent layer of a model that is recorded, and its recorded calls."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from unrolled.cells.base import Cell
from unrolled.tracing.call_sequence import CallSequence
from unrolled.tracing.trace import Trace


@dataclass(eq=False)
class RecordedLayer:
    """A layer of the model and its recorded calls.

    Attributes:
        name: Name of the module.
        module: The module.
        sequences: The last recorded calls. Consecutive calls of one time step each are joined.
        call_count: Number of calls so far.
        never_recorded: Why no call can be recorded, or None.
        last_not_recorded: Why the last call couldn't be recorded, or None.
    """

    name: str
    module: nn.Module
    sequences: deque[CallSequence]
    call_count: int = 0
    never_recorded: str | None = None
    last_not_recorded: str | None = None

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.name!r}"

    @property
    def traces(self) -> list[Trace]:
        """The traces of the last calls."""
        traces = [sequence.trace for sequence in self.sequences]
        return [trace for trace in traces if trace is not None]

    @property
    def pieces(self) -> list[Trace]:
        """The traces before they were joined."""
        return [piece for sequence in self.sequences for piece in sequence.pieces]

    def last_cells(self) -> list[Cell] | None:
        """Return the cells of the last trace, or None, without keeping the trace alive."""
        pieces = self.pieces
        return [part.cell for part in pieces[-1].layers] if pieces else None

    @property
    def not_recorded(self) -> str | None:
        """Why there is no trace of the last call, or None."""
        return self.never_recorded or self.last_not_recorded

    @property
    def summary(self) -> str:
        """The number of its calls, and what was recorded of the last one."""
        if self.not_recorded is not None:
            return f"not recorded: {self.not_recorded}"
        traces = self.traces
        if not traces:
            return "not called"
        calls = f"{self.call_count} call{'s' * (self.call_count != 1)}"
        part = traces[-1].layers[0]
        joined = sum(sequence.length for sequence in self.sequences) > len(traces)
        sequences = (
            f"{len(traces)} sequence{'s' * (len(traces) != 1)} of steps" if joined else f"{len(traces)}"
        )
        return (
            f"{calls}, {sequences} recorded, {format_bytes(total_bytes(traces))}; "
            f"{part.extent}; {', '.join(part.names)}"
        )

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Add the name of the layer to errors about steps or rows that it doesn't have."""
        try:
            yield
        except (IndexError, ValueError) as error:
            raise type(error)(f"record of {self}: {error}") from None


def total_bytes(traces: Iterable[Trace]) -> int:
    """Return the memory that some traces take in bytes. What they share is counted once."""
    storages: dict[int, int] = {}
    for trace in traces:
        storages |= trace.storages()
    return sum(storages.values())


def format_bytes(count: float) -> str:
    """Format a number of bytes with a unit."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"

"""Which numbers share a color scale."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console

from unrolled.tracing.colors import Scale
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_APART = 2.5  # times the median: what is larger would leave the others pale


def ranges(parts: Iterable[LayerTrace], length: int, batch: int = 0) -> tuple[float, dict[str, float]]:
    """How far the scale that quantities share reaches, and the scales of those that have one of their own.

    They are those that would leave the others pale: the ones whose largest magnitude is more than 2.5 times
    the median one, and the ones that have more numbers than the layer has units, such as sums for several
    gates.

    Args:
        parts: layers of one cell.
        length: of the row.
        batch: the row.
    """
    most: dict[str, float] = {}
    wide = set[str]()
    for part in parts:
        units = max(part.cell.hidden, *part.cell.state_sizes().values())
        for name, values in part.values.items():
            most[name] = max(most.get(name, 0.0), Scale.of([values[:length, batch]]).largest)
            if values.shape[2:].numel() > units:
                wide.add(name)
    alike = {name: size for name, size in most.items() if name not in wide and size > 0}
    middle = statistics.median_low(alike.values()) if alike else 0.0
    own = {name: size for name, size in most.items() if name in wide or size > _APART * middle > 0}
    return max((size for name, size in most.items() if name not in own), default=0.0), own


@dataclass(frozen=True)
class Scales:
    """The scales of a whole trace: its parameters, its input, and all else that its steps compute.

    Attributes:
        quantities: what those share that have none of their own.
        own: of the others, by their names; see :func:`ranges`.
    """

    parameters: Scale
    input: Scale
    quantities: Scale
    own: Mapping[str, Scale]

    @classmethod
    def on(cls, console: Console, trace: Trace) -> Scales | None:
        """Those of the first row of a trace; None on a console without colours, or of fewer than 256."""
        if console.color_system not in ("truecolor", "256") or console.no_color:
            return None
        coarse = console.color_system == "256"
        length = int(trace.layers[0].lengths[0])
        shared, own = ranges(trace.layers, length)
        return cls(
            Scale.of(trace.recurrent.parameters(), coarse),
            Scale.of([trace.layers[0].input[:length, 0]], coarse),
            Scale(shared, coarse),
            {name: Scale(size, coarse) for name, size in own.items()},
        )

    def of_quantity(self, part: LayerTrace, name: str) -> Scale:
        """The scale of a quantity; an upper layer reads what the one below computes."""
        if part.layer == 0 and name == "x" and name not in part.values:
            return self.input
        return self.own.get(name, self.quantities)

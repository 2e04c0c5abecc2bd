"""Which quantities of a trace share a color scale."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console

from unrolled.tracing.colors import ColorScale
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.layer_values import LayerValues
from unrolled.tracing.trace import Trace

_GATE_FUNCTIONS = {"sigmoid", "hardsigmoid"}
_OUTLIER = 2.5  # times the median: on a scale for larger numbers, all other quantities would look pale


def color_ranges(parts: Iterable[LayerTrace], length: int, batch: int = 0) -> tuple[float, dict[str, float]]:
    """Compute the largest magnitude of the shared color scale, and of the quantities with their own scale.

    A quantity gets its own scale in two cases, because it would make the others look pale:

    * its largest magnitude is over 2.5 times the median of all quantities, or
    * it has more features than the layer has units, such as the pre-activations of all gates together.

    Args:
        parts: Traces of layers with the same cell.
        length: Sequence length of the row.
        batch: The row of the batch.

    Returns:
        The largest magnitude of the quantities that share a scale, and that of each other quantity by name.
    """
    magnitudes: dict[str, float] = {}
    wide = set[str]()
    for part in parts:
        units = max(part.cell.hidden, *part.cell.state_sizes().values())
        for name, values in part.values.items():
            largest = ColorScale.of([values[:length, batch]]).largest
            magnitudes[name] = max(magnitudes.get(name, 0.0), largest)
            if values.shape[2:].numel() > units:
                wide.add(name)
    narrow = {name: size for name, size in magnitudes.items() if name not in wide and size > 0}
    median = statistics.median_low(narrow.values()) if narrow else 0.0
    own = {name: size for name, size in magnitudes.items() if name in wide or size > _OUTLIER * median > 0}
    return max((size for name, size in magnitudes.items() if name not in own), default=0.0), own


def color_limits(part: LayerTrace, name: str, length: int, batch: int = 0) -> tuple[float, float]:
    """Return the ends of the color scale for a single quantity, so that figures can be compared.

    Args:
        part: The trace of the layer.
        name: The quantity.
        length: Sequence length of the row.
        batch: The row of the batch.

    Returns:
        0 and 1 for a gate, otherwise −1 and 1, or the largest magnitude if it is over 1.
    """
    function = LayerValues(part, "", None).functions.get(name)
    if function is not None and function[0] in _GATE_FUNCTIONS:
        return 0.0, 1.0
    largest = max(1.0, ColorScale.of([part[name][:length, batch]]).largest)
    return -largest, largest


@dataclass(frozen=True)
class ColorScales:
    """The color scales for a whole trace: parameters, input and computed quantities.

    Attributes:
        parameters: Scale of all parameters.
        input: Scale of the input.
        quantities: Scale shared by all quantities that don't have their own.
        own: Scales of the other quantities, by name. See :func:`color_ranges`.
    """

    parameters: ColorScale
    input: ColorScale
    quantities: ColorScale
    own: Mapping[str, ColorScale]

    @classmethod
    def for_console(cls, console: Console, trace: Trace) -> ColorScales | None:
        """Return the scales for the first row of a trace; None if the console has fewer than 256 colors."""
        if console.color_system not in ("truecolor", "256") or console.no_color:
            return None
        coarse = console.color_system == "256"
        length = int(trace.layers[0].lengths[0])
        shared, own = color_ranges(trace.layers, length)
        return cls(
            ColorScale.of(trace.recurrent.parameters(), coarse),
            ColorScale.of([trace.layers[0].input[:length, 0]], coarse),
            ColorScale(shared, coarse),
            {name: ColorScale(size, coarse) for name, size in own.items()},
        )

    def of_quantity(self, part: LayerTrace, name: str) -> ColorScale:
        """Return the scale of a quantity. An upper layer's input is computed, so it has no input scale."""
        if part.layer == 0 and name == part.input_name:
            return self.input
        return self.own.get(name, self.quantities)

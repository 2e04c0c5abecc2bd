"""Plots of a trace with matplotlib: gates, states and gradients over time, the layer, a colored text.

Each function takes a :class:`unrolled.Trace` or one of its layers and returns the matplotlib ``Axes``. For a
trace, it draws layer 0, forward direction. Pass ``ax`` to draw on an existing ``Axes``; the default is a new
figure. ``trace.plot("gates")`` is the same as ``plot.gates(trace)``.

The functions don't use pyplot: they register no figure and change no setting. To show a plot in a notebook,
end a cell with ``plot.gates(trace).figure``. To save it, call ``figure.savefig("gates.svg", dpi=300)``; the
resolution applies to the heat maps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

try:
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError("unrolled.plot needs matplotlib: pip install matplotlib") from error

from unrolled.plot.curves import gates, gradient, states
from unrolled.plot.diagrams import layer, unrolled
from unrolled.plot.figures import NAN_COLOR, Picture
from unrolled.plot.text import text
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

__all__ = ["NAN_COLOR", "Picture", "draw", "gates", "gradient", "layer", "states", "text", "unrolled"]

_KINDS: dict[str, Callable[..., Axes]] = {
    "gates": gates,
    "states": states,
    "gradient": gradient,
    "unrolled": unrolled,
    "layer": layer,
    "text": text,
}


def draw(trace: Trace | LayerTrace, kind: str, /, **options: Any) -> Axes:
    """Draw a plot of the given kind.

    Args:
        trace: A trace or one of its layers.
        kind: ``"gates"``, ``"states"``, ``"gradient"``, ``"unrolled"``, ``"layer"`` or ``"text"``.
        options: Arguments of the function with this name.

    Raises:
        ValueError: If there is no such kind.
        TypeError: If this kind has no such option.
    """
    function = _KINDS.get(kind) if isinstance(kind, str) else None
    if function is None:
        raise ValueError(f"kind should be one of cell, {', '.join(_KINDS)}, got {kind!r}")
    known_options = [*inspect.signature(function).parameters][1:]
    for option in options:
        if option not in known_options:
            raise TypeError(
                f"the plot {kind!r} has no option {option!r}: its options are {', '.join(known_options)}"
            )
    return function(trace, **options)

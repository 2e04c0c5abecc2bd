"""Pictures of a trace: the layer through time, its weights, its quantities, states and gradients.

Every function takes a :class:`unrolled.Trace` (its lowest layer, forward) or one of its layers, draws with
matplotlib, on an Axes of yours or in a new figure, and returns the Axes; ``trace.plot("gates")`` is
``plot.gates(trace)``. pyplot is left alone: no figure is registered, no setting changed.
``plot.gates(trace).figure``, last in a notebook's cell, shows it; its ``savefig("gates.svg", dpi=300)``
writes it, the heat maps in it sharp enough for print.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from unrolled.plot.curves import gates, gradient, states
from unrolled.plot.diagrams import layer, unrolled
from unrolled.plot.figures import NAN_COLOR, Picture
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

try:
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install matplotlib") from error


__all__ = ["NAN_COLOR", "Picture", "draw", "gates", "gradient", "layer", "states", "unrolled"]

_KINDS: dict[str, Callable[..., Axes]] = {
    "gates": gates,
    "states": states,
    "gradient": gradient,
    "unrolled": unrolled,
    "layer": layer,
}


def draw(trace: Trace | LayerTrace, kind: str, /, **options: Any) -> Axes:
    """The picture of this kind: the function of this module that has its name.

    Raises:
        ValueError: there is no such kind.
        TypeError: that kind has no such option.
    """
    picture = _KINDS.get(kind) if isinstance(kind, str) else None
    if picture is None:
        raise ValueError(f"the kind of a picture should be one of {', '.join(_KINDS)}, got {kind!r}")
    known = [*inspect.signature(picture).parameters][1:]
    for option in options:
        if option not in known:
            raise TypeError(f"a picture of {kind} has no option {option!r}: it has {', '.join(known)}")
    return picture(trace, **options)

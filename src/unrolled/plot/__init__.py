"""Pictures of a trace: the layer through time, its weights, its quantities and its states.

Every function takes a :class:`unrolled.Trace` (its lowest layer, forward) or one of its layers and
draws with matplotlib, on an Axes of yours or in a new figure. pyplot is left alone: no figure is
registered, no setting changed. ``plot.states(trace).figure``, last in a notebook's cell, shows it.
"""

from __future__ import annotations

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'unrolled[plot]'") from error

from unrolled.plot.curves import gates, states
from unrolled.plot.diagrams import layer, unrolled
from unrolled.plot.figures import NAN_COLOR, Picture

__all__ = ["NAN_COLOR", "Picture", "gates", "layer", "states", "unrolled"]

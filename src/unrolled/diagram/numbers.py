"""The numbers that a diagram shows: values of one unit at one step, and the scales they are drawn on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from unrolled.diagram.lanes import BEFORE
from unrolled.diagram.model import Diagram, DiagramNode, Term

_SMALLEST_SCALE = 1e-9


@dataclass(frozen=True)
class Shown:
    """A number as it is drawn.

    Attributes:
        value: The number.
        share: Its part of the scale, from -1 to 1; 0 for NaN.
        tone: ``"gate"``, ``"positive"``, ``"negative"``, or ``"alarm"`` for NaN and infinity.
    """

    value: float
    share: float
    tone: str


def scales(diagram: Diagram, steps: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Return the largest absolute value of each source over steps: the limit of its scale.

    The scale of a gate and of tanh values is 1. States share one scale, which also holds for operations on
    them. Other nodes have a scale of their own. NaN and infinity don't count.

    Args:
        diagram: The diagram.
        steps: The values of each step.

    Returns:
        The limit for each node, by id, and for each state before the step, as ``"before:NAME"``.
    """
    largest = {node.id: _largest(steps, node.value) for node in diagram.nodes}
    ends = {state.end for state in diagram.states}
    of_states = [_largest(steps, state.value) for state in diagram.states]
    of_states += [largest[end] for end in ends if end in largest]
    state_limit = max(of_states, default=1.0)
    limits = {BEFORE + state.name: state_limit for state in diagram.states}
    for node in diagram.nodes:
        plain = [t for t in node.terms if t.source is not None and not t.weighted]
        on_way = node.kind == "operation" and any(t.source in limits for t in plain)
        if node.range:
            limits[node.id] = 1.0
        elif node.id in ends or (on_way and largest[node.id] <= state_limit):
            limits[node.id] = state_limit
        else:
            limits[node.id] = largest[node.id]
    return limits


def _largest(steps: Sequence[Sequence[Tensor]], index: int) -> float:
    found = _SMALLEST_SCALE
    for step in steps:
        finite = [abs(value) for value in step[index].flatten().tolist() if math.isfinite(value)]
        found = max([found, *finite])
    return found


class Numbers:
    """The numbers of one unit at one step.

    Args:
        diagram: The diagram.
        values: The values of the step.
        unit: The unit. Values that are the same for all units are shown for each.
        limits: The scales, from :func:`scales`.
    """

    def __init__(
        self, diagram: Diagram, values: Sequence[Tensor], unit: int, limits: Mapping[str, float]
    ) -> None:
        self._values = values
        self._unit = unit
        self._limits = limits
        self._nodes = {node.id: node for node in diagram.nodes}
        self._states = {BEFORE + state.name: state for state in diagram.states}

    def of(self, source: str) -> Shown | None:
        """Return the number of a source: a node or a state before the step; None for another."""
        if source in self._nodes:
            node = self._nodes[source]
            return self._shown(self._read(node.value), source, node)
        if source in self._states:
            return self._shown(self._read(self._states[source].value), source, None)
        return None

    def shares(self, node: DiagramNode) -> list[float]:
        """Return the shares of all elements in the sum of the values of a softmax."""
        values = [max(0.0, value) for value in self._values[node.value].flatten().tolist()]
        return [value / (sum(values) or 1.0) for value in values]

    def is_chosen(self, node: DiagramNode, element: int) -> bool:
        """Return whether an element of a node belongs to the unit that is shown."""
        return element == min(self._unit, self._values[node.value].numel() - 1)

    def operand(self, term: Term) -> float | None:
        """Return the number that a term of a function stands for."""
        if term.value is not None:
            return self._read(term.value)
        shown = self.of(term.source or "")
        return None if shown is None else shown.value

    def _read(self, index: int) -> float | None:
        flat = self._values[index].flatten()
        count = len(flat)
        if not count:
            return None
        return float(flat[0 if count == 1 else self._unit]) if count == 1 or self._unit < count else None

    def _shown(self, value: float | None, source: str, node: DiagramNode | None) -> Shown | None:
        if value is None:
            return None
        if not math.isfinite(value):
            share = 0.0 if math.isnan(value) else math.copysign(1.0, value)
            return Shown(value, share, "alarm")
        share = max(-1.0, min(1.0, value / self._limits[source]))
        gate = node is not None and node.range == "gate"
        return Shown(value, share, "gate" if gate else "negative" if value < 0 else "positive")

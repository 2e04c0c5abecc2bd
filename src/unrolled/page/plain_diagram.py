"""A diagram without lines, for a cell whose step can't be drawn: its quantities, each with its values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unrolled.diagram.model import Diagram, DiagramNode, DiagramState, DiagramTrace
from unrolled.tracing.layer_trace import LayerTrace


def plain_diagram(part: LayerTrace, batch: int, steps: Sequence[int]) -> DiagramTrace:
    """Return the quantities of a layer as nodes that nothing is known of.

    Args:
        part: The trace of the layer.
        batch: The row of the batch.
        steps: The time steps.

    Raises:
        ValueError: If a state is complex.
    """
    for name in part.cell.state:
        if part.values[name].is_complex():
            raise ValueError(
                f"a page can't show the state {name} of {type(part.cell).__name__} because it is complex: "
                "split it into two states, its real and its imaginary part"
            )
    shown = [name for name, v in part.values.items() if not v.is_complex() and v[0, 0].numel()]
    nodes = tuple(
        DiagramNode(f"n{k}", "function", name, name, (), value=k, operation="unknown")
        for k, name in enumerate(shown)
    )
    states = tuple(
        DiagramState(name, f"n{shown.index(name)}", len(shown) + k) for k, name in enumerate(part.cell.state)
    )

    def values(step: int) -> list[Tensor]:
        before = part.state_before(step, batch)
        quantities = [part.values[name][step, batch].flatten() for name in shown]
        return [
            *quantities,
            *(before[name].flatten() for name in part.cell.state),
            part.input[step, batch].flatten(),
        ]

    diagram = Diagram(type(part.cell).__name__, states, nodes, len(shown) + len(states))
    return DiagramTrace(diagram, tuple(steps), [values(step) for step in steps], [])

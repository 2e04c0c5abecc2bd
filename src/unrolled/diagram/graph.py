"""The diagram of a cell's step, from the computation graph of a recorded step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from unrolled.diagram.builder import DiagramBuilder
from unrolled.diagram.groups import find_groups
from unrolled.diagram.indices import ElementMaps
from unrolled.diagram.model import DiagramError, DiagramTrace
from unrolled.diagram.step_reader import StepReader
from unrolled.tracing.indexing import equal_up_to_rounding, normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.row_names import row_names
from unrolled.tracing.step_recorder import StepRun


def build(
    part: LayerTrace,
    batch: int = 0,
    steps: Sequence[int] | None = None,
    runs: Mapping[int, StepRun] | None = None,
) -> DiagramTrace:
    """Build the diagram of a recorded layer's step, with the numbers of one row.

    Args:
        part: The trace of the layer in one direction.
        batch: The row.
        steps: The time steps to return numbers for; None for all that were recorded.
        runs: Steps that have run again already, by time step.

    Returns:
        The diagram and its numbers.

    Raises:
        DiagramError: If the step has no diagram. The message says why.
        IndexError: If a step or the row is out of range, or the step wasn't recorded.
    """
    name = type(part.cell).__name__
    batch = normalize_index("row", batch, len(part.lengths))
    length = int(part.lengths[batch])
    if steps is None:
        steps = range(length) if part.steps is None else [step for step in part.steps if step < length]
    chosen = tuple([normalize_index("time step", step, length) for step in steps])
    if part.partial:
        raise DiagramError(f"{name} has no diagram, because the trace has only some quantities or units.")
    if not chosen:
        raise DiagramError(f"{name} has no diagram, because row {batch} has no recorded step.")
    moves: dict[object, object] = {}
    maps = ElementMaps()
    names = row_names(part.cell)
    first: DiagramBuilder | None = None
    values, origins = [], []
    for step in chosen:
        reader = StepReader(part, step, batch, moves, maps, None if runs is None else runs[step])
        try:
            builder = DiagramBuilder(name, reader.outputs(), reader, names)
        except RecursionError:
            raise DiagramError(f"{name} has no diagram, because its step has too many operations.") from None
        _check_reproduced(part, reader, step, batch)
        if any(value.is_complex() for value in builder.values):
            raise DiagramError(f"{name} has no diagram, because its step computes complex numbers.")
        first = first or builder
        if builder.diagram != first.diagram:
            raise DiagramError(
                f"{name} has no diagram, because step {step} computes other operations than step {chosen[0]}."
            )
        values.append(builder.values)
        origins.append([reader.origin(value) for value in builder.values] if runs is not None else [])
    assert first is not None
    diagram = replace(first.diagram, groups=find_groups(first.diagram))
    return DiagramTrace(diagram, chosen, values, first.weights, origins)


def _check_reproduced(part: LayerTrace, reader: StepReader, step: int, batch: int) -> None:
    """Check that the step for the row alone computes what was recorded."""
    for name, node in reader.graph.nodes.items():
        if name not in part.values or node.tensor is None:
            continue
        recorded = part.values[name][part.at(step), batch].flatten()
        computed = node.numbers.flatten()
        if computed.shape != recorded.shape or not bool(equal_up_to_rounding(computed, recorded).all()):
            raise DiagramError(
                f"{type(part.cell).__name__} has no diagram, because {name} depends on other rows of the "
                "batch or on random numbers that weren't recorded."
            )

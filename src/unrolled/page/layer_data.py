"""The data of one layer for the page: its diagram, numbers, parameters and gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unrolled.cells.descriptions import quantity_descriptions
from unrolled.diagram.graph import build
from unrolled.diagram.model import Diagram, DiagramError, DiagramTrace
from unrolled.diagram.symbols import rows_text
from unrolled.equations.formulas import formulas
from unrolled.page.computed_steps import (
    INTERVALS,
    NotComputableError,
    StepNumbers,
    computed_steps,
    stored_values,
)
from unrolled.page.diagram_data import diagram_data, drawing_data, value_sources
from unrolled.page.plain_diagram import plain_diagram
from unrolled.page.sampling import (
    COMPLETE_VALUES,
    MAX_STEPS,
    PageSample,
    encode_map,
    encode_values,
    feature_order,
)
from unrolled.page.step_programs import program_data
from unrolled.page.tensor_names import tensor_names
from unrolled.page.weight_gradients import weight_gradient_data
from unrolled.tracing.explain import format_number
from unrolled.tracing.gradient_flow import gradient_flow, spectral_radii
from unrolled.tracing.indexing import identical
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.row_names import RowBlock, RowNames, row_names
from unrolled.tracing.step_graph import LayerProgram, trace_program
from unrolled.tracing.trace import Trace

_SOME_NUMBERS = "This page has only some of the numbers of the trace."


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a layer on the page.

    Attributes:
        traced: The diagram with the stored values of its steps.
        sample: The steps and parameters that are on the page.
        program: The program of the steps.
        drawn: Whether the diagram has lines.
        sources: The pieces of the values of a step; see :func:`value_sources`.
        computed: The data from which the page computes the steps; None if all values are stored.
    """

    traced: DiagramTrace
    sample: PageSample
    program: LayerProgram
    drawn: bool = True
    sources: list[Any] = field(default_factory=list)
    computed: dict[str, Any] | None = None


def layer_data(
    trace: Trace,
    part: LayerTrace,
    batch: int,
    length: int,
    limit: int,
    notes: list[str],
    rows: int,
    order: list[int],
    is_first: bool = True,
) -> dict[str, Any]:
    """Return the data of one layer in one direction.

    Args:
        trace: The trace.
        part: The layer.
        batch: The row of the batch.
        length: The number of time steps of the row.
        limit: The maximum number of values of this layer on the page.
        notes: Sentences about omissions are appended to it.
        rows: The number of rows that share the limit.
        order: The units in an order that groups similar ones, for the heat maps.
        is_first: Whether it is the first row of the page. Only this row stores the gradients of the
            parameters, which are sums over all rows.

    Raises:
        ValueError: If a state is complex.
    """
    complex_names = [name for name, values in part.values.items() if values.is_complex()]
    notes += [f"{name} is not shown because its values are complex." for name in complex_names]
    numbers = _numbers(trace, part, batch, length, _limit_of_row(part, limit, rows))
    sample = numbers.sample
    notes += _omission_notes(part, sample, length)
    has_maps = numbers.computed is not None or not sample.complete
    data = {
        "layer": part.layer,
        "direction": part.direction,
        "length": length,
        "steps": sample.steps,
        "changedStates": part.changed_states,
        "tensorNames": tensor_names(trace, part, batch),
        "descriptions": {"x": "input", **quantity_descriptions(type(part.cell))},
        "diagram": diagram_data(numbers.traced),
        "drawing": drawing_data(numbers.traced.diagram) if numbers.drawn else None,
        "equations": [] if numbers.drawn else [equation.math for equation in formulas(part.cell)],
        "parameters": _parameters(part, sample, numbers.traced.diagram),
        "maps": _maps(part, numbers.traced.diagram, batch, length, order) if has_maps else None,
        "unitOrder": order,
        "gradient": _gradient(part, batch),
        "program": program_data(numbers.program),
        "valueSources": numbers.sources,
        "computed": numbers.computed,
    }
    if is_first:
        data["weightGradient"] = weight_gradient_data(part, numbers.traced, numbers.program, numbers.sources)
    return data


def share_inputs(trace: Trace, layers: list[dict[str, Any]], batch: int, length: int) -> None:
    """Leave out the input of each layer that is the output of the layer below, if the page computes that.

    Args:
        trace: The trace.
        layers: The data of its layers, which changes.
        batch: The row of the batch.
        length: The number of time steps of the row.
    """
    for part, data in zip(trace.layers, layers, strict=True):
        below = [k for k, other in enumerate(trace.layers) if other.layer == part.layer - 1]
        if data["computed"] is None or not below or any(len(layers[k]["steps"]) < length for k in below):
            continue
        outputs = [trace.layers[k].values[next(iter(part.cell.state))][:length, batch] for k in below]
        if identical(torch.cat([output.flatten(1) for output in outputs], 1), part.input[:length, batch]):
            data["computed"]["input"] = None


def _limit_of_row(part: LayerTrace, limit: int, rows: int) -> int:
    """Return the maximum number of values of one of several rows, which share the parameters."""
    parameters = sum(math.prod(shape) for shape in part.cell.shapes().values())
    return parameters + max(0, limit - parameters) // rows


def _numbers(trace: Trace, part: LayerTrace, batch: int, length: int, limit: int) -> _Numbers:
    """Choose what the page has of a layer: all numbers, what computes them, or some of them."""
    reason = None
    try:
        first = build(part, batch, steps=[0])
    except DiagramError as error:
        reason, first = str(error), plain_diagram(part, batch, [0])
    per_step = sum(value.numel() for value in first.values[0])
    sample = PageSample.within(part, length, per_step, min(limit, COMPLETE_VALUES))
    if reason is None and not sample.complete:
        try:
            return _computed_numbers(trace, part, batch, length, limit)
        except (DiagramError, NotComputableError) as error:
            reason = str(error)
    sample = PageSample.within(part, length, per_step, limit)
    program, sources = LayerProgram(reason=reason or _SOME_NUMBERS), list[Any]()
    moves: dict[Any, Any] = {}
    runs = {step: part.run_step(step, batch, moves) for step in sample.steps} if sample.complete else None
    try:
        traced = build(part, batch, sample.steps, runs)
    except DiagramError as error:
        program = LayerProgram(reason=reason or str(error))
        return _Numbers(plain_diagram(part, batch, sample.steps), sample, program, drawn=False)
    if runs is not None:
        sources, tensors = value_sources(traced)
        program = trace_program(trace, part, batch, runs, tensors)
    return _Numbers(traced, sample, program, sources=sources)


def _computed_numbers(trace: Trace, part: LayerTrace, batch: int, length: int, limit: int) -> _Numbers:
    """Return what computes the numbers of all steps.

    Raises:
        NotComputableError: If the page can't compute them, or would be too large.
        DiagramError: If the first and the last step have different diagrams.
    """
    sizes = [interval for interval in INTERVALS if stored_values(part, length, interval) <= limit]
    if not sizes:
        raise NotComputableError(_SOME_NUMBERS)
    moves: dict[Any, Any] = {}
    ends = sorted({0, length - 1})
    runs = {step: part.run_step(step, batch, moves) for step in ends}
    traced = build(part, batch, ends, runs)
    sources, tensors = value_sources(traced)
    program = trace_program(trace, part, batch, runs, tensors)
    if program.reason is not None:
        raise NotComputableError(program.reason)
    first, last = traced.values[0], traced.values[-1]
    if not all(pieces or identical(a, b) for pieces, a, b in zip(sources, first, last, strict=True)):
        raise NotComputableError(_SOME_NUMBERS)
    computed = computed_steps(part, batch, length, sizes[0], program, StepNumbers(sources, first))
    one_step = replace(traced, steps=traced.steps[:1], values=[first])
    sample = PageSample(list(range(length)), parameters=True, complete=True)
    program = replace(program, program_of_step=[])  # of all steps the first one
    return _Numbers(one_step, sample, program, sources=sources, computed=computed)


def _maps(
    part: LayerTrace, diagram: Diagram, batch: int, length: int, order: Sequence[int]
) -> dict[str, Any]:
    """Return the heat maps of the input and of the quantities in a diagram.

    The units are in the given order. If a row of a map is the mean of several units, the map has a second
    version, ``byIndex``, with the units in index order.
    """
    values = {name: v[:length, batch].reshape(length, -1) for name, v in part.values.items()}
    names = [node.name for node in diagram.nodes if node.name in values and node.name != "x"]
    maps = {name: (values[name], feature_order(order, values[name].shape[1])) for name in names}
    x = part.input[:length, batch].reshape(length, -1)
    maps["x"] = (x, list(range(x.shape[1])))
    encoded = {
        name: encode_map(v, features)
        for name, (v, features) in maps.items()
        if not v.is_complex() and v.shape[1]
    }
    for name, one in encoded.items():
        in_order = list(range(len(one["featureOrder"])))
        if one["binFeatures"] > 1 and one["featureOrder"] != in_order:
            one["byIndex"] = encode_map(maps[name][0], in_order)
    return encoded


def _parameters(part: LayerTrace, sample: PageSample, diagram: Diagram) -> list[dict[str, Any]]:
    names = row_names(part.cell)
    return [
        {
            "name": name,
            "shape": list(shape),
            "values": encode_values(getattr(part.cell, name)) if sample.parameters else None,
            "rowNames": [_row_names(names, name, block, diagram) for block in names.blocks.get(name, ())],
        }
        for name, shape in part.cell.shapes().items()
    ]


def _row_names(names: RowNames, parameter: str, block: RowBlock, diagram: Diagram) -> dict[str, Any]:
    """Return the gate and the symbol of the rows of a parameter, as in the formulas of the diagram."""
    rows = (block.rows.start, block.rows.stop)
    gate = block.gate
    symbol = names.symbol(parameter, block)
    if names.is_split(parameter) and gate:
        in_formula = _gate_in_formula(diagram, parameter, rows) or gate
        symbol = rows_text(parameter, in_formula, rows)
        gate = in_formula if any(node.name == in_formula for node in diagram.nodes) else gate
    return {
        "gate": gate,
        "start": rows[0],
        "stop": rows[1],
        "firstUnit": block.first_unit,
        "symbol": symbol,
    }


def _gate_in_formula(diagram: Diagram, parameter: str, rows: tuple[int, int]) -> str:
    """Return what the formulas call some rows of a parameter, or an empty string."""
    for term in (term for node in diagram.nodes for term in node.terms):
        if (parameter, rows) in ((term.parameter, term.rows), (term.bias, term.bias_rows)):
            return term.gate
    return ""


def _gradient(part: LayerTrace, batch: int) -> dict[str, Any] | None:
    """Return the norms of the gradients at every step, or None if there are no gradients."""
    if not part.gradients:
        return None
    flows = {
        name: gradient_flow(part, name, batch)
        for name, values in part.gradients.items()
        if values.is_floating_point() and values.shape[2:].numel()
    }
    norms = {name: encode_values(torch.tensor(f.norms, dtype=torch.float64)) for name, f in flows.items()}
    radii = [
        {"name": name, "radius": format_number(radius)} for name, radius in spectral_radii(part.cell).items()
    ]
    summaries = [flows[name].summary for name in part.cell.state]
    sentences = [f"{summary[0].upper()}{summary[1:]}." for summary in summaries]
    return {"norms": norms, "radii": radii, "summaries": sentences}


def _omission_notes(part: LayerTrace, sample: PageSample, length: int) -> list[str]:
    """Describe what the page doesn't contain of a layer, and why."""
    where = f"layer {part.layer}, {part.direction}"
    notes = [
        f"{name} is not shown because its values are complex."
        for name, values in part.values.items()
        if values.is_complex()
    ]
    if len(sample.steps) < length:
        is_maximum = len(sample.steps) == MAX_STEPS
        reason = f"the maximum is {MAX_STEPS:,} steps" if is_maximum else "the trace is too large for a page"
        notes.append(
            f"This page contains {len(sample.steps):,} of the {length:,} time steps of {where}, "
            f"evenly spaced, because {reason}. The heat maps show means over all time steps."
        )
    if not sample.parameters:
        notes.append(
            f"This page does not contain the parameters of {where} because the trace is too large for a "
            "page. Use trace.explain in Python to see them."
        )
    return notes

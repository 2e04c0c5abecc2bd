"""The data of one layer for the page: its diagram, numbers, parameters and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.cells.descriptions import quantity_descriptions
from unrolled.diagram.graph import build
from unrolled.diagram.groups import fold
from unrolled.diagram.model import DiagramError
from unrolled.diagram.unfold import unfold
from unrolled.equations.formulas import formulas
from unrolled.page.diagram_data import diagram_data, drawing_data, value_sources
from unrolled.page.plain_diagram import plain_diagram
from unrolled.page.sampling import MAX_STEPS, PageSample, bin_means, encode_values, feature_order, unit_order
from unrolled.page.step_programs import program_data
from unrolled.tracing.explain import format_number
from unrolled.tracing.gradient_flow import gradient_flow, spectral_radii
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.row_names import row_names
from unrolled.tracing.step_graph import LayerProgram, trace_program
from unrolled.tracing.trace import Trace

_SOME_NUMBERS = "This page has only some of the numbers of the trace."


def layer_data(
    trace: Trace,
    part: LayerTrace,
    batch: int,
    length: int,
    limit: int,
    notes: list[str],
    rows: int = 1,
    order: LayerTrace | None = None,
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
        order: The layer whose similar units are together in the heat maps. By default, it is this one.

    Raises:
        ValueError: If a state is complex.
    """
    complex_names = [name for name, values in part.values.items() if values.is_complex()]
    notes += [f"{name} is not shown because its values are complex." for name in complex_names]
    reason = None
    try:
        first = build(part, batch, steps=[0])
    except DiagramError as error:
        reason, first = str(error), plain_diagram(part, batch, [0])
    per_step = rows * sum(value.numel() for value in first.values[0])
    sample = PageSample.within(part, length, per_step, limit)
    notes += _omission_notes(part, sample, length)
    traced, program = None, LayerProgram(reason=reason or _SOME_NUMBERS)
    sources: list[Any] = []
    if reason is None:
        moves: dict[Any, Any] = {}
        runs = {step: part.run_step(step, batch, moves) for step in sample.steps} if sample.complete else None
        try:
            traced = build(part, batch, sample.steps, runs)
        except DiagramError as error:
            program = LayerProgram(reason=str(error))
        if traced is not None and runs is not None:
            sources, tensors = value_sources(traced)
            program = trace_program(trace, part, batch, runs, tensors)
    shown = traced or plain_diagram(part, batch, sample.steps)
    return {
        "layer": part.layer,
        "direction": part.direction,
        "length": length,
        "steps": sample.steps,
        "descriptions": {"x": "input", **quantity_descriptions(type(part.cell))},
        "diagram": diagram_data(shown),
        "drawing": None if traced is None else drawing_data(unfold(fold(traced.diagram))),
        "equations": [] if traced is not None else [equation.math for equation in formulas(part.cell)],
        "parameters": _parameters(part, sample),
        "maps": None if sample.complete else _maps(part, batch, length, order or part),
        "gradient": _gradient(part, batch),
        "program": program_data(program),
        "valueSources": sources,
    }


def _maps(part: LayerTrace, batch: int, length: int, ordered: LayerTrace) -> dict[str, Any]:
    """Return the means of the quantities over bins of steps and units, with similar units together."""
    states = ordered.values[next(iter(ordered.cell.state))][:length, batch]
    order = unit_order(states.reshape(length, -1))
    values = {name: v[:length, batch].reshape(length, -1) for name, v in part.values.items()}
    values["x"] = part.input[:length, batch].reshape(length, -1)
    return {
        name: _map(v, list(range(v.shape[1])) if name == "x" else feature_order(order, v.shape[1]))
        for name, v in values.items()
        if not v.is_complex() and v.shape[1]
    }


def _map(values: Tensor, order: list[int]) -> dict[str, Any]:
    means, bin_steps, bin_features = bin_means(values[:, order])
    return {
        "binSteps": bin_steps,
        "binFeatures": bin_features,
        "rows": means.shape[1],
        "values": encode_values(means),
        "featureOrder": order,
    }


def _parameters(part: LayerTrace, sample: PageSample) -> list[dict[str, Any]]:
    names = row_names(part.cell)
    return [
        {
            "name": name,
            "shape": list(shape),
            "values": encode_values(getattr(part.cell, name)) if sample.parameters else None,
            "rowNames": [
                {
                    "gate": block.gate,
                    "start": block.rows.start,
                    "stop": block.rows.stop,
                    "firstUnit": block.first_unit,
                    "symbol": names.symbol(name, block),
                }
                for block in names.blocks.get(name, ())
            ],
        }
        for name, shape in part.cell.shapes().items()
    ]


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

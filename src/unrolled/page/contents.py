"""The data of the page of a trace, ready for JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import positive_int, size_of
from unrolled.cells.descriptions import quantity_descriptions
from unrolled.equations.formulas import formulas
from unrolled.equations.source import docstring_paragraphs, step_source
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.tensors import tensors
from unrolled.page.provenance import GraphEncoder
from unrolled.page.sampling import MAX_STEPS, PageSample, bin_means, encode_values, feature_order, unit_order
from unrolled.tracing.color_scales import color_ranges
from unrolled.tracing.colors import ColorScale
from unrolled.tracing.explain import format_number
from unrolled.tracing.gradient_flow import gradient_flow, spectral_radii
from unrolled.tracing.indexing import equal_up_to_rounding, normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.provenance import StepGraph
from unrolled.tracing.trace import Trace

INPUTS = ("numbers", "image")


def page_data(
    trace: Trace, batch: int, labels: Sequence[str] | None, inputs: str, title: str | None, limit: int
) -> dict[str, Any]:
    """Return the data of the page of a trace.

    Args:
        trace: The trace of any layer.
        batch: The row of the batch.
        labels: A label for each time step. None for the step numbers.
        inputs: How to draw the input: ``"numbers"`` or ``"image"``.
        title: The title of the page. None for the layer.
        limit: The maximum number of values on the page.

    Raises:
        IndexError: If there is no such row.
        TypeError: If ``labels`` or ``title`` has the wrong type.
        ValueError: If ``labels``, ``inputs`` or ``limit`` is invalid, if the row has no time steps, or if the
            trace doesn't contain the whole call.
    """
    first = trace.layers[0]
    first.check_whole("a page")
    batch = normalize_index("row", batch, first.input.shape[1])
    length = int(first.lengths[batch])
    if length == 0:
        raise ValueError(f"row {batch} has no time steps: choose another row with batch=")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title should be a str, got {title!r}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs should be {' or '.join(map(repr, INPUTS))}, got {inputs!r}")
    limit = positive_int("limit", limit)
    notes: list[str] = []
    layers = [_layer_data(part, batch, length, limit // len(trace.layers), notes) for part in trace.layers]
    rows = first.input.shape[1]
    return {
        "title": repr(trace.module) if title is None else title,
        "module": repr(trace.module),
        "cell": trace.recurrent.cell.__name__,
        "description": docstring_paragraphs(trace.recurrent.cell),
        "code": step_source(trace.recurrent.cell).rstrip().splitlines(),
        "comparison": _comparison_with_torch(trace),
        "labels": None if labels is None else _check_labels(labels, length),
        "inputs": inputs,
        "row": batch if rows > 1 else None,
        "batchSize": rows,
        "dropout": trace.recurrent.training and trace.recurrent.dropout > 0,
        "length": length,
        "notes": list(dict.fromkeys(notes)),
        "layers": layers,
    }


def _check_labels(labels: Sequence[str], length: int) -> list[str]:
    if isinstance(labels, (bytes, Mapping)) or not isinstance(labels, Iterable):
        raise TypeError(
            f"labels should be an iterable of strings, one per time step, got {type(labels).__name__}"
        )
    texts = [str(label) for label in labels]
    if len(texts) != length:
        raise ValueError(f"labels should have one entry per time step ({length}), got {len(texts)}")
    return texts


def _comparison_with_torch(trace: Trace) -> dict[str, str]:
    """Compare the trace with the equivalent layer of torch.nn, and describe the result."""
    equivalent = drop_in_layer(trace.recurrent.cell)
    if equivalent is None or not trace.recurrent.plain:
        return {"status": "none", "text": "torch.nn has no equivalent layer to compare with."}
    name = f"torch.nn.{equivalent.torch_class.__name__}"
    try:
        difference = trace.check()
    except ValueError as error:  # such as a trace of some rows of the batch
        return {"status": "none", "text": f"{str(error)[0].upper()}{str(error)[1:]}."}
    states = [part[state] for part in trace.layers for state in part.cell.state]
    largest = max(float(t.nan_to_num(0, 0, 0).abs().max()) for t in (trace.layers[-1].input, *states))
    eps = torch.finfo(trace.layers[0].input.dtype).eps
    counts = [sum(part.numel() for part in tensors(of)) for of in (trace.output, trace.final_state)]
    compared = f"the {counts[0]:,} output values and the {counts[1]:,} values of the final state"
    if difference <= 100 * eps * max(1.0, largest):
        rounding = f"differ by at most {difference:.1e}, which is rounding error"
        agreement = rounding if difference else "are bit-identical"
        return {"status": "same", "text": f"{name} gives the same result: {compared} {agreement}."}
    return {
        "status": "different",
        "text": f"{name} gives a different result: the values differ by up to {difference:.1e}.",
    }


def _layer_data(part: LayerTrace, batch: int, length: int, limit: int, notes: list[str]) -> dict[str, Any]:
    """Return the data of one layer in one direction, and append notes about omissions to ``notes``."""
    sample = PageSample.within(part, length, limit)
    complex_names = [name for name, values in part.values.items() if values.is_complex()]
    shown = {name: v for name, v in part.values.items() if name not in complex_names and v[0, 0].numel()}
    for name in part.cell.state:
        if name in complex_names:
            raise ValueError(
                f"a page can't show the state {name} of {type(part.cell).__name__} because it is complex: "
                "split it into two states, its real and its imaginary part"
            )
    notes += [f"{name} is not shown because its values are complex." for name in complex_names]
    notes += _omission_notes(part, sample, length)
    tensors_by_key = {"input": part.input, **{f"quantity {name}": values for name, values in shown.items()}}
    values_by_key = {key: v[:length, batch].reshape(length, -1) for key, v in tensors_by_key.items()}
    order = unit_order(values_by_key[f"quantity {next(iter(part.cell.state))}"])
    equations = formulas(part.cell)
    descriptions = {"input": "input", **quantity_descriptions(type(part.cell))}
    shared_range, own_ranges = color_ranges([part], length, batch)
    own_ranges["input"] = ColorScale.of([values_by_key["input"]]).largest
    units = max(part.cell.hidden, *part.cell.state_sizes().values())
    quantities = []
    for key, values in values_by_key.items():
        name, size = key.removeprefix("quantity "), values.shape[1]
        block_size = (units if size % units == 0 else size) or 1
        quantities.append(
            {
                "key": key,
                "description": descriptions.get(name, ""),
                "size": size,
                "ownRange": own_ranges.get(name),
                "hasBlocks": key != "input" and size > units,
                "blockSize": block_size,
                "blockNames": [_block_name(part, name, k, block_size) for k in range(0, size, block_size)],
                "shape": list(tensors_by_key[key].shape[2:]),
                "values": encode_values(values[sample.steps]),
                "heatMap": None if sample.complete else _heat_map(values, order),
                "equations": [k for k, equation in enumerate(equations) if name in equation.names],
            }
        )
    states_before = [part.state_before(step, batch) for step in sample.steps]
    return {
        "layer": part.layer,
        "direction": part.direction,
        "states": list(part.cell.state),
        "steps": sample.steps,
        "complete": sample.complete,
        "unitOrder": order,
        "sharedRange": shared_range,
        "units": units,
        "quantities": quantities,
        "stateBefore": {
            name: encode_values(torch.stack([states[name].flatten() for states in states_before]))
            for name in part.cell.state
        },
        "parameters": _parameters(part, sample),
        "equations": [
            {"firstLine": equation.first_line, "lastLine": equation.last_line, "math": equation.math}
            for equation in equations
        ],
        "gradient": _gradient(part, batch),
        **_step_graphs(part, batch, sample, list(shown)),
    }


def _block_name(part: LayerTrace, name: str, start: int, size: int) -> str:
    """Return the gate of some rows of a quantity, or the range of the rows if they belong to none."""
    block = part.row_names.block(name, start)
    return block.gate if block.gate and len(block.rows) == size else f"{start}–{start + size - 1}"


def _omission_notes(part: LayerTrace, sample: PageSample, length: int) -> list[str]:
    """Describe what the page doesn't contain of a layer, and why."""
    where = f"layer {part.layer}, {part.direction}"
    notes = []
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


def _heat_map(values: Tensor, unit_order: Sequence[int]) -> dict[str, Any]:
    order = feature_order(unit_order, values.shape[1])
    means, bin_steps, bin_features = bin_means(values[:, order])
    return {
        "binSteps": bin_steps,
        "binFeatures": bin_features,
        "rows": means.shape[1],
        "values": encode_values(means),
        "featureOrder": order,
    }


def _parameters(part: LayerTrace, sample: PageSample) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(shape),
            "sizeNames": [_size_name(str(size), part) for size in part.cell.params()[name].shape],
            "values": encode_values(getattr(part.cell, name)) if sample.parameters else None,
        }
        for name, shape in part.cell.shapes().items()
        if not getattr(part.cell, name).is_complex()
    ]


def _size_name(size: str, part: LayerTrace) -> str:
    """Return the size of an axis as the cell spells it.

    Of alternatives such as ``proj_size or hidden``, return the one that this layer uses.
    """
    if " or " not in size or "(" in size:
        return size
    options = {name: value for name, value in part.cell.chosen_options().items() if isinstance(value, int)}
    sizes = {**options, "input": part.cell.input, "hidden": part.cell.hidden}
    return next((alternative for alternative in size.split(" or ") if size_of(alternative, sizes)), size)


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


def _step_graphs(part: LayerTrace, batch: int, sample: PageSample, names: Sequence[str]) -> dict[str, Any]:
    """Return the computation graph of every sampled step. Steps with equal graphs share their data."""
    graph_indices: dict[str, int] = {}
    tensor_indices: dict[str, int] = {}  # of tensors without a name; many are the same at every step
    moves: dict[Any, Any] = {}
    run_cache: dict[int, Any] = {}
    parameters = {id(getattr(part.cell, name)): f"parameter {name}" for name in part.cell.shapes()}
    steps = []
    for step in sample.steps:
        graph = part.derivations(step, batch, moves)
        states = {id(state): f"before {name}" for name, state in graph.state_before.items()}
        hidden = {name: node for name, node in graph.nodes.items() if name not in names}
        encoder = GraphEncoder({**parameters, **states, id(graph.input): "input"}, hidden, run_cache)
        roots = {name: encoder.add(graph.nodes[name]) for name in names if name in graph.nodes}
        graph_json = json.dumps({"nodes": encoder.nodes, "roots": roots})
        unnamed = [json.dumps(encode_values(tensor)) for tensor in encoder.unnamed]
        steps.append(
            {
                "graph": graph_indices.setdefault(graph_json, len(graph_indices)),
                "unnamed": [tensor_indices.setdefault(text, len(tensor_indices)) for text in unnamed],
                "notReproduced": _unreproduced_elements(part, graph, step, batch, names),
            }
        )
    return {
        "graphs": [json.loads(text) for text in graph_indices],
        "unnamedTensors": [json.loads(text) for text in tensor_indices],
        "stepGraphs": steps,
    }


def _unreproduced_elements(
    part: LayerTrace, graph: StepGraph, step: int, batch: int, names: Sequence[str]
) -> dict[str, list[int]]:
    """Return the elements that running the step again, for one row, doesn't reproduce, such as noise.

    Their arithmetic is not shown.
    """
    unreproduced = {}
    for name in names:
        recorded = part.values[name][step, batch].flatten()
        recomputed = graph.nodes[name].numbers.flatten() if name in graph.nodes else recorded[:0]
        agrees = (
            equal_up_to_rounding(recomputed, recorded)
            if recomputed.shape == recorded.shape
            else torch.zeros_like(recorded, dtype=torch.bool)
        )
        if not agrees.all():
            unreproduced[name] = (~agrees).nonzero().flatten().tolist()
    return unreproduced

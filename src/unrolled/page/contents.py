"""What stands on the page of a trace, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import size_of, whole
from unrolled.equations.formulas import formulas
from unrolled.equations.source import equations, meanings, prose
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.tensors import tensors
from unrolled.page.provenance import Exporter
from unrolled.page.sampling import STEPS, Kept, binned, packed, spread_order, unit_order
from unrolled.tracing.color_scales import ranges
from unrolled.tracing.colors import Scale
from unrolled.tracing.explain import number
from unrolled.tracing.gradient_flow import flow, spectral_radii
from unrolled.tracing.indexing import position, same
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.provenance import Derivations
from unrolled.tracing.trace import Trace

INPUTS = ("numbers", "image")


def contents(
    trace: Trace, batch: int, labels: Sequence[str] | None, inputs: str, title: str | None, room: int
) -> dict[str, Any]:
    """Everything that the page of a trace shows, as what JSON can say.

    Args:
        trace: of any layer.
        batch: the row.
        labels: of the time steps; None: their numbers.
        inputs: ``"numbers"`` or ``"image"``.
        title: of the page; None: the layer.
        room: how many numbers are kept at most.

    Raises:
        IndexError: there is no such row.
        TypeError, ValueError: labels or inputs that can't be used, or a trace that hasn't all of its call.
    """
    first = trace.layers[0]
    first.check_whole("a page")
    batch = position("row", batch, first.input.shape[1])
    length = int(first.lengths[batch])
    if length == 0:
        raise ValueError(f"row {batch} has no time step: choose another one with batch=")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title should be of type str, got {title!r}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs should be {' or '.join(map(repr, INPUTS))}, got {inputs!r}")
    room = whole("limit", room)
    notes: list[str] = []
    parts = [_part(part, batch, length, room // len(trace.layers), notes) for part in trace.layers]
    rows = first.input.shape[1]
    return {
        "title": repr(trace.module) if title is None else title,
        "module": repr(trace.module),
        "cell": trace.recurrent.cell.__name__,
        "words": prose(trace.recurrent.cell),
        "code": equations(trace.recurrent.cell).rstrip().splitlines(),
        "check": _check(trace),
        "labels": None if labels is None else _labels(labels, length),
        "inputs": inputs,
        "row": batch if rows > 1 else None,
        "rows": rows,
        "dropout": trace.recurrent.training and trace.recurrent.dropout > 0,
        "length": length,
        "notes": list(dict.fromkeys(notes)),
        "parts": parts,
    }


def _labels(labels: Sequence[str], length: int) -> list[str]:
    if isinstance(labels, (bytes, Mapping)) or not isinstance(labels, Iterable):
        raise TypeError(f"labels should be texts, one for each time step, got {type(labels).__name__}")
    texts = [str(label) for label in labels]
    if len(texts) != length:
        raise ValueError(f"labels should be one for each of the {length} time steps, got {len(texts)}")
    return texts


def _check(trace: Trace) -> dict[str, str]:
    """The comparison with torch.nn in plain words."""
    ours = drop_in_layer(trace.recurrent.cell)
    if ours is None or not trace.recurrent.plain:
        return {"state": "none", "text": "torch.nn has no layer that computes this: nothing to compare with."}
    name = f"torch.nn.{ours.torch_class.__name__}"
    try:
        difference = trace.check()
    except ValueError as error:  # of some rows of a batch there may be nothing to compare with
        return {"state": "none", "text": f"{str(error)[0].upper()}{str(error)[1:]}."}
    most = max(
        float(part.nan_to_num(0, 0, 0).abs().max()) for part in (trace.layers[-1].input, *_states(trace))
    )
    eps = torch.finfo(trace.layers[0].input.dtype).eps
    counts = [sum(part.numel() for part in tensors(of)) for of in (trace.output, trace.final_state)]
    compared = f"the {counts[0]:,} numbers of the output and the {counts[1]:,} of the final state"
    if difference <= 100 * eps * max(1.0, most):
        words = f"among {compared} the largest difference is {difference:.1e}, no more than rounding"
        words = words if difference else f"{compared} are equal to the last bit"
        return {"state": "same", "text": f"{name} gives the same numbers: {words}."}
    return {
        "state": "different",
        "text": f"{name} gives other numbers: they differ by up to {difference:.1e}.",
    }


def _states(trace: Trace) -> list[Tensor]:
    return [part[name] for part in trace.layers for name in part.cell.state]


def _part(part: LayerTrace, batch: int, length: int, room: int, notes: list[str]) -> dict[str, Any]:
    """One layer in one direction."""
    kept = Kept.of(part, length, room)
    complex_ones = [name for name, values in part.values.items() if values.is_complex()]
    shown = {name: v for name, v in part.values.items() if name not in complex_ones and v[0, 0].numel()}
    for name in part.cell.state:
        if name in complex_ones:
            raise ValueError(
                f"a page shows real numbers, and the state {name} of {type(part.cell).__name__} is complex: "
                "keep its real and imaginary part as states of their own"
            )
    notes += [f"{name} is not shown: its numbers are complex." for name in complex_ones]
    if not kept.all:
        notes += _left_out(part, kept, length)
    everything = {"input": part.input, **{f"quantity {name}": values for name, values in shown.items()}}
    rows = {key: values[:length, batch].reshape(length, -1) for key, values in everything.items()}
    order = unit_order(rows[f"quantity {next(iter(part.cell.state))}"])
    equation = formulas(part.cell)
    words = {"input": "the input", **meanings(type(part.cell))}
    shared, own = ranges([part], length, batch)
    own["input"] = Scale.of([rows["input"]]).largest
    units = max(part.cell.hidden, *part.cell.state_sizes().values())
    return {
        "layer": part.layer,
        "direction": part.direction,
        "states": list(part.cell.state),
        "steps": kept.steps,
        "all": kept.all,
        "order": order,
        "most": shared,
        "units": units,
        "quantities": [
            {
                "key": key,
                "words": words.get(key.removeprefix("quantity "), ""),
                "size": values.shape[1],
                "own": own.get(key.removeprefix("quantity ")),
                "wide": key != "input" and values.shape[1] > units,
                "block": units if values.shape[1] % units == 0 else values.shape[1],
                "shape": list(everything[key].shape[2:]),
                "values": packed(values[kept.steps]),
                "heat": None if kept.all else _heat(values, order),
                "lines": [k for k, one in enumerate(equation) if key.removeprefix("quantity ") in one.names],
            }
            for key, values in rows.items()
        ],
        "before": {
            name: packed(torch.stack([part.state_before(step, batch)[name].flatten() for step in kept.steps]))
            for name in part.cell.state
        },
        "parameters": _parameters(part, kept),
        "equations": [{"line": one.line, "last": one.last, "math": one.math} for one in equation],
        "gradient": _gradient(part, batch),
        **_derivations(part, batch, kept, list(shown)),
    }


def _left_out(part: LayerTrace, kept: Kept, length: int) -> list[str]:
    where = f"layer {part.layer}, {part.direction}"
    notes = []
    if len(kept.steps) < length:
        reason = (
            f"A page has {STEPS:,} time steps at most" if len(kept.steps) == STEPS else "Too large for a page"
        )
        notes.append(
            f"{reason}: of the {length:,} time steps of {where}, {len(kept.steps):,} are kept "
            "with every number, evenly spread; the heat maps show means over bins of all of them."
        )
    if not kept.parameters:
        notes.append(f"Too large for a page: the parameters of {where} are left out; trace.explain has them.")
    return notes


def _heat(values: Tensor, order: Sequence[int]) -> dict[str, Any]:
    spread = spread_order(order, values.shape[1])
    grid, tall, wide = binned(values[:, spread])
    return {"steps": tall, "features": wide, "size": grid.shape[1], "values": packed(grid), "order": spread}


def _parameters(part: LayerTrace, kept: Kept) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(shape),
            "sizes": [_said(str(size), part) for size in part.cell.params()[name].shape],
            "values": packed(getattr(part.cell, name)) if kept.parameters else None,
        }
        for name, shape in part.cell.shapes().items()
        if not getattr(part.cell, name).is_complex()
    ]


def _said(size: str, part: LayerTrace) -> str:
    """The size of an axis as its cell has it; of ``proj_size or hidden`` the one that this layer takes."""
    if " or " not in size or "(" in size:
        return size
    options = {name: value for name, value in part.cell.chosen_options().items() if isinstance(value, int)}
    sizes = {**options, "input": part.cell.input, "hidden": part.cell.hidden}
    return next((one for one in size.split(" or ") if size_of(one, sizes)), size)


def _gradient(part: LayerTrace, batch: int) -> dict[str, Any] | None:
    """How large ∂loss/∂quantity is at every step."""
    if not part.gradients:
        return None
    flows = {
        name: flow(part, name, batch)
        for name, values in part.gradients.items()
        if values.is_floating_point() and values.shape[2:].numel()
    }
    norms = {name: packed(torch.tensor(one.norms, dtype=torch.float64)) for name, one in flows.items()}
    radii = [
        {"name": name, "radii": [number(radius) for radius in found]}
        for name, found in spectral_radii(part.cell).items()
    ]
    told = [flows[name].words for name in part.cell.state]
    words = [f"{text[0].upper()}{text[1:]}." for text in told]
    return {"norms": norms, "radii": radii, "words": words}


def _derivations(part: LayerTrace, batch: int, kept: Kept, names: Sequence[str]) -> dict[str, Any]:
    """How the numbers of every kept step are made; steps that are made alike share the data."""
    graphs: dict[str, int] = {}
    tensors: dict[str, int] = {}  # without a name; many are the same at every step
    moves: dict[Any, Any] = {}
    runs: dict[int, Any] = {}
    parameters = {id(getattr(part.cell, name)): f"parameter {name}" for name in part.cell.shapes()}
    steps = []
    for step in kept.steps:
        found = part.derivations(step, batch, moves)
        known = {id(state): f"before {name}" for name, state in found.before.items()}
        hidden = {name: node for name, node in found.made.items() if name not in names}
        exporter = Exporter({**parameters, **known, id(found.input): "input"}, hidden, runs)
        roots = {name: exporter.add(found.made[name]) for name in names if name in found.made}
        graph = json.dumps({"nodes": exporter.nodes, "roots": roots})
        unnamed = [json.dumps(packed(tensor)) for tensor in exporter.unnamed]
        steps.append(
            {
                "graph": graphs.setdefault(graph, len(graphs)),
                "unnamed": [tensors.setdefault(text, len(tensors)) for text in unnamed],
                "alone": _alone(part, found, step, batch, names),
            }
        )
    return {
        "graphs": [json.loads(text) for text in graphs],
        "unnamed": [json.loads(text) for text in tensors],
        "made": steps,
    }


def _alone(
    part: LayerTrace, found: Derivations, step: int, batch: int, names: Sequence[str]
) -> dict[str, list[int]]:
    """The numbers that the step, run for the row alone, doesn't give again: they stand for themselves."""
    alone = {}
    for name in names:
        there = part.values[name][step, batch].flatten()
        again = found.made[name].numbers.flatten() if name in found.made else there[:0]
        agree = (
            same(again, there) if again.shape == there.shape else torch.zeros_like(there, dtype=torch.bool)
        )
        if not agree.all():
            alone[name] = (~agree).nonzero().flatten().tolist()
    return alone

"""The data of the page of a trace, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from unrolled.cells.base import positive_int
from unrolled.equations.source import docstring_paragraphs
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.tensors import tensors
from unrolled.page.layer_data import layer_data, share_inputs
from unrolled.page.text_values import text_values
from unrolled.tracing.findings import Finding, where
from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.trace import Trace

INPUTS = ("numbers", "image")


def page_data(
    trace: Trace,
    batch: int,
    labels: Sequence[str] | None,
    inputs: str,
    title: str | None,
    limit: int,
    predictions: Sequence[object] | None = None,
) -> dict[str, Any]:
    """Return the data of the page of a trace.

    Args:
        trace: The trace of any layer.
        batch: The row of the batch.
        labels: A label for each time step. None for the step numbers.
        inputs: How to draw the input: ``"numbers"`` or ``"image"``.
        title: The title of the page. None for the layer.
        limit: The maximum number of values on the page.
        predictions: What the model predicts after each time step, as texts or numbers.

    Raises:
        IndexError: If there is no such row.
        TypeError: If ``labels``, ``predictions`` or ``title`` has the wrong type.
        ValueError: If ``labels``, ``predictions``, ``inputs`` or ``limit`` is invalid, if the row has no time
            steps, or if the trace doesn't contain the whole call.
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
    rows = first.input.shape[1]
    report = trace.health()
    notes: list[str] = []
    layers = [
        layer_data(trace, part, batch, length, limit // len(trace.layers), notes) for part in trace.layers
    ]
    share_inputs(trace, layers, batch, length)
    if labels is not None:
        for part, layer in zip(trace.layers, layers, strict=True):
            if len(layer["steps"]) < length or layer.get("computed") is not None:
                layer["text"] = text_values(part, batch, length, limit // len(layers))
    return {
        "title": repr(trace.module) if title is None else title,
        "summary": _summary(trace, length),
        "shortName": _short_name(trace),
        "cell": trace.recurrent.cell.__name__,
        "labels": None if labels is None else _texts("labels", labels, length),
        "predictions": None if predictions is None else _texts("predictions", predictions, length),
        "row": batch if rows > 1 else None,
        "batchSize": rows,
        "notes": list(dict.fromkeys(notes)),
        "inputs": inputs,
        "description": docstring_paragraphs(trace.recurrent.cell),
        "comparison": _comparison_with_torch(trace),
        "health": {
            "findings": [_finding(trace, one, batch) for one in report],
            "checked": list(report.checked),
        },
        "layers": layers,
    }


def _finding(trace: Trace, finding: Finding, batch: int) -> dict[str, Any]:
    """Return a finding, and the number on the page that shows it, if there is one."""
    places = [(part.layer, part.direction) for part in trace.layers]
    index = places.index((finding.layer, finding.direction))
    part = trace.layers[index]
    number = None
    if finding.parameter is not None:
        name, row = finding.parameter
        number = {"q": name, "u": row} | ({"j": 0} if len(part.cell.shapes()[name]) > 1 else {})
    elif finding.quantity in ("x", *part.values) and finding.steps and batch in (finding.rows or (batch,)):
        number = {"q": finding.quantity, "t": finding.steps[0], "u": finding.units[0] if finding.units else 0}
    return {
        "message": where(finding) + finding.message,
        "severity": finding.severity,
        "layer": index,
        "number": number,
    }


def _texts(name: str, values: Sequence[object], length: int) -> list[str]:
    """Return the entries of an argument as texts, one for each time step."""
    if isinstance(values, (bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} should be an iterable of strings, one per time step, got {type(values).__name__}"
        )
    texts = [str(value) for value in values]
    if len(texts) != length:
        raise ValueError(f"{name} should have one entry per time step ({length}), got {len(texts)}")
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


def _short_name(trace: Trace) -> str:
    """Return how the layer is called in a sentence: nn.LSTM, or the name of the cell."""
    equivalent = drop_in_layer(trace.recurrent.cell)
    return trace.recurrent.cell.__name__ if equivalent is None else f"nn.{equivalent.torch_class.__name__}"


def _summary(trace: Trace, length: int) -> str:
    """Describe the sizes of a layer in one line."""

    def plural(count: int, noun: str) -> str:
        return f"{count} {noun}{'' if count == 1 else 's'}"

    first = trace.layers[0]
    directions = len({part.direction for part in trace.layers})
    layers = plural(len(trace.layers) // directions, "layer") + (
        " in both directions" if directions > 1 else ""
    )
    sizes = [
        plural(first.input.shape[-1], "input"),
        plural(first.cell.hidden, "hidden unit"),
        plural(length, "step"),
    ]
    return f"{layers}, {', '.join(sizes)}"

"""The data of the page of a trace, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from unrolled import cells
from unrolled.cells.base import Cell, positive_int
from unrolled.cells.descriptions import docstring_paragraphs
from unrolled.layers.convert import drop_in_layer
from unrolled.layers.tensors import tensors
from unrolled.page.comparison import baseline_differences, check_comparable, comparison_summary
from unrolled.page.layer_data import layer_data, share_inputs
from unrolled.page.rows import RowChoice, as_list, differences
from unrolled.page.sampling import unit_order
from unrolled.page.text_values import text_values
from unrolled.tracing.findings import Finding, HealthReport, where
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

INPUTS = ("numbers", "image")


def page_data(
    trace: Trace,
    batch: int | Iterable[int] | None,
    labels: Sequence[Any] | None,
    inputs: str,
    title: str | None,
    limit: int,
    predictions: Sequence[Any] | None = None,
    baseline: Trace | None = None,
) -> dict[str, Any]:
    """Return the data of the page of a trace.

    Args:
        trace: The trace of any layer.
        batch: The row of the batch, or several rows. None for the first rows, as many as fit.
        labels: A label for each time step, or a list of them for each row. None for the step numbers.
        inputs: How to draw the input: ``"numbers"`` or ``"image"``.
        title: The title of the page. None for the layer.
        limit: The maximum number of values on the page.
        predictions: What the model predicts after each time step, as texts or numbers, or a list of them for
            each row.
        baseline: The trace to compare it with, or None.

    Raises:
        IndexError: If there is no such row.
        TypeError: If an argument has the wrong type.
        ValueError: If ``batch``, ``labels``, ``predictions``, ``inputs`` or ``limit`` is invalid, a row has
            no time steps, or the trace doesn't contain the whole call.
    """
    first = trace.layers[0]
    first.check_whole("a page", chained=False)
    lengths = first.lengths.tolist()
    label_list = None if labels is None else as_list("labels", labels)
    prediction_list = None if predictions is None else as_list("predictions", predictions)
    report = trace.health()
    choice = RowChoice.of(batch, lengths, (label_list, prediction_list), _row_with_error(trace, report))
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title should be a str, got {title!r}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs should be {' or '.join(map(repr, INPUTS))}, got {inputs!r}")
    limit = positive_int("limit", limit)
    row_labels = choice.texts("labels", label_list, lengths)
    row_predictions = choice.texts("predictions", prediction_list, lengths)
    if baseline is not None:
        check_comparable(trace, baseline)
    layer_limit = limit // len(trace.layers) // (1 if baseline is None else 2)
    notes: list[str] = []
    first_row = choice.rows[0]
    orders = [_unit_order(part, first_row, lengths[first_row]) for part in trace.layers]

    def layers(of: Trace, row: int, count: int) -> list[dict[str, Any]]:
        data = [
            layer_data(of, part, row, lengths[row], layer_limit, notes, count, order, row == first_row)
            for part, order in zip(of.layers, orders, strict=True)
        ]
        share_inputs(of, data, row, lengths[row])
        if labels is not None:
            for part, layer in zip(of.layers, data, strict=True):
                if len(layer["steps"]) < lengths[row] or layer["computed"] is not None:
                    layer["text"] = text_values(part, row, lengths[row], layer_limit)
        return data

    def row_data(row: int, count: int) -> dict[str, Any]:
        return {
            "row": row if len(lengths) > 1 else None,
            "summary": _summary(trace, lengths[row]),
            "labels": row_labels[row],
            "predictions": row_predictions[row],
            "layers": layers(trace, row, count),
        }

    data = row_data(first_row, len(choice.rows) if choice.is_chosen else 1)
    sizes = [
        (sum(math.prod(shape) for shape in part.cell.shapes().values()), sum(layer["diagram"]["sizes"]))
        for part, layer in zip(trace.layers, data["layers"], strict=True)
    ]
    rows = choice.fitting(lengths, sizes, layer_limit)
    others = [differences(data, row_data(row, len(rows))) for row in rows[1:]]
    if baseline is not None:
        first_baseline = {"layers": layers(baseline, rows[0], len(rows))}
        data["baseline"] = baseline_differences(data, first_baseline) | {
            "summary": comparison_summary(trace, baseline, rows, data["layers"])
        }
        for row, other in zip(rows[1:], others, strict=True):
            other["baseline"] = differences(first_baseline, {"layers": layers(baseline, row, len(rows))})
    return {
        **data,
        "rows": others,
        "batchSize": len(lengths),
        "title": repr(trace.module) if title is None else title,
        "shortName": _short_name(trace),
        "cell": trace.recurrent.cell.__name__,
        "notes": list(dict.fromkeys(notes)),
        "inputs": inputs,
        "description": docstring_paragraphs(trace.recurrent.cell),
        "documentation": _documentation(trace.recurrent.cell),
        "comparison": _comparison_with_torch(trace),
        "health": {
            "findings": [_finding(trace, one, rows) for one in report],
            "checked": list(report.checked),
            "notChecked": list(report.not_checked),
        },
    }


def _unit_order(part: LayerTrace, row: int, length: int) -> list[int]:
    """Return the units of a layer in an order that groups units with similar outputs."""
    output = part.values[next(iter(part.cell.state))][:length, row].reshape(length, -1)
    return list(range(output.shape[1])) if output.is_complex() else unit_order(output)


def _finding(trace: Trace, finding: Finding, rows: Sequence[int]) -> dict[str, Any]:
    """Return a finding, and the number on the page that shows it, if there is one.

    Args:
        trace: The trace.
        finding: The finding.
        rows: The rows on the page.
    """
    places = [(part.layer, part.direction) for part in trace.layers]
    index = places.index((finding.layer, finding.direction))
    part = trace.layers[index]
    number, row, missing = _number_of(part, finding, rows)
    return {
        "place": where(finding).removesuffix(": "),
        "message": finding.message,
        "severity": finding.severity,
        "layer": index,
        "number": number,
        "row": row,
        "missing": missing,
    }


def _number_of(
    part: LayerTrace, finding: Finding, rows: Sequence[int]
) -> tuple[dict[str, Any] | None, int | None, str | None]:
    """Return the number that shows a finding, its row, and what to say if that row isn't on the page."""
    batch = part.input.shape[1]
    located = [(name, index) for name, index in finding.locations if name in ("x", *part.values)]
    if located:
        name, (step, row, unit) = next((one for one in located if one[1][1] in rows), located[0])
        if row not in rows:
            return None, None, f"Row {row} isn't on this page. Use to_html(batch={row}) to see it."
        return {"q": name, "t": step, "u": unit}, row if batch > 1 else None, None
    if finding.locations:
        name, (first, *others) = finding.locations[0]
        return {"q": name, "u": first} | ({"j": others[0]} if others else {}), None, None
    if finding.parameter is not None:
        name, parameter_row = finding.parameter
        column = {"j": 0} if len(part.cell.shapes()[name]) > 1 else {}
        return {"q": name, "u": parameter_row} | column, None, None
    if finding.quantity not in ("x", *part.values) or not finding.steps:
        return None, None, None
    number = {"q": finding.quantity, "t": finding.steps[0], "u": finding.units[0] if finding.units else 0}
    return number, None, None


def _row_with_error(trace: Trace, report: HealthReport) -> int | None:
    """Return the row in which the worst finding is, such as the first NaN; None if it isn't an error."""
    if not report or report[0].severity != "error" or not report[0].rows:
        return None
    finding: Finding = report[0]
    return finding.locations[0][1][1] if finding.locations else finding.rows[0]


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


def _documentation(cell: type[Cell]) -> list[str]:
    """Return what Python's ``help`` knows about the page."""
    is_published = getattr(cells, cell.__name__, None) is cell
    return [*([f"unrolled.cells.{cell.__name__}"] if is_published else []), "unrolled.Trace"]


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

"""The data of the page of a model: its recurrent layers in the order of their calls, and their pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from unrolled.page.contents import page_data
from unrolled.page.rows import RowChoice, as_list
from unrolled.tracing.call_order import ModuleCall
from unrolled.tracing.record import Record
from unrolled.tracing.trace import Trace


def model_data(
    record: Record,
    batch: int | Iterable[int] | None,
    labels: Sequence[Any] | None,
    title: str | None,
    limit: int,
) -> dict[str, Any]:
    """Return the data of the page of a model; that of a single layer if only one call was recorded.

    Args:
        record: The recorded calls.
        batch: The row of the batch, or several rows. None for the first rows, as many as fit.
        labels: A label for each time step, or a list of them for each row, for the layers that they fit.
        title: The title of the page. None for the class of the model.
        limit: The maximum number of values on the page.

    Raises:
        ValueError: If nothing was recorded, no layer has a page, or the labels fit no layer.
        IndexError, TypeError: As for :func:`unrolled.page.contents.page_data`.
    """
    calls = record.call_order
    counts = {call.name: call.number for call in calls}  # the last call of a module has the largest number
    traces = [
        (call.name if counts[call.name] == 1 else f"{call.name}, call {call.number}", call.trace)
        for call in calls
        if call.trace is not None
    ]
    if not traces:
        raise ValueError("nothing was recorded: call the model inside of the with block first")
    if title is None and len(traces) > 1:
        title = type(record.model).__name__
    batch = list(batch) if isinstance(batch, Iterable) and not isinstance(batch, str) else batch
    label_list = None if labels is None else as_list("labels", labels)
    reasons: dict[str, str | None] = {}
    if label_list is not None:
        reasons = {name: _misfit(trace, batch, label_list) for name, trace in traces}
    if reasons and all(reasons.values()):
        raise ValueError("; ".join(f"{name!r}: {reason}" for name, reason in reasons.items()))
    pages: list[dict[str, Any]] = []
    page_of: dict[int, int] = {}
    errors: dict[int, str] = {}
    for name, trace in traces:
        page_title = title if len(traces) == 1 else f"{name}: {trace.module!r}"
        shown_labels = None if reasons.get(name) else label_list
        try:
            data = page_data(trace, batch, shown_labels, "numbers", page_title, limit // len(traces))
        except ValueError as error:  # such as a trace without some of the steps
            if len(traces) == 1:
                raise
            errors[id(trace)] = str(error)
            continue
        page_of[id(trace)] = len(pages)
        pages.append({**data, "call": name})
    if not pages:
        raise ValueError(next(iter(errors.values())))
    if len(traces) == 1:
        return pages[0]
    return {
        "title": title,
        "calls": [_call(call, counts, page_of, errors) for call in calls],
        "missing": [
            {"name": name, "reason": reason}
            for name, reason in record.not_recorded.items()
            if name not in counts
        ],
        "pages": pages,
    }


def _misfit(trace: Trace, batch: int | Iterable[int] | None, labels: list[Any]) -> str | None:
    """Return why labels don't fit a trace, or None if they do."""
    lengths = trace.layers[0].lengths.tolist()
    try:
        RowChoice.of(batch, lengths, (labels,)).texts("labels", labels, lengths)
    except ValueError as error:
        return str(error)
    return None


def _call(
    call: ModuleCall, counts: dict[str, int], page_of: dict[int, int], errors: dict[int, str]
) -> dict[str, Any]:
    """Return what the page shows of a call. A recurrent layer's call without a page has a reason."""
    reason = call.not_recorded
    if call.is_recurrent and reason is None:
        reason = (
            errors.get(id(call.trace)) if call.trace else "only later calls were kept: see record(calls=)"
        )

    def source(text: str | None) -> str | None:
        return f"{text}, call 1" if counts.get(text or "", 1) > 1 else text

    return {
        "name": call.name,
        "module": call.module,
        "isRecurrent": call.is_recurrent,
        "number": call.number,
        "count": counts[call.name],
        "input": call.input if call.steps == 1 else f"{call.steps} × {call.input}",
        "inputFrom": source(call.input_from),
        "output": call.output,
        "initialState": call.initial_state,
        "stateFrom": source(call.state_from),
        "finalState": call.final_state,
        "page": page_of.get(id(call.trace)),
        "reason": reason,
    }

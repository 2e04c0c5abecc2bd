"""The comparison of a trace with another one on its page: a baseline, such as from before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.page.rows import differences
from unrolled.tracing.indexing import absolute_differences
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace

_ROUNDING = 100  # times the precision of the numbers: differences up to this are rounding errors


def check_comparable(trace: Trace, baseline: Trace) -> None:
    """Check that two traces have the same cells, sizes, input shapes and sequence lengths.

    Raises:
        TypeError: If the baseline isn't a trace.
        ValueError: If the traces can't be compared.
    """
    if not isinstance(baseline, Trace):
        raise TypeError(f"baseline should be a trace, got {type(baseline).__name__}")
    for one in (trace, baseline):
        one.layers[0].check_whole("a comparison")
    if [_form(part) for part in trace.layers] != [_form(part) for part in baseline.layers]:
        raise ValueError(
            f"baseline should be a trace of the same cell and sizes, but it is of {baseline.module} and this "
            f"trace is of {trace.module}"
        )
    shape, other = (tuple(one.layers[0].input.shape) for one in (trace, baseline))
    if shape != other:
        raise ValueError(
            f"baseline should have an input of the same shape (time, batch, features), {shape}, got {other}"
        )
    if trace.layers[0].lengths.tolist() != baseline.layers[0].lengths.tolist():
        raise ValueError("baseline should have the same sequence lengths as this trace")


def _form(part: LayerTrace) -> tuple[Any, ...]:
    return part.layer, part.direction, type(part.cell).__name__, part.cell.state_sizes(), part.cell.shapes()


def baseline_differences(data: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs between the data of a row of a trace and of the baseline.

    Args:
        data: The data of the row, with its layers.
        baseline: The same of the baseline.

    Raises:
        ValueError: If the steps of the two compute different operations.
    """
    found = differences({"layers": data["layers"]}, {"layers": baseline["layers"]})
    for layer in found["layers"]:
        if layer.get("diagram", {}).keys() - {"values"}:
            raise ValueError(
                "baseline should compute the same operations in each step as this trace, but they differ"
            )
    return found


def comparison_summary(
    trace: Trace, baseline: Trace, rows: Sequence[int], layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return whether and where two traces differ.

    Args:
        trace: The trace.
        baseline: The baseline.
        rows: The rows on the page.
        layers: The data of the layers of any row.

    Returns:
        ``status``: ``"identical"``, ``"rounding"`` or ``"different"``; ``count``, how many numbers were
        compared; ``largest``, the number that differs most among states and gates as ``{"layer", "row",
        "number"}``, or None; and ``inputs``, ``initialStates`` and ``parameters``: whether these differ.
    """
    pairs, rows = list(zip(trace.layers, baseline.layers, strict=True)), list(rows)
    lengths = trace.layers[0].lengths.tolist()
    is_batch = len(lengths) > 1
    largest, size = None, 0.0
    count, error, magnitude = 0, 0.0, 1.0
    for row in rows:
        for index, (part, other) in enumerate(pairs):
            shown = _named_nodes(part, layers[index])
            for name, values in part.values.items():
                ours, theirs = values[: lengths[row], row], other.values[name][: lengths[row], row]
                difference = _real_difference(ours, theirs)
                count += difference.numel()
                most = float(difference.max()) if difference.numel() else 0.0
                error = max(error, most)
                magnitude = max(
                    magnitude, *(float(_finite(one).max()) for one in (ours, theirs) if one.numel())
                )
                if name in shown and most > size:
                    step, unit = divmod(int(difference.argmax()), difference.shape[1])
                    largest = {
                        "layer": index,
                        "row": row if is_batch else None,
                        "number": {"q": name, "t": step, "u": unit},
                    }
                    size = most
    eps = max(torch.finfo(one.layers[0].input.dtype).eps for one in (trace, baseline))
    status = "different" if error > _ROUNDING * eps * magnitude else "rounding" if error else "identical"
    return {
        "status": status,
        "count": count,
        "largest": largest,
        "inputs": _differ(pairs[0][0].input[:, rows], pairs[0][1].input[:, rows]),
        "initialStates": any(
            _differ(state[rows], other.initial_state[name][rows])
            for part, other in pairs
            for name, state in part.initial_state.items()
        ),
        "parameters": any(
            _differ(getattr(part.cell, name), getattr(other.cell, name))
            for part, other in pairs
            for name in part.cell.shapes()
        ),
    }


def _named_nodes(part: LayerTrace, layer: Mapping[str, Any]) -> set[str]:
    """Return the quantities that the page shows under their own name."""
    return {node["name"] for node in layer["diagram"]["nodes"]} - {"", "x", *part.cell.shapes()}


def _real_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the absolute differences, ``(steps, units)``. NaN in only one of the two counts as infinity."""
    if ours.is_complex():
        return _real_difference(torch.view_as_real(ours), torch.view_as_real(theirs))
    flat = absolute_differences(ours.cpu(), theirs.cpu())[1:]
    return flat.nan_to_num(torch.inf, torch.inf, torch.inf).reshape(len(ours), -1)


def _finite(values: Tensor) -> Tensor:
    return values.abs().double().nan_to_num(0, 0, 0)


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    return bool(_real_difference(ours.unsqueeze(0), theirs.unsqueeze(0)).any())

"""Finding the first NaN or infinity in a layer, and what it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled.tracing.explain import DIGITS, arithmetic
from unrolled.tracing.findings import Finding, Severity, listed, number, percent, plural
from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.layer_values import CannotCheckError, LayerValues
from unrolled.tracing.provenance import Node

_TERMS = 2  # of a sum in a message
_POLES = ("log", "log2", "log10", "reciprocal", "rsqrt", "digamma", "lgamma")  # infinite at 0


@dataclass(frozen=True)
class _Place:
    """Where the first NaN or infinity of a row is.

    Attributes:
        position: Position along the time axis.
        row: The row.
        quantity: The quantity; ``"x"`` for the input, the name of a state for the initial state.
        unit: Flat index of the feature.
        kind: ``"input"``, ``"initial state"`` or ``"step"``.
    """

    position: int
    row: int
    quantity: str
    unit: int
    kind: str


def check_finite(values: LayerValues) -> list[Finding]:
    """Report NaN and infinity: one finding for each parameter with them and each origin in the steps."""
    findings = [finding for name in values.cell.shapes() if (finding := _parameter(values, name))]
    bad_rows = (values.running & ~values.finite).any(0)
    initial = values.part.initial_state.values()
    for state in initial:
        bad_rows |= ~state.isfinite().flatten(1).all(-1).to(bad_rows.device)
    rows = bad_rows.nonzero().flatten().tolist()
    if findings or not rows:
        return findings  # what a bad parameter makes of the steps says nothing new
    places = [_first_place(values, row) for row in rows]
    order = {position: k for k, position in enumerate(values.run_order)}
    # The earliest first. At the same step, the input may have spread to other rows, but not the other way.
    places.sort(key=lambda one: (order[one.position], one.kind == "step"))
    by_origin: dict[tuple[str, str], list[_Place]] = {}
    for place in places:
        by_origin.setdefault((place.kind, place.quantity), []).append(place)
    return [_place_finding(values, same[0], same) for same in by_origin.values()]


def check_finite_gradients(values: LayerValues) -> list[Finding]:
    """Report the first NaN or infinity in a gradient, in the order of the backward pass.

    Raises:
        CannotCheckError: If there are no gradients.
    """
    gradients = values.part.gradients
    if not gradients:
        raise CannotCheckError("")  # the check of the gradient through time says why
    for position in reversed(values.run_order):
        for name, gradient in reversed(gradients.items()):
            bad = ~gradient[position].isfinite().unsqueeze(-1).flatten(1)
            bad &= values.running[position].unsqueeze(1)
            if bad.any():
                index, position_in_row = bad.nonzero()[0].tolist()
                step, row = values.steps[position], values.row_numbers[index]
                unit = _numbered(values, name, position_in_row)
                word = _word(gradient[position, index].flatten()[position_in_row])
                place = f"{name}[{unit}] at step {step} in row {row}"
                message = f"The gradient has its first {word} in {place}, going backward."
                if values.finite.equal(values.running):
                    message += " All values of the forward pass are finite."
                return [
                    values.finding(
                        "gradient not finite", "error", message, name, units=(unit,), steps=(step,),
                        rows=(row,), locations=((name, (step, row, unit)),),
                    )
                ]  # fmt: skip
    return []


def _parameter(values: LayerValues, name: str) -> Finding | None:
    """Report a parameter that has NaN or infinity."""
    tensor: Tensor = getattr(values.cell, name)
    bad = ~tensor.isfinite()
    if not bad.any():
        return None
    count, index = int(bad.sum()), bad.nonzero()[0].tolist()
    first = f"{name}[{', '.join(map(str, index))}]"
    shown = f"{first} is {_word(tensor[tuple(index)])}"
    if count > 1:
        shown = f"{count} of its {tensor.numel()} numbers are NaN or infinity, the first is {first}"
    running = values.running & ~values.finite
    share = float(running.sum()) / max(1, int(values.running.sum()))
    effect = f" {percent(share)} of the steps have NaN or infinity." if share else ""
    message = f"The parameter {name} isn't finite: {shown}.{effect}"
    return values.finding(
        "not finite", "error", message, name, parameter=(name, index[0]), values={"count": count},
        locations=((name, tuple(index)),),
    )  # fmt: skip


def _first_place(values: LayerValues, row: int) -> _Place:
    """Find the first NaN or infinity of a row: in its initial state, its input, or a quantity of a step."""
    part = values.part
    start = next((k for k in values.run_order if values.running[k, row]), 0)
    for name, state in part.initial_state.items():
        if (unit := _bad_unit(state[row])) is not None:
            return _Place(start, row, name, unit, "initial state")
    bad = (values.running & ~values.finite)[:, row].tolist()
    position = next(k for k in values.run_order if bad[k])
    if (unit := _bad_unit(part.input[position, row])) is not None:
        return _Place(position, row, "x", unit, "input")
    for name, value in part.values.items():
        if (unit := _bad_unit(value[position, row])) is not None:
            return _Place(position, row, name, unit, "step")
    raise AssertionError("a row without NaN or infinity")


def _bad_unit(tensor: Tensor) -> int | None:
    """Return the flat index of the first NaN or infinity, or None."""
    bad = (~tensor.isfinite()).flatten().nonzero()
    return int(bad[0]) if len(bad) else None


def _place_finding(values: LayerValues, place: _Place, same: list[_Place]) -> Finding:
    """Describe the first of several rows with the same origin."""
    part, step, positions = values.part, values.steps[place.position], sorted(one.row for one in same)
    rows = tuple(values.row_numbers[k] for k in positions)
    unit = _numbered(values, place.quantity, place.unit)
    row = f" in row {values.row_numbers[place.row]}" if part.input.shape[1] > 1 else ""
    source = part.initial_state if place.kind == "initial state" else {"x": part.input, **part.values}
    tensor = source[place.quantity]
    at_place = tensor[place.row] if place.kind == "initial state" else tensor[place.position, place.row]
    word = _word(at_place.flatten()[place.unit])
    what = f"{place.quantity}[{unit}] at step {step}{row}"
    if place.kind == "initial state":
        message = f"The initial state has {word} in {place.quantity}[{unit}]{row}."
    elif place.kind == "input":
        message = f"The input has {word}: the first is {what}."
        if part.layer:
            message += f" It is the output of layer {part.layer - 1}."
    else:
        message = f"The first {word} is {what}. {_origin(values, place)}"
    affected = values.running[:, positions] & ~values.finite[:, positions]
    if len(rows) > 1:
        message += f" {plural(len(rows), 'row')} of {part.input.shape[1]} have it: {listed(rows)}."
    message += f" {_effect(values, int(affected.sum()), positions)}"
    # NaN in the input of a higher layer is reported as an error of the layer below.
    severity: Severity = "note" if place.kind == "input" and part.layer else "error"
    return values.finding(
        "not finite", severity, message, place.quantity, units=(unit,), steps=(step,), rows=rows,
        values={"steps": int(affected.sum())}, locations=tuple(_location(values, one) for one in same),
    )  # fmt: skip


def _location(values: LayerValues, place: _Place) -> tuple[str, tuple[int, ...]]:
    step = values.steps[place.position]
    if place.kind == "initial state":
        step = -1 if values.part.direction == "forward" else int(values.part.lengths[place.row])
    unit = _numbered(values, place.quantity, place.unit)
    return place.quantity, (step, values.row_numbers[place.row], unit)


def _effect(values: LayerValues, steps: int, rows: list[int]) -> str:
    """Say how far the NaNs of some rows spread."""
    output = next(iter(values.cell.state))
    total = int(values.running[:, rows].sum())
    which = "" if values.part.input.shape[1] == 1 else " of these rows" if len(rows) > 1 else " of the row"
    text = f"In all, {percent(steps / max(1, total))} of the steps{which} have NaN or infinity"
    if output not in values.part.values:
        return text + "."
    selected = values.part.values[output][:, rows]
    bad = (~selected.isfinite()).unsqueeze(-1).flatten(2).any(-1) & values.running[:, rows]
    return text + (", and so does the output." if bad.any() else ", but the output stays finite.")


def _origin(values: LayerValues, place: _Place) -> str:
    """Say which operation of the step made the first NaN or infinity of a row."""
    graph = values.graph(place.position, place.row)
    if graph is None:
        return "What it came from can't be found, because only a part of the step was recorded."
    node = graph.nodes.get(place.quantity)
    recorded = values.part.values[place.quantity][place.position, place.row].flatten()
    if node is None or node.numbers.numel() != len(recorded):
        return "What it came from can't be found, because the step can't be run for the row alone."
    if node.numbers.flatten()[place.unit].isfinite():
        return "It can't be reproduced for the row alone: it comes from another row or from a random number."
    node, index = _operation(node, place.unit)
    text = arithmetic(node, index, _TERMS, DIGITS).text
    value = node.numbers.flatten()[index]
    if value.isnan():
        return f"It comes from {text}, which isn't defined."
    if _is_pole(node, index):
        return f"It comes from {text}, which is infinite."
    dtype = str(value.dtype).removeprefix("torch.")
    limit = number(torch.finfo(value.dtype).max)
    return f"It comes from {text}: an overflow, since the largest number of {dtype} is {limit}."


def _is_pole(node: Node, index: int) -> bool:
    """Whether the exact result is infinite, such as that of a division by zero."""
    if node.kind == "infix" and node.name == "div":
        divisor = node.operands[1]
        if divisor.tensor is None:
            return float(divisor.name) == 0
        return not divisor.numbers.flatten()[node.operand_index(1, index)].any()
    if node.kind != "call" or node.name not in _POLES:
        return False
    return not node.operands[0].numbers.flatten()[node.operand_index(0, index)].any()


def _operation(node: Node, index: int) -> tuple[Node, int]:
    """Follow a NaN or infinity to the operation whose operands are all finite."""
    while True:
        node, index = node.source(index)
        for k, operand in enumerate(node.operands):
            if operand.tensor is None or node.kind == "moved":
                continue
            flat = operand.numbers.flatten()
            if node.kind in ("sum", "rows"):
                bad = _bad_unit(flat)
                following = 0 if bad is None else bad
            else:
                following = node.operand_index(k, index)
            if not flat[following].isfinite():
                node, index = operand, following
                break
        else:
            return node, index


def _numbered(values: LayerValues, name: str, position: int) -> int:
    columns = values.part.columns.get(name)
    return position if columns is None else columns[normalize_index("unit", position, len(columns))]


def _word(value: Tensor) -> str:
    """Return NaN or infinity as text."""
    return number(float((value.abs() if value.is_complex() else value).item()))

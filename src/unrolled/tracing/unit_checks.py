"""Checks of the units of a layer: gates that are stuck, saturated units, and dead units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled.tracing.findings import Finding, gate_value, listed, number, percent, plural
from unrolled.tracing.layer_values import CannotCheckError, LayerValues
from unrolled.tracing.saturation import dead_units, saturation_bounds
from unrolled.tracing.step_causes import GateProduct, describe_cause, gate_products
from unrolled.tracing.thresholds import DEAD_AT_ZERO, OPEN_GATE, SATURATED_UNIT, STUCK_GATE

_GATE_FUNCTIONS = ("sigmoid", "hardsigmoid")
_LOW_PRECISION = 1e-6  # rounding error above that of float32
_RELUS = ("relu", "relu6")


@dataclass(frozen=True)
class _StuckUnits:
    """Units of a quantity that stay at one end of its function.

    Attributes:
        name: The quantity.
        samples: Its values, ``(steps of all rows, units)``.
        positions: Positions of the units.
        shares: The share of the values of each unit that are at the end.
    """

    name: str
    samples: Tensor
    positions: Tensor
    shares: Tensor

    @classmethod
    def where(cls, name: str, samples: Tensor, at_end: Tensor, minimum: float) -> _StuckUnits | None:
        """Return the units that are at the end in at least this share of the steps, or None."""
        shares = at_end.double().mean(0)
        positions = (shares >= minimum).nonzero().flatten()
        return cls(name, samples, positions, shares[positions]) if len(positions) else None


def gate_names(values: LayerValues) -> list[str]:
    """Return the quantities that a sigmoid computes and that multiply something in the step.

    A quantity that is called a gate in the cell's docstring is one, too.

    Raises:
        CannotCheckError: If fewer than two steps have finite values.
    """
    sigmoids = [name for name, (function, _) in values.functions.items() if function in _GATE_FUNCTIONS]
    if sigmoids:
        values.check_samples()
    return [name for name in sigmoids if "gate" in values.label(name).split() or _products(values, name)]


def check_gates(values: LayerValues) -> list[Finding]:
    """Report gates that are nearly always shut or open.

    Raises:
        CannotCheckError: If no quantity is a gate.
    """
    gates = gate_names(values)
    if not gates:
        raise CannotCheckError(_not_recorded(values, "a sigmoid"))
    findings = []
    for name in gates:
        samples = values.samples(name)
        low, high = saturation_bounds(values.functions[name][1])
        products = _products(values, name)
        shuts_other = [product for product in products if product.complement]
        shut = _StuckUnits.where(name, samples, samples <= low, STUCK_GATE)
        if shut is not None:
            findings.append(_gate_finding(values, shut, products, low, is_open=False))
        limit = high if shuts_other else OPEN_GATE
        opened = _StuckUnits.where(name, samples, samples >= limit, STUCK_GATE)
        if opened is not None:
            findings.append(_gate_finding(values, opened, products, limit, is_open=True))
    return findings


def check_saturated(values: LayerValues) -> list[Finding]:
    """Report units that are nearly always at a flat end of their function, except for stuck gates.

    Raises:
        CannotCheckError: If no function of a recorded quantity has two flat ends.
    """
    findings, bounded, gates = [], [], gate_names(values)
    for name, (function_name, function) in values.functions.items():
        low, high = saturation_bounds(function)
        if low == -torch.inf or high == torch.inf:
            continue
        bounded.append(name)
        samples = values.samples(name)
        at_low, at_high = samples <= low, samples >= high
        if name in gates:  # a gate at one end is stuck, not saturated
            one_end = torch.maximum(at_low.double().mean(0), at_high.double().mean(0)) >= STUCK_GATE
            at_low, at_high = at_low & ~one_end, at_high & ~one_end
        stuck = _StuckUnits.where(name, samples, at_low | at_high, SATURATED_UNIT)
        if stuck is not None:
            findings.append(_saturated_finding(values, stuck, function_name, low, high))
    if not bounded:
        raise CannotCheckError(_not_recorded(values, "a function with two flat ends"))
    return findings


def check_dead(values: LayerValues) -> list[Finding]:
    """Report units of a state that never change, and units of a relu that are always 0.

    Raises:
        CannotCheckError: If nothing that reaches the layer changes, there are too few steps, or no state was
            recorded.
    """
    part = values.part
    values.check_samples()
    relus = [name for name, (function, _) in values.functions.items() if function in _RELUS]
    states = [name for name in part.initial_state if name in part.values]
    if not (states or relus):
        raise CannotCheckError("no state was recorded")
    if len(values.steps) < 2:
        raise CannotCheckError("it needs at least two steps")
    if not _input_varies(values):
        raise CannotCheckError("all steps have the same input")
    findings, undecided = [], False
    for name in dict.fromkeys([*states, *relus]):
        samples = values.samples(name)
        rounding = torch.finfo(part.values[name].dtype).eps
        dead = dead_units(samples, min(rounding, _LOW_PRECISION))
        at_zero = dead & (samples[0] == 0)
        dead = dead if name in states else at_zero
        if len(samples) < DEAD_AT_ZERO:
            # In low precision, a unit can be the same at a few steps by chance.
            uncertain = dead if rounding > _LOW_PRECISION else at_zero
            undecided |= bool(uncertain.any())
            dead = dead & ~uncertain
        positions = dead.nonzero().flatten()
        if len(positions):
            findings.append(_dead_finding(values, name, samples, positions))
    if undecided and not findings:
        raise CannotCheckError(
            f"some units don't change, but it needs {DEAD_AT_ZERO} steps to call them dead"
        )
    return findings


def _input_varies(values: LayerValues) -> bool:
    """Whether the inputs or initial states differ between steps or rows, as far as they were recorded."""
    part = values.part
    changing: list[Tensor] = [state.flatten(1) for state in part.initial_state.values()]
    if part.input.shape[-1]:
        changing.append(part.input[values.finite].flatten(1))
    return not part.input.shape[-1] or any(bool((rows != rows[:1]).any()) for rows in changing)


def _not_recorded(values: LayerValues, function: str) -> str:
    """Return why a check isn't possible; empty if the cell has nothing to check."""
    return f"no recorded quantity is computed by {function}" if values.part.partial else ""


def _products(values: LayerValues, gate: str) -> list[GateProduct]:
    """Return what a gate multiplies. If the step can't be computed again, it is something unknown."""
    position = next(k for k in values.run_order if values.finite[k].any())
    graph = values.graph(position, int(values.finite[position].nonzero()[0]))
    return gate_products(graph, gate) if graph else [GateProduct(False, "", False)]


def _gate_finding(
    values: LayerValues, stuck: _StuckUnits, products: Sequence[GateProduct], limit: float, is_open: bool
) -> Finding:
    samples = stuck.samples[:, stuck.positions]
    extreme = samples.min() if is_open else samples.max()
    units = values.unit_numbers(stuck.name, stuck.positions)
    lowest, share = float(extreme), float(stuck.shares.min())
    bound = f"{'at least' if is_open else 'at most'} {gate_value(lowest)} in {_extent(values)}"
    if share < 1:
        bound = (
            f"{'above' if is_open else 'below'} {gate_value(limit)} in {percent(share)} of {_extent(values)}"
        )
    state = "open" if is_open else "shut"
    subject = _sentence(values, stuck.name, units, f"stays {state}", "gate")
    cause, parameter = _cause(values, stuck)
    effect = _effect(products, is_open, units, stuck.samples.shape[1])
    message = f"{subject}: {bound}{effect}.{cause}"
    return values.finding(
        f"gate {state}", "warning", message, stuck.name, units=units, steps=tuple(values.steps),
        values={"share": share, "lowest" if is_open else "highest": lowest}, parameter=parameter,
    )  # fmt: skip


def _effect(products: Sequence[GateProduct], is_open: bool, units: Sequence[int], total: int) -> str:
    """Say what some stuck units of a gate, out of a total number, do to what they multiply."""
    shut = [product for product in products if product.complement == is_open and product.factor]
    who = "these units" if len(units) > 1 else f"unit {units[0]}" if total > 1 else "the layer"
    clauses = []
    for product in shut:
        forgets = "forgets" if len(units) == 1 else "forget"
        clauses.append(
            f"{who} {forgets} {product.factor} at every step"
            if product.is_state
            else f"nothing of {product.factor} gets through"
        )
    if not clauses and is_open:
        clauses.append("it can't learn to shut")
    return f", so {' and '.join(dict.fromkeys(clauses))}" if clauses else ""


def _saturated_finding(
    values: LayerValues, stuck: _StuckUnits, function: str, low: float, high: float
) -> Finding:
    units = values.unit_numbers(stuck.name, stuck.positions)
    share = float(stuck.shares.min())
    subject = _sentence(values, stuck.name, units, "is saturated", "quantity")
    cause, parameter = _cause(values, stuck)
    message = (
        f"{subject}: below {number(low)} or above {number(high)} in "
        f"{percent(share)} of {_extent(values)}. There {function} is flat, so almost no gradient passes."
        f"{cause}"
    )
    return values.finding(
        "saturated", "warning", message, stuck.name, units=units, steps=tuple(values.steps),
        values={"share": share}, parameter=parameter,
    )  # fmt: skip


def _dead_finding(values: LayerValues, name: str, samples: Tensor, positions: Tensor) -> Finding:
    units = values.unit_numbers(name, positions)
    value = float(samples[0, positions[0]])
    if len(units) == 1:
        message = f"Unit {units[0]} of {name} is dead: it is {number(value)} in {_extent(values)}."
    else:
        total = samples.shape[1]
        same = f", all of them {number(value)}" if bool((samples[0, positions] == value).all()) else ""
        message = (
            f"{len(units)} of {plural(total, 'unit')} of {name} are dead ({listed(units)}): they never "
            f"change in {_extent(values)}{same}."
        )
    return values.finding(
        "dead", "warning", message, name, units=units, steps=tuple(values.steps),
        values={"value": value, "share": len(units) / samples.shape[1]},
    )  # fmt: skip


def _sentence(values: LayerValues, name: str, units: Sequence[int], verb: str, fallback: str) -> str:
    """Return the beginning of a sentence about some units of a quantity: ``Forget gate f[1] stays shut``.

    Args:
        values: The layer.
        name: The quantity.
        units: Its affected units.
        verb: What they do.
        fallback: What to call the quantity if the cell's docstring doesn't say what it is.
    """
    label = values.label(name) or fallback
    label = f"{label[0].upper()}{label[1:]} {name}"
    total = values.part.values[name][0, 0].numel()
    if len(units) == 1:
        return f"{label}{f'[{units[0]}]' if total > 1 else ''} {verb}"
    which = "all units" if len(units) == total else f"{len(units)} of {total} units ({listed(units)})"
    return f"{label} {verb} in {which}"


def _cause(values: LayerValues, stuck: _StuckUnits) -> tuple[str, tuple[str, int] | None]:
    """Say what causes the stuck values of the first unit, at the step where it has its median."""
    unit = int(stuck.positions[0])
    order = stuck.samples[:, unit].argsort()
    position, row = values.finite.nonzero()[order[len(order) // 2]].tolist()
    sentence, parameter = describe_cause(values, position, row, stuck.name, unit)
    if sentence and len(stuck.positions) > 1:
        first = values.unit_numbers(stuck.name, stuck.positions[:1])[0]
        sentence = f"In unit {first}, {sentence[0].lower()}{sentence[1:]}"
    return (f" {sentence}" if sentence else ""), parameter


def _extent(values: LayerValues) -> str:
    """Return the checked steps and rows as text."""
    steps, batch = len(values.steps), values.running.shape[1]
    rows = f" of {batch} rows" if batch > 1 else ""
    if not values.running.all():
        return f"all steps{rows}"
    return f"all {steps} steps{rows}" if steps > 1 else f"the step{rows}"

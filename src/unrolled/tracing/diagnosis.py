"""The checks of :meth:`unrolled.Trace.health` and their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from unrolled.tracing.findings import Finding, HealthReport, place_of
from unrolled.tracing.growth_checks import check_gradients, check_state_growth
from unrolled.tracing.influence import check_influence, check_parameters
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.layer_values import CannotCheckError, LayerValues
from unrolled.tracing.not_finite import check_finite, check_finite_gradients
from unrolled.tracing.unit_checks import check_dead, check_gates, check_saturated


@dataclass(frozen=True)
class _Check:
    """A check.

    Attributes:
        run: Returns the findings of a layer.
        fine: The sentence for a layer without findings.
        what: What is checked, for the sentence that says why it couldn't be.
    """

    run: Callable[[LayerValues], list[Finding]]
    fine: str
    what: str


_CHECKS = (  # the order of findings of the same severity
    _Check(check_finite, "all numbers are finite", "NaN and infinity"),
    _Check(check_finite_gradients, "all gradients are finite", "NaN and infinity in gradients"),
    _Check(check_gates, "no gate is stuck open or shut", "gates that are stuck"),
    _Check(check_gradients, "the gradient neither explodes nor vanishes", "the gradient through time"),
    _Check(check_state_growth, "no state grows exponentially", "states that grow"),
    _Check(check_influence, "the layer uses its input and its past", "whether input and past are used"),
    _Check(check_dead, "no unit is dead", "dead units"),
    _Check(check_saturated, "no unit is saturated", "saturated units"),
    _Check(check_parameters, "every parameter has an effect", "parameters without effect"),
)


def diagnose(
    layers: Sequence[LayerTrace],
    without_gradients: str = "call trace.backward(target) or trace.backward(lambda y: y.sum()) first",
    rows: Sequence[int] | None = None,
) -> HealthReport:
    """Check all layers and directions of a trace.

    Args:
        layers: The layers, in the order in which they run.
        without_gradients: Why the gradient through time can't be checked if there are no gradients.
        rows: The number of each row. By default, they are counted from 0.

    Returns:
        The report. Of two findings of the same severity, the one of the earlier check comes first.
    """
    values = [LayerValues(part, without_gradients, rows) for part in layers]
    findings, fine = [], []
    not_checked: dict[str, list[str]] = {}
    for check in _CHECKS:
        places_fine: list[LayerValues] = []
        places_by_reason: dict[str, list[LayerValues]] = {}
        for layer in values:
            try:
                found = check.run(layer)
            except CannotCheckError as error:
                places_by_reason.setdefault(str(error), []).append(layer)
                continue
            findings += [replace(one, parts=len(layers)) for one in found]
            if not found:
                places_fine.append(layer)
        if places_fine:
            fine.append(check.fine + _places(places_fine, values))
        for reason, places in places_by_reason.items():
            not_checked.setdefault(reason, []).append(check.what + _places(places, values))
    reasons = [f"{', '.join(what)}: {reason}" for reason, what in not_checked.items() if reason]
    return HealthReport(findings, fine, [*_unchecked_extent(layers), *reasons])


def _places(some: Sequence[LayerValues], every: Sequence[LayerValues]) -> str:
    """Return the layers and directions of some values as text; empty if they are all of the trace."""
    if len(some) == len(every):
        return ""
    names = [place_of(one.part.layer, one.part.direction) for one in some]
    return f" in {'; '.join(names)}"


def _unchecked_extent(layers: Sequence[LayerTrace]) -> list[str]:
    """Say which parts of the call weren't recorded."""
    part = layers[0]
    texts = []
    if part.steps is not None and not part.changed_states:
        texts.append(f"the other steps: only {len(part.steps)} of {int(part.lengths.max())} were recorded")
    if part.units is not None:
        texts.append(f"the other units: only {len(part.units)} of {part.cell.hidden} were recorded")
    if part.partial and part.units is None:
        texts.append(f"other quantities: only {', '.join(part.names) or 'the input'} were recorded")
    return texts

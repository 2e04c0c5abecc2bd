"""Checks of what happens along a sequence: states that grow, and gradients that explode or vanish."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled.layers.tensors import tensors
from unrolled.tracing.findings import Finding, listed, number
from unrolled.tracing.gradient_flow import spectral_radii
from unrolled.tracing.layer_values import STEP_ERRORS, CannotCheckError, LayerValues
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.thresholds import (
    EXPLODING_GRADIENT,
    EXPONENTIAL_GROWTH,
    SAMPLES,
    STATE_GROWTH,
    VANISHING_GRADIENT,
)

_MIN_STEPS = 4
_MAX_ROWS = 64  # rows with NaN or infinity that are measured, one by one


@dataclass(frozen=True)
class _Growth:
    """A state that grows.

    Attributes:
        name: The state.
        rows: The positions of the rows that were measured together.
        first, last: Steps since the start of the row between which it grows.
        norms: The norm after each step, as root mean square over the rows.
        factor: The median growth per step in the second half.
    """

    name: str
    rows: tuple[int, ...]
    first: int
    last: int
    norms: list[float]
    factor: float


def check_state_growth(values: LayerValues) -> list[Finding]:
    """Report states whose norm grows exponentially, up to the first NaN or infinity.

    Raises:
        CannotCheckError: If there are too few steps with finite numbers, or no state was recorded.
    """
    return [_growth_finding(values, growths) for growths in _growing_states(values)]


def _growing_states(values: LayerValues) -> list[list[_Growth]]:
    """Return how each state grows that does: in the rows with finite numbers, and in each of the others."""
    states = [name for name in values.part.initial_state if name in values.part.values]
    if not states:
        raise CannotCheckError("no state was recorded")
    _check_steps(values)
    growing, undecided = [], []
    for name in states:
        is_finite = values.part.values[name].flatten(2).isfinite().all(-1)
        bad_rows = (values.running & ~is_finite).any(0)
        fine_rows = (~bad_rows).nonzero().flatten().tolist()
        # A row with NaN or infinity is measured alone, up to the first of them.
        alone = bad_rows.nonzero().flatten()[:_MAX_ROWS].tolist()
        groups = [fine_rows] * bool(fine_rows) + [[row] for row in alone]
        growths = [growth for rows in groups if (growth := _growth(values, name, rows))]
        if growths:
            growing.append(growths)
        elif not fine_rows:
            undecided.append(name)
    if undecided and not growing:
        raise CannotCheckError(f"not all steps of {_joined(undecided)} have finite numbers")
    return growing


def _growth(values: LayerValues, name: str, rows: list[int]) -> _Growth | None:
    """Return how a state grows in the first finite steps of some rows, or None."""
    norms = _finite_part(_norms(values, {name: values.part.values[name]}, from_end=False, rows=rows))
    last = len(norms) - 1
    first = next((k for k, norm in enumerate(norms) if norm > 0), last)
    half = last // 2
    if len(norms) < _MIN_STEPS or first >= half or norms[last] < STATE_GROWTH * norms[first]:
        return None
    factor = _median_growth(norms[half:])
    if factor ** (last - half) < EXPONENTIAL_GROWTH:
        return None
    return _Growth(name, tuple(rows), first, last, norms, factor)


def _growth_finding(values: LayerValues, growths: Sequence[_Growth]) -> Finding:
    growth, *others = growths
    name, first, last = growth.name, growth.norms[growth.first], growth.norms[growth.last]
    start, end = _ends(values, growth)
    largest = _largest_elements(values, growth)
    in_row = " in row {}" if values.running.shape[1] > 1 else ""
    if len(growth.rows) > 1:
        measured = f"its norm (root mean square over {len(growth.rows)} rows)"
    else:
        measured = f"its norm{in_row.format(values.row_numbers[growth.rows[0]])}"
    size, (row, unit) = largest[0]
    message = (
        f"The state {name} grows exponentially: {measured} goes from {number(first)} at step {start} to "
        f"{number(last)} at step {end}, by a factor of {number(growth.factor)} per step. The largest number "
        f"at step {end} is {name}[{unit}] = {number(size)}{in_row.format(row)}."
    )
    if others:
        rows = listed(sorted(values.row_numbers[row] for other in others for row in other.rows))
        message += f" It also grows in {'row' if rows.isdigit() else 'rows'} {rows}."
    return values.finding(
        "growing state", "warning", message + _amplifier(values), name, steps=(start, end),
        values={"growth": growth.factor, "first": first, "last": last},
        locations=tuple(
            (name, (_ends(values, one)[1], row, unit))
            for one in growths for _, (row, unit) in _largest_elements(values, one)
        ),
    )  # fmt: skip


def _ends(values: LayerValues, growth: _Growth) -> tuple[int, int]:
    """Return the steps between which a state grows, in the longest of the rows."""
    longest = max(growth.rows, key=lambda row: int(values.part.lengths[row]))
    start, end = (_step(values, k, from_end=False, row=longest) for k in (growth.first, growth.last))
    return start, end


def _largest_elements(values: LayerValues, growth: _Growth) -> list[tuple[float, tuple[int, int]]]:
    """Return the largest last element of each row, with its row and unit; the largest of all first."""
    position = values.steps.index(_ends(values, growth)[1])
    rows = [row for row in growth.rows if values.running[position, row]]
    elements = values.part.values[growth.name][position, rows].flatten(1)
    indices = elements.abs().argmax(1)
    units = values.unit_numbers(growth.name, indices)
    chosen = elements.gather(1, indices.unsqueeze(1)).flatten()
    sizes = (chosen.abs() if chosen.is_complex() else chosen).tolist()
    places = [(values.row_numbers[row], unit) for row, unit in zip(rows, units, strict=True)]
    return sorted(zip(sizes, places, strict=True), key=lambda one: -abs(one[0]))


def _amplifier(values: LayerValues) -> str:
    """Name the weight with the largest spectral radius, if it amplifies the state."""
    radii = spectral_radii(values.cell)
    name = max(radii, key=radii.__getitem__, default="")
    if not name or radii[name] <= 1:
        return ""
    return (
        f" A likely cause is {name}: its spectral radius is {number(radii[name])}, and a weight with a "
        "radius above 1 amplifies the state."
    )


def grows(values: LayerValues) -> bool:
    """Whether a state grows exponentially, as far as it can be checked."""
    try:
        return bool(_growing_states(values))
    except CannotCheckError:
        return False


def check_gradients(values: LayerValues) -> list[Finding]:
    """Report a gradient that explodes or vanishes, backward through the steps.

    The norm is that of the gradients of all states together.

    Raises:
        CannotCheckError: If there are no gradients, too few steps, or no state was recorded.
    """
    gradients = values.part.gradients
    if not gradients:
        raise CannotCheckError(values.without_gradients)
    by_state = {name: gradients[name] for name in values.part.initial_state if name in gradients}
    if not by_state:
        raise CannotCheckError("no state was recorded")
    _check_all_steps(values)
    norms = _norms(values, by_state, from_end=True)
    name = ", ".join(by_state)
    if not any(norms):
        message = (
            f"The gradient of {_joined(by_state)} is 0 at all steps: the loss doesn't depend on this layer, "
            "so it doesn't learn."
        )
        return [values.finding("no gradient", "warning", message, name, steps=tuple(values.steps))]
    _check_steps(values)
    first = next(k for k, norm in enumerate(norms) if norm != 0)
    flowing = _finite_part(norms[first:])
    exploding = _explosion(values, flowing, first, by_state)
    if exploding is None and first + len(flowing) < len(norms):
        raise CannotCheckError("not all gradients are finite")
    return [exploding] if exploding else _vanishing(values, flowing, first, by_state)


def _explosion(
    values: LayerValues, norms: Sequence[float], first: int, by_state: Mapping[str, Tensor]
) -> Finding | None:
    limit = EXPLODING_GRADIENT * len(norms)
    last = len(norms) - 1
    if last < 1 or max(norms) < limit * norms[0]:
        return None
    growth = _median_growth(norms)
    # A loss that grows along the sequence makes the gradient grow, too. It counts what a step does to it.
    if min(growth, _amplification(values, by_state)) ** last < limit:
        return None
    k = next(k for k, norm in enumerate(norms) if norm >= limit * norms[0])
    start, there, end = (_step(values, first + j, from_end=True) for j in (0, k, last))
    message = (
        f"The gradient of {_joined(by_state)} explodes from step {there} on, going backward: its norm goes "
        f"from {number(norms[0])} at step {start} to {number(norms[last])} at step {end}, by a factor of "
        f"{number(growth)} per step."
    )
    return values.finding(
        "gradient explodes", "warning", message, ", ".join(by_state), steps=(there,),
        values={"growth": growth, "last": norms[0], "first": norms[last]},
    )  # fmt: skip


def _amplification(values: LayerValues, by_state: Mapping[str, Tensor]) -> float:
    """Return the median factor by which a step changes the norm of the gradient that passes through it.

    Raises:
        CannotCheckError: If the steps can't run again.
    """
    batch = values.step_batch(SAMPLES)
    gradients = [by_state[name].flatten(0, 1)[batch.indices] for name in batch.states]
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda_devices(batch.x)):
        states = [state.clone().requires_grad_() for state in batch.states.values()]
        try:
            new = tensors(values.cell.step(batch.x.clone(), *states))
            passed = torch.autograd.grad(new, states, gradients, allow_unused=True)
        except STEP_ERRORS:
            raise CannotCheckError("the step doesn't run with another number of rows") from None
    before = _row_norms(gradients)
    after = _row_norms([part for part in passed if part is not None])
    factors = (after / before)[(before > 0) & after.isfinite()]
    return float(factors.median()) if len(factors) else 1.0


def _row_norms(parts: Sequence[Tensor]) -> Tensor:
    norms: Tensor = torch.cat([part.flatten(1).abs().double() for part in parts], 1).norm(dim=1)
    return norms


def _vanishing(
    values: LayerValues, norms: Sequence[float], first: int, by_state: Mapping[str, Tensor]
) -> list[Finding]:
    gone, largest = len(norms), 0.0
    for k, norm in enumerate(norms):
        is_gone = norm < VANISHING_GRADIENT * largest
        gone = min(gone, k) if is_gone else len(norms)
        largest = max(largest, norm)
    if gone == len(norms):
        return []
    peak = max(range(gone), key=lambda k: norms[k])
    there, source = (_step(values, first + k, from_end=True) for k in (gone, peak))
    factor = (norms[gone] / norms[peak]) ** (1 / (gone - peak))
    earlier = "earlier" if values.part.direction == "forward" else "later"
    message = (
        f"The gradient of {_joined(by_state)} is gone from step {there} on, going backward: its norm falls "
        f"from {number(norms[peak])} at step {source} to {number(norms[gone])} at step {there}, by a factor "
        f"of {number(factor)} per step. The layer learns nothing about step {there} and {earlier} ones."
    )
    return [
        values.finding(
            "gradient vanishes", "warning", message, ", ".join(by_state), steps=(there,),
            values={"growth": factor, "last": norms[peak], "first": norms[gone]},
        )
    ]  # fmt: skip


def _check_all_steps(values: LayerValues) -> None:
    if values.part.changed_states:
        raise CannotCheckError("the model changed the states between the steps")
    if values.part.steps is not None:
        raise CannotCheckError("only some steps were recorded")
    if not values.running.any():
        raise CannotCheckError("the batch has no rows")


def _check_steps(values: LayerValues) -> None:
    _check_all_steps(values)
    if len(values.steps) < _MIN_STEPS:
        raise CannotCheckError(f"it needs at least {_MIN_STEPS} steps")


def _norms(
    values: LayerValues, tensors: Mapping[str, Tensor], from_end: bool, rows: list[int] | None = None
) -> list[float]:
    """Return the norm, as root mean square over the rows, by the number of steps since the start of the row.

    The order is that in which the steps run, or its reverse. The norm of a step with NaN or infinity is NaN.
    It ends with the longest of the rows.

    Args:
        values: The layer.
        tensors: Quantities or gradients by name, ``(time, batch, …)``, whose norm to take together.
        from_end: Whether to count from the step that runs last in the row.
        rows: The positions of the rows. All by default.
    """
    chosen = slice(None) if rows is None else rows
    running = values.running[:, chosen]
    distance = torch.arange(len(running), device=running.device).unsqueeze(1).expand(running.shape)
    if from_end == (values.part.direction == "forward"):
        distance = values.part.lengths[chosen].to(running.device) - 1 - distance
    total = torch.zeros(len(running), dtype=torch.float64, device=running.device)
    joined = torch.cat([tensor[:, chosen].flatten(2).abs().double() for tensor in tensors.values()], -1)
    valid = running & joined.isfinite().all(-1)
    # The largest number is divided out, so that squares neither overflow nor underflow.
    scale = joined[valid].max() if bool(valid.any()) else joined.new_ones(())
    scale = torch.where(scale > 0, scale, 1.0)
    squares = (joined / scale).square().sum(-1)
    total.index_add_(0, distance[valid], squares[valid])
    counts = torch.bincount(distance[valid], minlength=len(running))
    norms = (total / counts.clamp(min=1)).sqrt() * scale
    norms[distance[running & ~valid]] = math.nan
    return norms[: int(running.sum(0).max())].tolist()


def _finite_part(norms: Sequence[float]) -> list[float]:
    """Return the norms before the first NaN."""
    return list(itertools.takewhile(math.isfinite, norms))


def _median_growth(norms: Sequence[float]) -> float:
    """Return the median factor from one norm to the next."""
    logs = [math.log(b / a) for a, b in itertools.pairwise(norms) if a > 0 and b > 0]
    return math.exp(statistics.median(logs)) if logs else 1.0


def _step(values: LayerValues, distance: int, from_end: bool, row: int | None = None) -> int:
    """Return the time step at a distance from the start or the end of a row; by default, of the longest."""
    backward = from_end == (values.part.direction == "forward")
    length = int(values.part.lengths.max() if row is None else values.part.lengths[row])
    return length - 1 - distance if backward else distance


def _joined(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last

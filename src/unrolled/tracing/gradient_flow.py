"""How the size of a gradient changes backward through time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.tracing.indexing import normalize_index
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.row_names import RowBlock, row_names

Trend = Literal["shrinks", "grows", "stable"]

_TREND_OF_LAST_NORM: dict[float, Trend] = {0: "shrinks", math.inf: "grows"}


def spectral_radii(cell: Cell) -> dict[str, float]:
    """Compute the spectral radii of all ``(hidden, hidden)`` blocks of the hidden-to-hidden weights.

    A radius above 1 means that the block amplifies a hidden state if applied repeatedly; below 1, it damps
    it.

    Returns:
        The radii, by the name of the weight, such as ``weight_hh``. If it has several blocks, they are named
        after their gates, such as ``weight_hh[i]``, or after their rows, such as ``weight_hh[0:3]``. Weights
        with NaNs or infinities are left out.
    """
    radii: dict[str, float] = {}
    names = None
    for name, shape in cell.shapes().items():
        # The declared shape counts too, since the input size can be equal to the hidden size.
        if len(shape) != 2 or shape[1] != cell.hidden or "hidden" not in str(cell.params()[name].shape[1]):
            continue
        if shape[0] % shape[1]:
            continue
        weight = getattr(cell, name).detach().cpu()
        weight = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
        if not weight.isfinite().all():
            continue
        values = _spectral_radius(weight.reshape(-1, shape[1], shape[1])).tolist()
        if len(values) > 1:
            names = names or row_names(cell)
        for k, radius in enumerate(values):
            rows = range(k * cell.hidden, (k + 1) * cell.hidden)
            block = names.block(name, rows.start) if names else RowBlock("", rows, 0)
            gate = block.gate if block.rows == rows else ""
            part = f"[{gate or f'{rows.start}:{rows.stop}'}]" if len(values) > 1 else ""
            radii[f"{name}{part}"] = radius
    return radii


def _spectral_radius(matrices: Tensor) -> Tensor:
    """Compute the spectral radius of each matrix as the limit of ``‖Aⁿ‖^(1/n)`` (Gelfand, 1941).

    The result is accurate to about eight digits. Repeated squaring takes seconds, where the eigenvalues of
    four 512 × 512 matrices take LAPACK a minute on a busy machine.
    """
    logs = torch.zeros(len(matrices), dtype=torch.float64)
    for squarings in range(30):
        norms = matrices.abs().amax((1, 2))
        logs += norms.log() / 2**squarings
        matrices = matrices / torch.where(norms > 0, norms, 1)[:, None, None]
        matrices = matrices @ matrices
    return logs.exp()


@dataclass(frozen=True)
class GradientFlow:
    """How the gradient of a quantity changes backward through the steps of a row.

    Attributes:
        name: The quantity.
        norms: Euclidean norm of ∂loss/∂quantity at every time step.
        factor: Change of the norm per step backward: the geometric mean between the first and the last step
            with a positive, finite norm. None if there are no two such steps.
        trend: ``"shrinks"`` if the factor is below 0.9, if the norm ends at less than half of its first
            value, or if it ends at exactly 0. ``"grows"`` if the factor is above 1/0.9, if the norm more than
            doubles, or if it ends at infinity. ``"stable"`` otherwise. None if fewer than two steps count.
        steepest: The step with the largest change of the norm compared with the previous step, in backward
            order, and the factor: the largest drop for a gradient that shrinks, the largest rise for one that
            grows, otherwise the larger of both. None if all steps change the norm alike, within 1 %.
        summary: All of this as a sentence.
    """

    name: str
    norms: tuple[float, ...]
    factor: float | None
    trend: Trend | None
    steepest: tuple[int, float] | None
    summary: str


def gradient_flow(part: LayerTrace, name: str, batch: int = 0) -> GradientFlow:
    """Measure the gradient of a quantity at every step of a row, and whether it shrinks or grows.

    The gradient flows from the last step to the first. For a layer in backward direction, it flows from the
    first step to the last.

    Raises:
        KeyError: If there is no such quantity.
        IndexError: If there is no such row.
        ValueError: If :meth:`unrolled.Trace.backward` wasn't called, or the quantity is the input.
    """
    part.check_whole("the gradient flow", chained=False)
    gradient = part.gradient(name)
    batch = normalize_index("row", batch, gradient.shape[1])
    length = int(part.lengths[batch])
    rows = gradient[:length, batch].reshape(length, -1)
    rows = rows.to(torch.complex128 if rows.is_complex() else torch.float64).abs()
    # Unlike a sum of squares, hypot neither overflows nor underflows.
    norms = tuple(math.hypot(*row) for row in rows.tolist())
    forward = part.direction == "forward"
    order = [*range(len(norms))][:: -1 if forward else 1]

    logs = {step: math.log(norms[step]) for step in order if 0 < norms[step] < math.inf}
    factor = trend = steepest = None
    clauses = []
    if logs:
        first, last = next(iter(logs)), next(reversed(logs))
        change, steps = logs[last] - logs[first], abs(last - first)
        factor = _exp(change / steps) if steps else None
        trend = _TREND_OF_LAST_NORM.get(norms[order[-1]]) or (_trend(change, steps) if steps else None)
        steepest = _steepest(logs, -1 if forward else 1, trend)
        clauses = [_describe_change(norms, first, last, factor, trend)]
    for description, steps_with_it in (
        ("exactly 0", [step for step in order if norms[step] == 0]),
        ("infinite", [step for step in order if norms[step] == math.inf]),
        ("NaN", [step for step in order if math.isnan(norms[step])]),
    ):
        if steps_with_it:
            clauses.append(f"is {description} {_describe_steps(steps_with_it, order)}")
    summary = f"the gradient of {name} " + "; it ".join(clauses)
    if steepest:
        step, step_factor = steepest
        kind = "drop" if step_factor < 1 else "rise"
        summary += f"; the largest {kind}, by a factor of {step_factor:.3g}, is at step {step}"
    return GradientFlow(name, norms, factor, trend, steepest, summary)


def _trend(change: float, steps: int) -> Trend:
    """Classify a change of the logarithm over a number of steps."""
    if abs(change) <= min(math.log(2), -math.log(0.9) * steps):
        return "stable"
    return "shrinks" if change < 0 else "grows"


def _describe_change(
    norms: tuple[float, ...], first: int, last: int, factor: float | None, trend: Trend | None
) -> str:
    if factor is None:
        return f"is {norms[first]:.3g} at step {first}"
    change = f"{trend} by a factor of {factor:.3g} per step backward in time"
    if trend == "stable":
        change = f"is stable backward in time, with a factor of {factor:.3g} per step"
    elif trend != ("shrinks" if factor < 1 else "grows" if factor > 1 else None):
        # Zeros or infinities decide the trend, so the factor may contradict it.
        change = f"changes by a factor of {factor:.3g} per step backward in time"
    return f"{change}: from {norms[first]:.3g} at step {first} to {norms[last]:.3g} at step {last}"


def _steepest(logs: dict[int, float], direction: int, trend: Trend | None) -> tuple[int, float] | None:
    """Find the step with the largest change.

    Args:
        logs: Logarithms of the norms, by step.
        direction: -1 if the gradient flows to earlier steps, 1 if it flows to later ones.
        trend: The overall trend.

    Returns:
        The step and the factor of its change; None if all changes are alike.
    """
    changes = {step: log - logs[step - direction] for step, log in logs.items() if step - direction in logs}
    if not changes or max(changes.values()) - min(changes.values()) <= math.log(1.01):
        return None
    sign = {"shrinks": -1, "grows": 1}.get(trend or "")
    step = max(changes, key=lambda step: sign * changes[step] if sign else abs(changes[step]))
    # Across a step where it is 0, a gradient can shrink although it rises between all neighboring steps.
    return None if sign and sign * changes[step] <= 0 else (step, _exp(changes[step]))


def _exp(log: float) -> float:
    """Return the exponential, or infinity beyond float64, such as for a rise from 1e-320 to 1."""
    return math.exp(log) if log < 709 else math.inf


def _describe_steps(steps: list[int], order: list[int]) -> str:
    """Describe some steps. Both lists are in the order in which the gradient flows."""
    if len(steps) == len(order):
        return "at every step"
    runs: list[list[int]] = []
    for step in steps:
        if runs and abs(step - runs[-1][-1]) == 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    if len(runs) > 2:
        return f"at {len(steps)} of the {len(order)} steps"
    to_the_end = "backward" if order[0] > order[-1] else "onward"
    return " and ".join(
        f"at step {run[0]}"
        if len(run) == 1
        else f"from step {run[0]} {to_the_end if run[-1] == order[-1] else f'to step {run[-1]}'}"
        for run in runs
    )

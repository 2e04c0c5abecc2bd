"""How a gradient changes on its way back through time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.tracing.indexing import position
from unrolled.tracing.layer_trace import LayerTrace

Trend = Literal["fades", "grows", "neither"]


_ENDS: dict[float, Trend] = {0: "fades", math.inf: "grows"}


def spectral_radii(cell: Cell) -> dict[str, list[float]]:
    """The spectral radius of every ``hidden × hidden`` block of the parameters that weigh a hidden state.

    Returns:
        By the parameter's name, one radius for each block of rows: that of a layer with four gates has
        four. Above 1 such a map, applied over and over, makes what it is given grow; below 1, fade.
    """
    found: dict[str, list[float]] = {}
    for name, shape in cell.shapes().items():
        # by its words too, since an input may have as many features as there are hidden units
        if len(shape) != 2 or shape[1] != cell.hidden or "hidden" not in str(cell.params()[name].shape[1]):
            continue
        if shape[0] % shape[1]:
            continue
        weight = getattr(cell, name).detach().cpu()
        weight = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
        if weight.isfinite().all():
            found[name] = _radii(weight.reshape(-1, shape[1], shape[1])).tolist()
    return found


def _radii(matrices: Tensor) -> Tensor:
    """The spectral radius of every matrix, to some eight digits: the limit of ``‖Aⁿ‖^(1/n)`` (Gelfand, 1941).

    Squared over and over, since on a busy machine LAPACK takes a minute for the eigenvalues of four matrices
    of 512 × 512, and these products take seconds.
    """
    logs = torch.zeros(len(matrices), dtype=torch.float64)
    for squarings in range(30):
        norms = matrices.abs().amax((1, 2))
        logs += norms.log() / 2**squarings
        matrices = matrices / torch.where(norms > 0, norms, 1)[:, None, None]
        matrices = matrices @ matrices
    return logs.exp()


@dataclass(frozen=True)
class Flow:
    """What becomes of a gradient on its way back through the steps of a row.

    Attributes:
        name: of the quantity.
        norms: the Euclidean norm of ∂loss/∂quantity at every time step.
        factor: by which the norm is multiplied a step on its way back, the geometric mean from the first step
            to the last at which it is a positive, finite number; None where there are no two such steps.
        trend: ``"fades"`` where the factor is below 0.9, less than half is left of the norm, or it ends at
            exactly 0; ``"grows"`` where the factor is above 1/0.9, the norm is more than doubled, or it ends
            at infinity; ``"neither"`` otherwise; None where no step, or only one, has anything to go by.
        steepest: the step, and by which factor the norm there differs from the one before it on the way back:
            the steepest fall of one that fades, the steepest rise of one that grows, otherwise the larger of
            both; None where all steps change it alike, within 1 %.
        words: all of this in a sentence.
    """

    name: str
    norms: tuple[float, ...]
    factor: float | None
    trend: Trend | None
    steepest: tuple[int, float] | None
    words: str


def flow(part: LayerTrace, name: str, batch: int = 0) -> Flow:
    """How large the gradient of a quantity is at every step of a row, and whether it fades or grows.

    It goes from the last step back to the first; in the backward direction, from the first to the last.

    Raises:
        KeyError, IndexError: there is no such quantity or row.
        ValueError: there was no :meth:`unrolled.Trace.backward`, or the quantity is the input.
    """
    part.check_whole("the gradient's way")
    gradient = part.gradient(name)
    batch = position("row", batch, gradient.shape[1])
    length = int(part.lengths[batch])
    rows = gradient[:length, batch].reshape(length, -1)
    rows = rows.to(torch.complex128 if rows.is_complex() else torch.float64).abs()
    # unlike a sum of squares, hypot neither overflows nor loses what is very small
    norms = tuple(math.hypot(*row) for row in rows.tolist())
    forward = part.direction == "forward"
    way = [*range(len(norms))][:: -1 if forward else 1]

    logs = {step: math.log(norms[step]) for step in way if 0 < norms[step] < math.inf}
    factor = trend = steepest = None
    clauses = []
    if logs:
        first, last = next(iter(logs)), next(reversed(logs))
        change, steps = logs[last] - logs[first], abs(last - first)
        factor = _exp(change / steps) if steps else None
        trend = _ENDS.get(norms[way[-1]]) or (_trend(change, steps) if steps else None)
        steepest = _steepest(logs, -1 if forward else 1, trend)
        clauses = [_course(norms, first, last, factor, trend)]
    for what, found in (
        ("exactly 0", [step for step in way if norms[step] == 0]),
        ("infinite", [step for step in way if norms[step] == math.inf]),
        ("NaN", [step for step in way if math.isnan(norms[step])]),
    ):
        if found:
            clauses.append(f"is {what} {_where(found, way)}")
    words = f"the gradient of {name} " + "; it ".join(clauses)
    if steepest:
        step, by = steepest
        words += f"; the steepest {'fall' if by < 1 else 'rise'}, by a factor of {by:.3g}, is at step {step}"
    return Flow(name, norms, factor, trend, steepest, words)


def _trend(change: float, steps: int) -> Trend:
    """What a change of the logarithm over so many steps is called."""
    if abs(change) <= min(math.log(2), -math.log(0.9) * steps):
        return "neither"
    return "fades" if change < 0 else "grows"


def _course(
    norms: tuple[float, ...], first: int, last: int, factor: float | None, trend: Trend | None
) -> str:
    if factor is None:
        return f"is {norms[first]:.3g} at step {first}"
    how = f"{trend} by a factor of {factor:.3g} a step on its way back"
    if trend == "neither":
        how = f"neither fades nor grows on its way back, with a factor of {factor:.3g} a step"
    elif trend != ("fades" if factor < 1 else "grows" if factor > 1 else None):  # zeros or infinity decide
        how = f"changes by a factor of {factor:.3g} a step on its way back"
    return f"{how}: from {norms[first]:.3g} at step {first} to {norms[last]:.3g} at step {last}"


def _steepest(logs: dict[int, float], towards: int, trend: Trend | None) -> tuple[int, float] | None:
    """The step with the steepest change and its factor, given the logarithms of the norms."""
    changes = {step: log - logs[step - towards] for step, log in logs.items() if step - towards in logs}
    if not changes or max(changes.values()) - min(changes.values()) <= math.log(1.01):
        return None
    sign = {"fades": -1, "grows": 1}.get(trend or "")
    step = max(changes, key=lambda step: sign * changes[step] if sign else abs(changes[step]))
    # across a step that is 0, a gradient may fade although all neighbours rise
    return None if sign and sign * changes[step] <= 0 else (step, _exp(changes[step]))


def _exp(log: float) -> float:
    """The exponential, infinite where float64 ends: a rise from 1e-320 to 1 has such a factor."""
    return math.exp(log) if log < 709 else math.inf


def _where(steps: list[int], way: list[int]) -> str:
    """Which steps these are, both in the order of the way back."""
    if len(steps) == len(way):
        return "at every step"
    runs: list[list[int]] = []
    for step in steps:
        if runs and abs(step - runs[-1][-1]) == 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    if len(runs) > 2:
        return f"at {len(steps)} of the {len(way)} steps"
    onwards = "back" if way[0] > way[-1] else "on"
    return " and ".join(
        f"at step {run[0]}"
        if len(run) == 1
        else f"from step {run[0]} {onwards if run[-1] == way[-1] else f'to step {run[-1]}'}"
        for run in runs
    )

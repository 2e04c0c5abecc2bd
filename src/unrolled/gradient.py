"""The gradient through time of a traced layer: ∂loss/∂quantity at every step, and the weights behind it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from unrolled import engines
from unrolled.cell import Cell
from unrolled.layer_trace import LayerTrace, position
from unrolled.layers import Recurrent
from unrolled.recording import StepRecorder, cuda_devices, drawing_from
from unrolled.sequence import Sequence as Steps
from unrolled.tensors import map_tensors, tensors

Loss = Callable[..., Tensor]
Trend = Literal["fades", "grows", "neither"]
_ENDS: dict[float, Trend] = {0: "fades", math.inf: "grows"}


def through_time(
    recurrent: Recurrent,
    cells: Sequence[Cell],
    starts: Sequence[tuple[Tensor, ...]],
    call: tuple[Any, Any],
    random_state: list[Tensor],
    loss: Loss | Tensor,
    drop: Callable[[Tensor, float], Tensor] = dropout,
) -> list[dict[str, Tensor]]:
    """Run a layer again, and its backward: ``∂loss/∂quantity`` of every layer and direction.

    Args:
        recurrent: the layer, in the mode in which it is to run.
        cells: of every layer and direction, bound to the parameters that count.
        starts: the initial states of each of them, ``(batch, size)`` in the order of the engines' rows.
        call: the input and state that the layer was given.
        random_state: from which dropout between layers is drawn.
        loss: as :meth:`unrolled.Trace.backward` takes it.
        drop: the dropout between layers.

    Returns:
        For each cell, by the name of the quantity, ``(time, batch, size)``; zeros where the loss doesn't
        depend on it.
    """
    recorders: list[StepRecorder] = []
    turned: list[tuple[Steps, bool]] = []
    with differentiating(random_state, cuda_devices(call[0])):
        x, state = (map_tensors(part, lambda tensor: tensor.detach().clone()) for part in call)
        x = map_tensors(x, lambda tensor: tensor.requires_grad_())
        steps = Steps.of(x, recurrent.batch_first, type(recurrent).__name__)

        def run(_: list[Cell], rows: Tensor, __: Any, sizes: Any) -> Any:
            results = []
            for reverse in (False, True)[: 1 + recurrent.bidirectional]:
                which = len(recorders)
                # copies, since nothing of a trace made in inference mode can be differentiated
                copies = {name: getattr(cells[which], name).clone() for name in cells[which].shapes()}
                recorder = StepRecorder(cells[which].bind(copies), keep=lambda tensor: tensor)
                start = tuple(part.detach().clone().requires_grad_() for part in starts[which])
                recorders.append(recorder)
                turned.append((steps, reverse))
                results.append(engines.reference.run(recorder.cell, rows, start, sizes, reverse))
            return results

        value = _value(loss, *recurrent.unroll(x, state, run, drop))
        named = [kept for recorder in recorders for kept in recorder.kept]
        reached = [tensor for kept in named for tensor in kept.values() if tensor.requires_grad]
        slopes = torch.autograd.grad(value, reached, allow_unused=True)
        if all(slope is None for slope in slopes):
            raise ValueError(
                "the loss should give one number that depends on the output, got one that doesn't"
            )
        gradients = dict(zip(map(id, reached), slopes, strict=True))
    found = []
    for recorder, (steps, reverse) in zip(recorders, turned, strict=True):
        for kept in recorder.kept:
            for name, tensor in kept.items():
                gradient = gradients.get(id(tensor))
                kept[name] = torch.zeros_like(tensor) if gradient is None else gradient.detach()
        found.append(recorder.values(steps, reverse))
    return found


@contextmanager
def differentiating(random_state: list[Tensor], devices: list[torch.device]) -> Iterator[None]:
    """Record gradients, whatever the caller does, and draw from this random state."""
    with torch.inference_mode(False), torch.enable_grad(), drawing_from(random_state, devices):
        yield


def _value(loss: Loss | Tensor, output: Tensor | PackedSequence, state: Any) -> Tensor:
    """The loss of an output, checked."""
    if isinstance(loss, Tensor):
        data = output.data if isinstance(output, PackedSequence) else output
        if loss.shape != data.shape:
            given = f"a tensor of the shape {tuple(loss.shape)}"
            if loss.numel() == 1:
                given += ": for a loss that is computed already, record(model, gradients=True)"
            raise ValueError(
                "backward takes a function of the output, such as lambda output: output.square().mean(), or "
                f"a target of the output's shape {tuple(data.shape)}, got {given}"
            )
        if loss.is_complex() and not data.is_complex():
            raise ValueError("the target should be of real numbers as the output is, got complex ones")
        difference = data - loss.detach().to(data)
        return (difference.abs() if difference.is_complex() else difference).square().mean()
    if not callable(loss):
        raise TypeError(
            f"the loss should be a function of the output or a tensor, the target, got {type(loss).__name__}"
        )
    state = map_tensors(state, Tensor.clone)  # a loss may change it in place, and it is that of the last step
    value = loss(output, state) if _takes_two(loss) else loss(output)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad or value.is_complex():
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = "a complex one" if value.is_complex() else "one that doesn't"
            got = got if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
        raise ValueError(f"the loss should give one number that depends on the output, got {got}")
    return value.sum()


def _takes_two(loss: Loss) -> bool:
    """Whether a function has two arguments that must be given: output and final state.

    Raises:
        TypeError: it takes more or none; one is called a target, as those of torch's losses are.
    """
    try:
        called = loss.forward if isinstance(loss, nn.Module) else loss
        arguments = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # of functions in C
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one for one in arguments if one.kind in places]
    needed = [one.name for one in taken if one.default is one.empty]
    if "target" in needed:
        raise TypeError(
            "the loss should be a function of the output, or of output and final state, and this one takes a "
            "target: give lambda output: loss(output, target)"
        )
    if len(needed) > 2 or not (taken or any(one.kind is one.VAR_POSITIONAL for one in arguments)):
        raise TypeError(
            "the loss should be a function of the output, or of output and final state, and this one takes "
            f"{len(needed) or 'no'} arguments"
        )
    return len(needed) == 2


def pulling(output: Any, state: Any) -> Loss:
    """The loss whose gradient with respect to output and final state is what is given; None counts as zero.

    Args:
        output: as the output of the layer, or None.
        state: as the final state of the layer, any of its tensors None.
    """
    given = [*_parts(output), *_parts(state)]

    def loss(output: Any, state: Any) -> Tensor:
        made = tensors((output, state))
        pairs = [(a, b) for a, b in zip(made, given, strict=True) if b is not None]
        products = [(a * b.to(a).conj()).sum() for a, b in pairs] or [made[0].sum() * 0]
        return torch.stack([one.real if one.is_complex() else one for one in products]).sum()

    return loss


def _parts(value: Any) -> list[Tensor | None]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return list(value) if isinstance(value, (tuple, list)) else [value]


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

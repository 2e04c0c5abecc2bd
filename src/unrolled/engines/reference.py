"""The reference engine: the step as it is written, one time step after another, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unrolled.cells.base import Cell


def run(
    cell: Cell,
    x: Tensor,
    state: tuple[Tensor, ...] | None = None,
    sizes: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a cell over a sequence.

    Args:
        cell: with its parameters bound.
        x: ``(time, batch, input)``; with ``sizes`` ``(sum of sizes, input)``, the steps in a row.
        state: the initial states, each ``(batch, size)``; None: zeros.
        sizes: how many rows have a step at each time, never growing; None: all of them.
        reverse: from the last time step to the first.

    Returns:
        The first state after every step, laid out as ``x``, and each row's final states.

    Raises:
        TypeError, ValueError: the step returns something else than its states, or changes them in place.
    """
    state = zeros(cell, x, sizes) if state is None else state
    state = tuple(map(_counted, state))
    begun = _versions(x, *state)
    given = state
    steps = x.unbind(0) if sizes is None else torch.split(x, sizes)
    outputs: list[Tensor] = [x] * len(steps)
    for count, t in enumerate(reversed(range(len(steps))) if reverse else range(len(steps))):
        rows = len(steps[t])
        running = tuple(whole[:rows] for whole in state) if rows < len(state[0]) else state
        new = cell.step(steps[t], *running)
        new = new if isinstance(new, tuple) else (new,)
        if count == 0:
            check_step(cell, new, running)
        outputs[t] = new[0]
        if rows < len(state[0]):
            new = tuple(torch.cat((part, whole[rows:])) for part, whole in zip(new, state, strict=True))
        state = new
    if _versions(x, *given) != begun:
        raise ValueError(
            f"{type(cell.innermost).__name__}.step changes its input or state in place, which earlier steps "
            "still hold: write h = h * f in the place of h *= f"
        )
    return torch.stack(outputs) if sizes is None else torch.cat(outputs), state


def run_in_segments(
    length: int,
    cell: Cell,
    x: Tensor,
    state: tuple[Tensor, ...] | None,
    sizes: None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`run`, keeping for the backward no more than the states between segments of so many steps."""
    state = zeros(cell, x) if state is None else state
    outputs: list[Tensor] = []
    parts = torch.split(x, length)
    for part in reversed(parts) if reverse else parts:
        output, state = checkpoint(run, cell, part, state, None, reverse, use_reentrant=False)
        outputs.append(output)
    return torch.cat(outputs[::-1] if reverse else outputs), state


def zeros(cell: Cell, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    """Initial states of zeros for a sequence, as :func:`run` takes it."""
    rows = x.shape[1] if sizes is None else sizes[0]
    return tuple(x.new_zeros(rows, size) for size in cell.state_sizes().values())


def check_step(cell: Cell, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> None:
    """Raise where a step doesn't return its states in their shapes."""
    step = f"{type(cell.innermost).__name__}.step"
    names = ", ".join(cell.state)
    if len(new) != len(old):
        raise TypeError(f"{step} should return {len(old)} states ({names}), got {len(new)}")
    for name, after, before in zip(cell.state, new, old, strict=True):
        if not isinstance(after, Tensor):
            raise TypeError(f"{step} should return tensors ({names}), got {type(after).__name__} for {name}")
        if after.shape != before.shape:
            raise ValueError(
                f"{step} returned {name} of shape {tuple(after.shape)}, expected {tuple(before.shape)}"
            )


def _counted(state: Tensor) -> Tensor:
    """The state, as a tensor of which torch counts the changes in place, in inference mode too."""
    if torch.compiler.is_compiling() or not state.is_inference():
        return state
    with torch.inference_mode(False):
        return state.clone()


def _versions(*tensors: Tensor) -> list[int]:
    """How often each tensor was changed in place; nothing where torch doesn't count or is compiling."""
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors if not tensor.is_inference()]

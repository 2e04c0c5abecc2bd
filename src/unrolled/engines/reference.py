"""The reference engine: run the step as written in Python, one time step after another, on any device."""

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
        cell: The cell, bound to its parameters.
        x: Input of shape ``(time, batch, input)``, or ``(sum of sizes, input)`` if ``sizes`` is given.
        state: Initial states, each of shape ``(batch, size)``. Zeros if None.
        sizes: Number of sequences at each time step, as in a packed sequence. It never grows over time.
            If None, all sequences have all time steps.
        reverse: Run from the last time step to the first.

    Returns:
        The first state after each time step, with the layout of ``x``, and the final states.

    Raises:
        TypeError: If the step doesn't return its states as tensors.
        ValueError: If the step returns states of another shape, or changes its input or a state in place.
    """
    state = zeros(cell, x, sizes) if state is None else state
    state = tuple(map(_with_version_counter, state))
    initial = state
    versions = _versions(x, *initial)
    steps = x.unbind(0) if sizes is None else torch.split(x, sizes)
    outputs: list[Tensor] = [x] * len(steps)
    for count, t in enumerate(reversed(range(len(steps))) if reverse else range(len(steps))):
        rows = len(steps[t])
        running = tuple(part[:rows] for part in state) if rows < len(state[0]) else state
        new = cell.step(steps[t], *running)
        new = new if isinstance(new, tuple) else (new,)
        if count == 0:
            check_step(cell, new, running)
        outputs[t] = new[0]
        if rows < len(state[0]):
            new = tuple(torch.cat((part, old[rows:])) for part, old in zip(new, state, strict=True))
        state = new
    if _versions(x, *initial) != versions:
        raise ValueError(
            f"{type(cell.innermost).__name__}.step changes its input or state in place, but other time steps "
            "still use that tensor: write h = h * f instead of h *= f"
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
    """Run a cell as :func:`run` does, with gradient checkpointing for segments of ``length`` time steps.

    Only the states between segments are saved for the backward pass.
    """
    state = zeros(cell, x) if state is None else state
    outputs: list[Tensor] = []
    segments = torch.split(x, length)
    for segment in reversed(segments) if reverse else segments:
        output, state = checkpoint(run, cell, segment, state, None, reverse, use_reentrant=False)
        outputs.append(output)
    return torch.cat(outputs[::-1] if reverse else outputs), state


def zeros(cell: Cell, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    """Return initial states of zeros for an input that :func:`run` takes."""
    rows = x.shape[1] if sizes is None else sizes[0]
    return tuple(x.new_zeros(rows, size) for size in cell.state_sizes().values())


def check_step(cell: Cell, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> None:
    """Check that a step returns as many states as it takes, with the same shapes.

    Raises:
        TypeError: If the number of states differs, or a state is not a tensor.
        ValueError: If a state has another shape.
    """
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


def _with_version_counter(state: Tensor) -> Tensor:
    """Return the state as a tensor with a version counter, which inference tensors don't have."""
    if torch.compiler.is_compiling() or not state.is_inference():
        return state
    with torch.inference_mode(False):
        return state.clone()


def _versions(*tensors: Tensor) -> list[int]:
    """Return the version counter of each tensor, skipping inference tensors; empty while compiling."""
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors if not tensor.is_inference()]

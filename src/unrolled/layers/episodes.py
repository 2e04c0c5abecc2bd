"""Episodes: the parts of a row that resets separate. NaN in one stays out of the gradients of the others.

In the backward, a step that the loss doesn't depend on has gradients of zero. If it computes with NaN or
infinity, these would become NaN (0 · NaN), and with them the gradients of all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all values are finite. A sum that overflows counts as infinite."""
    return all(bool(tensor.detach().sum().isfinite()) for tensor in tensors)


def find_nonfinite(
    values: Sequence[Tensor],
    initial: Sequence[Sequence[Tensor]],
    resets: Tensor,
    batch_sizes: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find the episodes with NaN or infinity that another episode of the same row follows.

    Args:
        values: The input and the output of each direction, ``(time, batch, features)``, or
            ``(sum of batch_sizes, features)`` if packed.
        initial: The initial states of each direction, ``(batch, size)`` each. They belong to the episode with
            which the direction begins.
        resets: The steps with which episodes begin, with the same first dimensions. The last dimension is 1,
            or 2 for a bidirectional layer, where all episodes of a row follow one another in some direction.
        batch_sizes: The number of rows that have each time step, if packed.

    Returns:
        Whether each step belongs to such an episode, in the layout of ``values`` with one feature, and
        whether the first and the last step of each row do, ``(batch, 1)`` each. None if no step does.
    """
    nonfinite = torch.stack([~value.detach().isfinite().all(-1) for value in values]).any(0)
    starts = resets[..., 0]
    if batch_sizes is not None:
        nonfinite, starts = _pad(nonfinite, batch_sizes), _pad(starts, batch_sizes)
    exists = torch.ones_like(starts)
    if batch_sizes is not None:
        sizes = torch.tensor(batch_sizes, device=starts.device).unsqueeze(1)
        exists = torch.arange(starts.shape[1], device=starts.device) < sizes
    last_steps = exists.sum(0) - 1
    for states, begins in zip(initial, (torch.zeros_like(last_steps), last_steps), strict=False):
        for state in states:
            bad = ~state.detach().isfinite().all(-1)
            nonfinite = nonfinite.scatter(0, begins[None], nonfinite.gather(0, begins[None]) | bad)
    episode = starts.cumsum(0)  # the number of each step's episode
    counts = nonfinite.new_zeros(len(episode) + 1, episode.shape[1], dtype=torch.int64)
    found = counts.scatter_add(0, episode, nonfinite.to(torch.int64)).gather(0, episode) > 0
    found &= (episode if resets.shape[-1] == 1 else episode[:1]) < episode[-1:]
    if not found.any():
        return None
    first, last = found[0], found.gather(0, last_steps[None])[0]
    found = found if batch_sizes is None else found[exists]
    return found.unsqueeze(-1), first.unsqueeze(-1), last.unsqueeze(-1)


def _pad(steps: Tensor, batch_sizes: Sequence[int]) -> Tensor:
    """Return packed booleans as ``(time, batch)``, with False past the end of each row."""
    padded = steps.new_zeros(len(batch_sizes), batch_sizes[0])
    for t, rows in enumerate(torch.split(steps, list(batch_sizes))):
        padded[t, : len(rows)] = rows
    return padded

"""Functions that only move elements: where each element of their result comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOVES = frozenset(  # functions that only move elements
    {"chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "index_select", "flip"}
    | {"cat", "concat", "concatenate", "hstack", "stack", "expand", "expand_as", "repeat", "roll", "clone"}
    | {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
    | {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT"}
    | {"detach", "broadcast_to", "view_as", "reshape_as", "ravel", "tile", "repeat_interleave", "diagonal"}
    | {"unfold", "vstack", "column_stack", "fliplr", "flipud", "rot90", "data"}
)


def trace_moves(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output_index: int | None,
    first: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Find the source of each element by running the function on tensors of running numbers.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output_index: Position of the result among the outputs; None if the function returns one tensor.
        first: The first number. With 1, elements that the function sets to 0 come from operand -1.

    Returns:
        The operand that each element comes from, and its flat index counted in each operand.
    """
    sources: list[Tensor] = []

    positional = len(args) > 0  # the tensors come first, then the arguments that say how to move
    new_args = (_numbered(args[0], sources, first), *args[1:]) if positional else ()
    tensor_arguments = ("input", "tensors", "tensor")
    new_kwargs = {
        k: _numbered(v, sources, first) if not positional and k in tensor_arguments else v
        for k, v in kwargs.items()
    }
    result = function(*new_args, **new_kwargs)
    positions = (result if output_index is None else result[output_index]).flatten() - first
    sizes = torch.tensor([source.numel() for source in sources], device=positions.device)
    operands = torch.arange(len(sources), device=positions.device).repeat_interleave(sizes)
    if operands.numel() == 0:
        return torch.full_like(positions, -1), [positions for _ in sources]
    from_operand = torch.where(positions < 0, -1, operands[positions.clamp(min=0)])
    return from_operand, [positions - start for start in (sizes.cumsum(0) - sizes).tolist()]


def _numbered(value: Any, sources: list[Tensor], first: int) -> Any:
    """Replace tensors by running numbers from ``first`` on, and append them to ``sources``."""
    if isinstance(value, (tuple, list)):
        return type(value)(_numbered(part, sources, first) for part in value)
    start = first + sum(source.numel() for source in sources)
    sources.append(value)
    return torch.arange(start, start + value.numel(), device=value.device).reshape(value.shape)


def find_runs(source_operands: Tensor, element_maps: Sequence[Tensor]) -> list[list[int]]:
    """Compress the sources of a moved tensor's elements into runs with a constant stride.

    Args:
        source_operands: The operand that each element comes from.
        element_maps: For each operand, the flat index of the element in it.

    Returns:
        For each run: the operand, the index of the first element in it, the number of elements, the stride.
    """
    operands = source_operands.cpu().numpy()
    table = torch.stack(list(element_maps))
    indices = table.gather(0, source_operands.clamp(min=0).unsqueeze(0))[0].cpu().numpy()
    stride, same_operand = np.diff(indices), operands[1:] == operands[:-1]
    breaks = np.flatnonzero(~same_operand[1:] | ~same_operand[:-1] | (stride[1:] != stride[:-1])) + 1
    runs: list[list[int]] = []
    start = 0
    while start < len(indices):
        has_several = start + 1 < len(indices) and bool(same_operand[start])
        next_break = np.searchsorted(breaks, start, side="right")
        last = int(breaks[next_break] if next_break < len(breaks) else len(indices) - 1)
        end = last if has_several else start
        step = int(stride[start]) if has_several else 1
        runs.append([int(operands[start]), int(indices[start]), end - start + 1, step])
        start = end + 1
    return runs

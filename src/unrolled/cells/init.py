"""What several cells are made of: matrices in blocks, and how parameters begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, nn
from torch.nn.functional import linear

from unrolled.cells.base import Cell


def block_linear(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The weighted sums of each head with its own part of x.

    Args:
        x: ``(batch, heads * inputs)``.
        weight: ``(heads * outputs, inputs)``, the blocks below one another.
        bias: ``(heads * outputs,)`` or None.
        heads: how many.

    Returns:
        ``(batch, heads * outputs)``.
    """
    if heads == 1:
        return linear(x, weight, bias)
    blocks = zip(x.chunk(heads, -1), weight.chunk(heads), strict=True)
    sums = cat([linear(part, block) for part, block in blocks], -1)
    return sums if bias is None else sums + bias


def check_heads(cell: Any) -> None:
    """Raise ValueError where a cell's ``heads`` don't divide its hidden size."""
    if cell.heads < 1 or cell.hidden % cell.heads:
        raise ValueError(
            f"heads should divide hidden_size={cell.hidden}, so that all have as many units, got {cell.heads}"
        )


def each(init: Callable[[Tensor], Any], parts: int) -> Callable[[Tensor], None]:
    """An initialisation of so many matrices below one another, each by itself."""

    def fill(weight: Tensor) -> None:
        for part in weight.chunk(parts):
            init(part)

    return fill


def lecun_normal(weight: Tensor) -> None:
    """Normal with a variance of 1 over the inputs."""
    nn.init.kaiming_normal_(weight, nonlinearity="linear")


def like_linear(tensor: Tensor, cell: Cell) -> None:
    """The initialisation of torch.nn.Linear: uniform in ±1/sqrt(input)."""
    bound = cell.input**-0.5
    nn.init.uniform_(tensor, -bound, bound)

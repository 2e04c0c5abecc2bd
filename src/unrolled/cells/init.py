"""Block matrices and parameter initializers that several cells share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, nn
from torch.nn.functional import linear

from unrolled.cells.base import Cell


def block_linear(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Apply a block-diagonal linear layer: each head sees only its own part of x.

    Args:
        x: Input of shape ``(batch, heads * inputs)``.
        weight: The blocks, concatenated along the first dimension: ``(heads * outputs, inputs)``.
        bias: ``(heads * outputs,)`` or None.
        heads: Number of blocks.

    Returns:
        A tensor of shape ``(batch, heads * outputs)``.
    """
    if heads == 1:
        return linear(x, weight, bias)
    blocks = zip(x.chunk(heads, -1), weight.chunk(heads), strict=True)
    sums = cat([linear(part, block) for part, block in blocks], -1)
    return sums if bias is None else sums + bias


def check_heads(cell: Any) -> None:
    """Raise ValueError if ``cell.heads`` doesn't divide the hidden size."""
    if cell.heads < 1 or cell.hidden % cell.heads:
        raise ValueError(
            f"heads should divide hidden_size={cell.hidden}, so that all heads have the same size, got "
            f"{cell.heads}"
        )


def init_per_gate(init: Callable[[Tensor], Any], gates: int) -> Callable[[Tensor], None]:
    """Return an initializer that applies ``init`` to the matrix of each gate separately.

    Args:
        init: Fills one tensor in place, such as ``torch.nn.init.orthogonal_``.
        gates: Number of matrices that are concatenated along the first dimension of the parameter.
    """

    def init_gates(weight: Tensor) -> None:
        for matrix in weight.chunk(gates):
            init(matrix)

    return init_gates


def lecun_normal(weight: Tensor) -> None:
    """Fill a weight from a normal distribution with variance 1/inputs."""
    nn.init.kaiming_normal_(weight, nonlinearity="linear")


def init_like_linear(tensor: Tensor, cell: Cell) -> None:
    """Fill a weight or bias as torch.nn.Linear does: uniform in ±1/sqrt(input)."""
    bound = cell.input**-0.5
    nn.init.uniform_(tensor, -bound, bound)

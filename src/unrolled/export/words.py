"""Pack quantized matrices into words of 32 bits, as the functions of ``runtime/`` read them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from unrolled.cells.quantized_products import quantize_weights, saturated, weight_scales

ROW_HEADER = 2  # words before those of a row in int8: its scale, and what its sums begin with
_ROW_BLOCK = 16  # numbers of a row in int8 are written in blocks


def pack_int8(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices in int8: four consecutive terms in a word, and the scale of each column.

    Args:
        matrices: ``(term, product, column)``, in float32.

    Returns:
        The words, ``(term / 4, product, column)``, and the scales, ``(product, column)``.
    """
    scales = weight_scales(matrices, 0)
    return _words(quantize_weights(matrices, scales)), scales[0]


def pack_16_bits(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices in bfloat16 or float16 as words, ``(term / 2, product, column)``."""
    return _words(saturated(matrices, dtype).to(dtype))


def row_size(terms: int) -> int:
    """Return how many words a row in int8 has."""
    return ROW_HEADER + -(-terms // _ROW_BLOCK) * _ROW_BLOCK // 4


def _words(values: Tensor) -> Tensor:
    """Put consecutive terms into words of 32 bits, the first one into the lowest bits."""
    count = 4 // values.element_size()
    terms, products, columns = values.shape
    values = F.pad(values, (0, 0, 0, 0, 0, -terms % count))
    parts = values.reshape(-1, count, products, columns).permute(0, 2, 3, 1).contiguous()
    return parts.view(torch.int32).squeeze(-1)

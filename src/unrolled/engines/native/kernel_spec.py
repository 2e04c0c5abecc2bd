"""The generated source of a kernel, and the arguments that it is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import width
from unrolled.engines.compiler.kernel_ir import Product

WEIGHT_FORMATS = {torch.int8: 1, torch.bfloat16: 2, torch.float16: 3}
"""The numbers of the formats of quantized weights, as ``WeightFormat`` in products.h."""


@dataclass(frozen=True)
class Pack:
    """Products of the same row that a phase accumulates together. Their matrices are packed as one.

    Attributes:
        products: The products.
        width: Number of columns of each.
        dtype: Dtype in which the matrices are packed.
    """

    products: tuple[Product, ...]
    width: int
    dtype: torch.dtype

    @property
    def depth(self) -> int:
        """Number of terms of each sum."""
        return width(self.products[0].row)

    @property
    def work(self) -> int:
        """Number of multiply-adds of floats that take as long as a sum."""
        return self.lines if self.dtype is torch.int8 else self.depth

    @property
    def lines(self) -> int:
        """Number of elements that a packed column takes, see ``packed_lines`` in products.h."""
        match self.dtype:
            case torch.int8:
                return 2 + -(-self.depth // 4)
            case torch.bfloat16 | torch.float16:
                return -(-self.depth // 2)
        return self.depth


@dataclass(frozen=True)
class KernelSpec:
    """The source of a kernel, and the arguments that it is called with.

    Attributes:
        source: C++; the same for all sizes.
        sizes: Widths and offsets, in the order in which ``Loop::set_up`` in loop.h reads them, and then those
            that the functions of the source read.
        strides: Matrices, and for each the index in ``sizes`` of its two strides.
        pointers: For each pointer of a call its kind, and the node, state or product that it belongs to.
        packs: The products that are packed together.
        hoisted_rows: What hoisted products read: values that are known before the loop.
        columnwise: Whether each column of a step depends only on the same column of the previous step. Then
            threads needn't synchronize.
        deferred: Whether some values are computed after the steps of a block.
    """

    source: str
    sizes: list[int]
    strides: list[tuple[fx.Node, int]]
    pointers: list[tuple[str, Any]]
    packs: list[Pack]
    hoisted_rows: frozenset[fx.Node]
    columnwise: bool
    deferred: bool

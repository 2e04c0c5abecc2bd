"""The generated source of a kernel, and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from unrolled.engines.compiler.ir import width

# The numbers of a call that stand before a loop's sizes: how many, and where some stand (include/loop.h).
HEADER, ROW_COUNT, THREADS, BY_ROWS, PACKED = 9, 1, 3, 5, 6


@dataclass(frozen=True)
class Product:
    """The panels of a matrix product that a phase accumulates: ``row @ matrix[:, offset:]``."""

    row: fx.Node
    matrix: fx.Node
    offset: int


@dataclass(frozen=True)
class Pack:
    """Products of one row that a phase accumulates side by side, packed together."""

    products: tuple[Product, ...]
    width: int

    @property
    def depth(self) -> int:
        """How many terms each sum has."""
        return width(self.products[0].row)


@dataclass(frozen=True)
class Emitted:
    """The source of a loop, and what it is called with.

    Attributes:
        source: C++; the same for all sizes.
        sizes: widths and offsets, in the order in which the source reads them.
        strides: matrices, and where among the sizes their two strides stand.
        shifts: values read of the step before, and where among the sizes that step's distance stands.
        pointers: what each pointer of a call is: its kind, and whose.
        packs: the products that are packed together.
        hoisted: products of the step that the loop sums up for many steps at once.
        apart: whether each column follows from itself alone, so that threads never wait for one another.
        late: whether something is computed after the steps of a block.
    """

    source: str
    sizes: list[int]
    strides: list[tuple[fx.Node, int]]
    shifts: list[tuple[fx.Node, int]]
    pointers: list[tuple[str, Any]]
    packs: list[Pack]
    hoisted: frozenset[fx.Node]
    apart: bool
    late: bool

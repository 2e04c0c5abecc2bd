"""What the compiler's stages hand to one another: values of the batch, products, the emitted source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

ROWS = 1_000_003  # the batch while capturing: no other size is likely to equal this prime


# The numbers of a call that stand before a loop's sizes: how many, and where some stand (include/loop.h).
HEADER, ROW_COUNT, THREADS, BY_ROWS, PACKED = 9, 1, 3, 5, 6


class UnsupportedError(Exception):
    """A step that the compiler can't take, and why."""


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


def per_row(node: fx.Node) -> bool:
    """Whether a node has a row for each row of the batch (else it is made of parameters alone)."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and ROWS in value.shape


def is_sum_of_rows(node: fx.Node) -> bool:
    """Whether a node is the sum of each column of another."""
    return node.target is torch.ops.aten.sum.dim_IntList and node.args[1:] == ([0],)


def width(node: fx.Node) -> int:
    """The columns of a value of the loop."""
    shape = node.meta["val"].shape
    return int(shape[1]) if per_row(node) else math.prod(shape)


def literal(value: object) -> str:
    """A number as C++ has it."""
    number = float(value)  # type: ignore[arg-type]
    if math.isinf(number):
        return "-INFINITY" if number < 0 else "INFINITY"
    return "NAN" if math.isnan(number) else repr(number)

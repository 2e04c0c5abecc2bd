"""What a loop is made of: phases, the products they accumulate, and the emitted source."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from unrolled.engines.native.graph import UnsupportedError, per_row


@dataclass(frozen=True)
class Product:
    """The panels of a matrix product that a phase accumulates: ``row @ matrix[:, offset:]``."""

    row: fx.Node
    matrix: fx.Node
    offset: int


@dataclass
class Phase:
    """A pass over the panels of one width: what it accumulates and what it stores."""

    width: int
    stores: list[tuple[fx.Node, fx.Node, int]] = field(default_factory=list)  # what, into, from column
    products: dict[fx.Node, list[Product]] = field(default_factory=dict)  # by the row that is read


@dataclass(frozen=True)
class Emitted:
    """The source of a loop, and what it is called with.

    Attributes:
        source: C++; the same for all sizes.
        sizes: widths and offsets, in the order in which the source reads them.
        arrays: nodes whose arrays the loop is given, in order: those read of every step or of
            parameters, the old states, the new states, those kept, and its scratch.
        packs: for each group of products, the products and their common width.
    """

    source: str
    sizes: list[int]
    arrays: list[fx.Node]
    scratch: list[fx.Node]
    packs: list[tuple[list[Product], int]]


def width(node: fx.Node) -> int:
    """The columns of a value of the loop."""
    shape = node.meta["val"].shape
    if per_row(node):
        if len(shape) != 2 or shape[1] < 1:
            raise UnsupportedError(f"{node.target} makes a value of {len(shape)} axes for each batch")
        return int(shape[1])
    return math.prod(shape)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of an operation: nodes, numbers and lists of these."""
    return node.args


def literal(value: object) -> str:
    """A number as C++ has it."""
    number = float(value)  # type: ignore[arg-type]
    if math.isinf(number):
        return "-INFINITY" if number < 0 else "INFINITY"
    return "NAN" if math.isnan(number) else repr(number)

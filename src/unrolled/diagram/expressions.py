"""Expressions of a step: what each tensor, or some of its elements, is computed from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unrolled.diagram.indices import Index, as_index

LEAVES = ("input", "state", "draw", "parameter", "constant")


@dataclass(frozen=True, eq=False)
class Product:
    """The weights of a weighted sum.

    Attributes:
        matrix: ``(rows, columns)``.
        weight: The expression of the weights, to name them if they are computed from several parameters.
        parameter: The parameter that they are rows of, or empty.
        rows: These rows.
        parameter_rows: The number of rows of the parameter.
        transposed: Whether ``rows`` counts in the transposed parameter.
        blocks: Number of diagonal blocks.
        bias: The expression of the vector that is added, or None.
        bias_rows: The elements of ``bias`` that are added.
    """

    matrix: Tensor
    weight: Expression
    parameter: str = ""
    rows: tuple[int, int] | None = None
    parameter_rows: int = 0
    transposed: bool = False
    blocks: int = 1
    bias: Expression | None = None
    bias_rows: range = range(0)


@dataclass(eq=False)
class Expression:
    """A tensor or some elements of one, and what it is computed from.

    Attributes:
        operation: One of ``LEAVES``, ``"weighted"`` (sums), ``"add"``, ``"sub"``, ``"mul"``, ``"div"``,
            ``"neg"``, ``"call"`` (another function), ``"take"`` (elements of another expression) or
            ``"join"``.
        value: The values, flat.
        name: Of a leaf or function.
        arguments: The operands.
        quantity: The variable that it is assigned to in the step, or empty.
        index: The elements that are taken, or that a parameter has of the whole one.
        product: The weights of weighted sums.
        call: A function as Python code, with ``{}`` for each argument that isn't a constant.
        shapes: For a function that isn't elementwise, the shapes of the operands.
        static: Whether it depends neither on the input nor on a state nor on random numbers.
        learned: Whether it depends on parameters.
    """

    operation: str
    value: Tensor
    name: str = ""
    arguments: tuple[Expression, ...] = ()
    quantity: str = ""
    index: Index | None = None
    product: Product | None = None
    call: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()

    static: bool = field(init=False)
    learned: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.arguments:
            self.static = all(argument.static for argument in self.arguments)
        else:
            self.static = self.operation in ("parameter", "constant")
        self.learned = self.operation == "parameter" or any(argument.learned for argument in self.arguments)


def rows_of_parameter(product: Product, shape: torch.Size, index: range, transposed: bool) -> Product:
    """Find out which rows of a parameter the weights are.

    Args:
        product: The weights, which are some elements of a parameter.
        shape: Shape of the matrix.
        index: The rows of the matrix that are used.
        transposed: Whether the matrix was transposed.
    """
    weight, stored = product.weight, product.weight.index
    if transposed and stored is None:
        return replace(product, parameter=weight.name, rows=(index.start, index.stop), transposed=True)
    if transposed and stored is not None:  # such as a product with the transposed parameter
        stored = as_index(torch.tensor(list(stored)).reshape(shape[::-1]).T.flatten().tolist())
    start = 0 if stored is None else stored[0]
    if isinstance(stored, tuple) or start % shape[1]:
        return product
    first = start // shape[1] + index.start
    return replace(product, parameter=weight.name, rows=(first, first + len(index)))


def as_blocks(parts: list[Expression], value: Tensor) -> Expression | None:
    """Join weighted sums of consecutive rows of a parameter to one, with a block-diagonal matrix."""
    first = parts[0].product
    blocks = [(part.product, part.arguments[0]) for part in parts if part.product is not None]
    if first is None or first.rows is None or len(blocks) < len(parts):
        return None
    source = blocks[0][1].arguments[0] if blocks[0][1].arguments else blocks[0][1]
    matrix = first.matrix.new_zeros(value.numel(), source.value.numel())
    row, end = 0, first.rows[0]
    for product, given in blocks:
        is_next = product.parameter == first.parameter and product.rows and product.rows[0] == end
        if not is_next or not product.rows or product.transposed or product.bias is not None:
            return None
        if given.operation != "take" or given.arguments[0] is not source:
            return None
        if not isinstance(given.index, range):
            return None
        rows = len(product.matrix)
        matrix[row : row + rows, given.index.start : given.index.stop] = product.matrix
        row, end = row + rows, product.rows[1]
    joined = replace(first, matrix=matrix, rows=(first.rows[0], end), blocks=len(parts))
    return Expression("weighted", value, arguments=(source,), product=joined)

"""The expressions of a step: its computation graph with slices pushed down to the weighted sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from unrolled.diagram.indices import ElementMaps, Index, as_index, compose, operand_map, select
from unrolled.diagram.model import DiagramError
from unrolled.diagram.reads import nodes_read_whole
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.provenance import Node

LEAVES = ("input", "state", "draw", "parameter", "constant")
_SAME_VALUES = {"detach", "positive", "to", "type_as", "float", "double", "contiguous", "requires_grad"}
_FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"}


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

    @cached_property
    def static(self) -> bool:
        """Whether it depends neither on the input nor on a state nor on random numbers."""
        if not self.arguments:
            return self.operation in ("parameter", "constant")
        return all(argument.static for argument in self.arguments)

    @cached_property
    def learned(self) -> bool:
        """Whether it depends on parameters."""
        return self.operation == "parameter" or any(argument.learned for argument in self.arguments)


@dataclass
class StepReader:
    """Reads the computation graph of a step as expressions.

    Args:
        part: The trace of the layer.
        step: The time step.
        batch: The row.
        moves: A cache for the computation graphs of several steps.
        maps: A cache of element maps, as well.
    """

    part: LayerTrace
    step: int
    batch: int
    moves: dict[object, object]
    maps: ElementMaps
    _memo: dict[tuple[int, Index], Expression] = field(default_factory=dict)
    _shared: dict[tuple[object, ...], Expression] = field(default_factory=dict)
    _static: dict[int, bool] = field(default_factory=dict)

    def outputs(self) -> dict[str, Expression]:
        """Return the expression of each new state. The quantities of all expressions are set.

        Raises:
            DiagramError: If a tensor was computed in a way that isn't recorded.
        """
        graph = self.graph = self.part.derivations(self.step, self.batch, self.moves)
        self.input = Expression("input", graph.input.flatten(), "x")
        self.before = {
            name: Expression("state", tensor.flatten(), name) for name, tensor in graph.state_before.items()
        }
        self._leaves = {id(tensor): self.before[name] for name, tensor in graph.state_before.items()}
        self._leaves[id(graph.input)] = self.input
        self._parameters = {
            id(value): name for name, value in vars(self.part.cell).items() if isinstance(value, Tensor)
        }
        position = self.part.at(self.step)
        recorded = {
            name: values[position, self.batch].flatten()
            for name, values in self.part.values.items()
            if name in graph.nodes
        }
        self._recorded = {
            id(self._resolve(graph.nodes[name])): values
            for name, values in recorded.items()
            if graph.nodes[name].numbers.numel() == values.numel()
        }
        nodes = [self._resolve(graph.nodes[name]) for name in self.before]
        self._whole = nodes_read_whole(nodes, self._resolve, self._is_static, self.maps)
        outputs = {name: self._read(node) for name, node in zip(self.before, nodes, strict=True)}
        for name in (*outputs, *graph.nodes):
            expression = self._known(graph.nodes[name])
            if expression is not None and not expression.quantity and expression.operation not in LEAVES:
                expression.quantity = name
        return outputs

    def _resolve(self, node: Node) -> Node:
        """Follow a named value to the node that computes it, and skip functions that change no value."""
        while True:
            if node.kind == "value" and node.name in self.graph.nodes:
                computed = self.graph.nodes[node.name]
                if computed is node:
                    return node
                node = computed
            elif node.kind == "call" and self._has_same_values(node):
                node = node.operands[0]
            else:
                return node

    def _has_same_values(self, node: Node) -> bool:
        operand = node.operands[0]
        if operand.kind == "constant" or operand.numbers.shape != node.numbers.shape:
            return False
        before, after = operand.numbers, node.numbers
        if node.name.endswith("dropout"):  # without effect in evaluation mode
            return bool(((before == after) | (before.isnan() & after.isnan())).all())
        if node.name not in _SAME_VALUES or before.dtype == after.dtype:
            return node.name in _SAME_VALUES
        both_float = before.dtype.is_floating_point and after.dtype.is_floating_point
        return both_float and torch.finfo(before.dtype).bits < torch.finfo(after.dtype).bits

    def _is_draw(self, node: Node) -> bool:
        """Return whether a node is recorded random numbers: they share the memory of those of all steps."""
        if self.part.draws is None or node.kind != "value":
            return False
        recorded = self.part.draws.values.untyped_storage()
        return node.numbers.untyped_storage().data_ptr() == recorded.data_ptr()

    def _is_static(self, node: Node) -> bool:
        node = self._resolve(node)
        if id(node) not in self._static:
            is_leaf = node.kind == "value"
            self._static[id(node)] = (
                node.kind == "constant"
                or (is_leaf and id(node.tensor) in self._parameters)
                or node.name in _FACTORIES
                or (not is_leaf and all(self._is_static(operand) for operand in node.operands))
            )
        return self._static[id(node)]

    def _known(self, node: Node) -> Expression | None:
        """Return the expression of a node if it is part of the step's result."""
        node, index = self._resolve(node), None
        while node.kind == "moved":
            runs = self.maps.pieces(node, range(node.numbers.numel()) if index is None else index)
            if len(runs) != 1:
                break
            node, index = self._resolve(node.operands[runs[0][0]]), runs[0][1]
        if node.kind == "constant":
            return None
        return self._memo.get((id(node), range(node.numbers.numel()) if index is None else index))

    def _read(self, node: Node, index: Index | None = None) -> Expression:
        """Return the expression of some elements of a node; ``index=None`` for all."""
        node = self._resolve(node)
        if node.kind == "constant":
            return self._constant(node)
        everything = range(node.numbers.numel())
        index = everything if index is None else index
        is_whole = id(node) in self._whole or node.kind == "rows"
        if index != everything and is_whole and not self._is_draw(node):
            return self._take(self._read(node), index)
        key = (id(node), index)
        if key not in self._memo:
            self._memo[key] = self._create(node, index)
        return self._memo[key]

    def _constant(self, node: Node) -> Expression:
        key = ("constant", repr(node.constant))
        if key not in self._shared:
            is_number = isinstance(node.constant, (int, float))  # or a word, such as a rounding mode
            value = torch.tensor([float(node.constant)] if is_number else [], dtype=torch.float64)
            self._shared[key] = Expression("constant", value, node.name)
        return self._shared[key]

    def _take(self, expression: Expression, index: Index) -> Expression:
        key = ("take", id(expression), index)
        if key not in self._shared:
            value = select(expression.value, index)
            if expression.static:
                taken = replace(expression, value=value)
            else:
                taken = Expression("take", value, arguments=(expression,), index=index)
            self._shared[key] = taken
        return self._shared[key]

    def _create(self, node: Node, index: Index) -> Expression:
        if node.kind == "moved":
            return self._moved(node, index)
        value = select(self._flat(node), index)
        if node.kind == "value":
            return self._leaf(node, index, value)
        if node.name in _FACTORIES or (node.kind == "rows" and not node.operands):
            return Expression("constant", value, node.name)
        if node.kind == "rows":
            return self._call(node, value)
        if node.kind == "sum":
            return self._weighted(node, index, value)
        operation = {"negated": "neg", "infix": node.name}.get(node.kind, "call")
        if node.kind == "call" and not node.call:
            raise self._error(f"{node.name} returns several tensors or takes a list of them")
        arguments = tuple(
            self._operand(node, number, index)
            for number, operand in enumerate(node.operands)
            if node.kind != "call" or self._resolve(operand).kind != "constant"  # those are in node.call
        )
        key = (operation, node.name, node.call, *map(id, arguments))
        if key not in self._shared:
            self._shared[key] = Expression(operation, value, node.name, arguments, call=node.call)
        return self._shared[key]

    def _flat(self, node: Node) -> Tensor:
        """Return the values as they were recorded, else as they were computed again."""
        recorded = self._recorded.get(id(node))
        return node.numbers.flatten() if recorded is None else recorded

    def _leaf(self, node: Node, index: Index, value: Tensor) -> Expression:
        if id(node.tensor) in self._leaves:
            return self._leaves[id(node.tensor)]
        if id(node.tensor) in self._parameters:
            part = None if index == range(node.numbers.numel()) else index
            return Expression("parameter", value, self._parameters[id(node.tensor)], index=part)
        if self._is_draw(node):
            return Expression("draw", value, index=index)
        what = node.name or "a tensor"
        raise self._error(f"{what} was changed in place or computed in a way that isn't recorded")

    def _error(self, reason: str) -> DiagramError:
        return DiagramError(f"{type(self.part.cell).__name__} has no diagram, because {reason}.")

    def _operand(self, node: Node, number: int, index: Index) -> Expression:
        """Return the expression of what an elementwise function reads of an operand."""
        operand = node.operands[number]
        if self._resolve(operand).kind == "constant":
            return self._read(operand)
        element_map = operand_map(node, number)
        if element_map is None:
            return self._read(operand, index)
        whole = self._read(operand)
        return whole if whole.value.numel() == 1 else self._take(whole, compose(element_map, index))

    def _call(self, node: Node, value: Tensor) -> Expression:
        if not node.call:
            raise self._error(f"{node.name} returns several tensors or takes a list of them")
        arguments = tuple(self._read(operand) for operand in node.operands)
        shapes = tuple(tuple(operand.numbers.shape) for operand in node.operands)
        return Expression("call", value, node.name or "matmul", arguments, call=node.call, shapes=shapes)

    def _moved(self, node: Node, index: Index) -> Expression:
        runs = self.maps.pieces(node, index)
        if len(runs) == 1:
            return self._read(node.operands[runs[0][0]], runs[0][1])
        operands = [operand for operand, _ in runs]
        if len({*operands}) < len(operands):  # interleaved: join the elements of each operand, and reorder
            by_operand = {k: [i for o, part in runs if o == k for i in part] for k in sorted({*operands})}
            parts = [self._read(node.operands[k], as_index(part)) for k, part in by_operand.items()]
            joined = _joined(parts)
            starts = dict(zip(by_operand, _starts(parts), strict=True))
            order: list[int] = []
            for operand, part in runs:
                order += range(starts[operand], starts[operand] + len(part))
                starts[operand] += len(part)
            return self._take(joined, as_index(order))
        parts = [self._read(node.operands[operand], part) for operand, part in runs]
        return _as_blocks(parts) or _joined(parts)

    def _weighted(self, node: Node, index: Index, value: Tensor) -> Expression:
        """Return weighted sums; a function of two tensors if the weights depend on the input."""
        given, weight = node.operands[:2]
        bias = self._read(node.operands[2]) if len(node.operands) > 2 else None
        transposed = node.weight_transposed
        if not self._is_static(weight) and self._is_static(given) and bias is None:
            given, weight, transposed = weight, given, False  # a matrix times a column
        of_weight, source = self._read(weight), self._read(given)
        matrix = of_weight.value.reshape(weight.numbers.shape)
        matrix = matrix.T if transposed else matrix
        is_linear = of_weight.static and source.value.numel() == matrix.shape[1]
        if not is_linear or not isinstance(index, range):
            return self._take(self._call(node, self._flat(node)), index)
        if bias is not None and not bias.static:
            raise self._error("a bias depends on the input")
        product = Product(matrix[index.start : index.stop], of_weight)
        if of_weight.operation == "parameter":
            product = _rows_of_parameter(product, matrix.shape, index, transposed)
            size = getattr(self.part.cell, of_weight.name).numel()
            product = replace(product, parameter_rows=size // matrix.shape[1])
        if bias is not None:
            product = replace(product, bias=bias, bias_rows=index)
        return Expression("weighted", value, arguments=(source,), product=product)


def _joined(parts: list[Expression]) -> Expression:
    return Expression("join", torch.cat([part.value for part in parts]), arguments=tuple(parts))


def _starts(parts: list[Expression]) -> Iterator[int]:
    start = 0
    for part in parts:
        yield start
        start += part.value.numel()


def _rows_of_parameter(product: Product, shape: torch.Size, index: range, transposed: bool) -> Product:
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


def _as_blocks(parts: list[Expression]) -> Expression | None:
    """Join weighted sums of consecutive rows of a parameter to one, with a block-diagonal matrix."""
    value = torch.cat([part.value for part in parts])
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

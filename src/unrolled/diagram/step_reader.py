"""Reads the computation graph of a step as expressions, with slices pushed down to the weighted sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unrolled.diagram.expressions import LEAVES, Expression, Product, as_blocks, rows_of_parameter
from unrolled.diagram.indices import ElementMaps, Index, as_index, compose, operand_map, select
from unrolled.diagram.model import DiagramError
from unrolled.diagram.origins import Origin, Origins
from unrolled.diagram.reads import nodes_read_whole
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.provenance import Node
from unrolled.tracing.step_recorder import StepRun

_SAME_VALUES = {"detach", "positive", "to", "type_as", "float", "double", "contiguous", "requires_grad"}
_FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"}


@dataclass
class StepReader:
    """Reads the computation graph of a step as expressions.

    Args:
        part: The trace of the layer.
        step: The time step.
        batch: The row.
        moves: A cache for the computation graphs of several steps.
        maps: A cache of element maps, as well.
        run: The step, if it has run again already.
    """

    part: LayerTrace
    step: int
    batch: int
    moves: dict[object, object]
    maps: ElementMaps
    run: StepRun | None = None
    _memo: dict[tuple[int, Index], Expression] = field(default_factory=dict)
    _shared: dict[tuple[object, ...], Expression] = field(default_factory=dict)
    _static: dict[int, bool] = field(default_factory=dict)

    def outputs(self) -> dict[str, Expression]:
        """Return the expression of each new state. The quantities of all expressions are set.

        Raises:
            DiagramError: If a tensor was computed in a way that isn't recorded.
        """
        self._origins = Origins(active=self.run is not None)
        run = self.part.run_step(self.step, self.batch, self.moves) if self.run is None else self.run
        graph = self.graph = self.part.graph_of(run, self.step, self.batch)
        self.input = Expression("input", self._origins.whole(graph.input), "x")
        self.before = {
            name: Expression("state", self._origins.whole(tensor), name)
            for name, tensor in graph.state_before.items()
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

    def origin(self, value: Tensor) -> Origin | None:
        """Return the elements of the step's tensors that a value of an expression consists of, if it does."""
        return self._origins.find(value)

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
            value = self._origins.selected(expression.value, index)
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
        self._origins.add(value, node.numbers, index)
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
        """Return the elements of an operand that an elementwise function reads, as an expression."""
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
            joined = self._joined(parts)
            starts = dict(zip(by_operand, _starts(parts), strict=True))
            order: list[int] = []
            for operand, part in runs:
                order += range(starts[operand], starts[operand] + len(part))
                starts[operand] += len(part)
            return self._take(joined, as_index(order))
        parts = [self._read(node.operands[operand], part) for operand, part in runs]
        return self._blocks(parts) or self._joined(parts)

    def _joined(self, parts: list[Expression]) -> Expression:
        return Expression(
            "join", self._origins.joined([part.value for part in parts]), arguments=tuple(parts)
        )

    def _blocks(self, parts: list[Expression]) -> Expression | None:
        return as_blocks(parts, self._origins.joined([part.value for part in parts]))

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
            product = rows_of_parameter(product, matrix.shape, index, transposed)
            size = getattr(self.part.cell, of_weight.name).numel()
            product = replace(product, parameter_rows=size // matrix.shape[1])
        if bias is not None:
            product = replace(product, bias=bias, bias_rows=index)
        return Expression("weighted", value, arguments=(source,), product=product)


def _starts(parts: list[Expression]) -> Iterator[int]:
    start = 0
    for part in parts:
        yield start
        start += part.value.numel()

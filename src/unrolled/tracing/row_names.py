"""Names for the rows of weighted sums and parameters: the gate that each row computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.layers.convert import drop_in_layer
from unrolled.tracing.call_recorder import CallRecorder
from unrolled.tracing.provenance import Node, computation_graph
from unrolled.tracing.random_state import cuda_devices
from unrolled.tracing.step_recorder import run_with_locals

_NORMALIZATIONS = {"layer_norm", "rms_norm", "normalize"}  # element k of the result is row k, rescaled
_VECTOR_ACTIVATIONS = {"softmax", "softmin", "log_softmax"}  # element k of the result is mostly that of row k
_TORCH_LETTERS = {"weight": "W", "bias": "b"}  # as in the documentation of torch.nn.LSTM

# How a number reaches a quantity:
#   moved       unchanged
#   linear      by additions, constant factors and normalizations only
#   activation  through a function of one tensor, such as sigmoid, that is applied before any product
#   gated       through a product and then a function of one tensor
#   product     through a product only
_Path = Literal["moved", "linear", "activation", "gated", "product"]


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a weighted sum or parameter that compute one gate.

    Attributes:
        gate: Name of the quantity that the rows compute. Empty if they don't belong to a single one.
        rows: The rows.
        first_unit: The element of the gate that the first row computes. The others follow in order.
    """

    gate: str
    rows: range
    first_unit: int

    def unit(self, row: int) -> int:
        """Return the element of the gate that a row computes."""
        return self.first_unit + row - self.rows.start


@dataclass(frozen=True)
class RowNames:
    """The gates that the rows of each quantity and parameter of a cell compute.

    Attributes:
        blocks: The blocks of rows of each quantity and parameter, by name.
        by_column: The weights whose blocks are columns, because they are multiplied from the right, as in
            ``x @ weight``.
        hidden: The hidden size of the cell.
        torch_names: Whether torch.nn has this layer, so that its parameters have symbols in torch's
            documentation.
    """

    blocks: Mapping[str, tuple[RowBlock, ...]]
    by_column: frozenset[str]
    hidden: int
    torch_names: bool

    def is_split(self, name: str) -> bool:
        """Whether the rows of a quantity or parameter compute more than one gate."""
        return len(self.blocks.get(name, ())) > 1

    def block(self, name: str, row: int) -> RowBlock:
        """Return the block that a row of a quantity or parameter is in."""
        blocks = self.blocks.get(name, ())
        return next((block for block in blocks if row in block.rows), RowBlock("", range(row, row + 1), row))

    def label(self, name: str, row: int) -> str:
        """Return the label of a row.

        It is ``f[1]`` if the rows compute several gates. Otherwise it is ``unit 1``, or ``row 7`` if the
        row doesn't belong to a unit, because there are more rows than units.
        """
        block = self.block(name, row)
        if self.is_split(name) and block.gate:
            return f"{block.gate}[{block.unit(row)}]"
        is_unit = not self.is_split(name) and block.rows.stop <= max(self.hidden, row + 1)
        return f"unit {row}" if is_unit else f"row {row}"

    def part(self, parameter: str, block: RowBlock) -> str:
        """Name the rows of a parameter in a block.

        Returns:
            ``weight_hh[f]`` for the rows of a gate, ``weight_hh[6:9]`` for other rows, and ``weight_hh`` if
            the rows don't compute several gates.
        """
        if not self.is_split(parameter):
            return parameter
        return f"{parameter}[{block.gate or f'{block.rows.start}:{block.rows.stop}'}]"

    def symbol(self, parameter: str, block: RowBlock) -> str:
        """Return the symbol of the rows of a parameter in a block, as in the documentation of torch.nn.

        Returns:
            ``W_hf``, ``b_if``, or ``W_ih`` if the rows don't compute several gates. The same as :meth:`part`
            if torch.nn doesn't have this layer.
        """
        kind, _, ends = parameter.partition("_")
        if (
            not self.torch_names
            or kind not in _TORCH_LETTERS
            or (self.is_split(parameter) and not block.gate)
        ):
            return self.part(parameter, block)
        return f"{_TORCH_LETTERS[kind]}_{f'{ends[0]}{block.gate}' if self.is_split(parameter) else ends}"

    def element(self, parameter: str, row: int, column: int | None = None) -> str:
        """Name an element of a parameter.

        Returns:
            ``b_if[1]`` or ``W_hf[1, 0]`` for a layer that torch.nn has, else ``weight_hh[f][1, 0]``.
        """
        block = self.block(parameter, row)
        has_gate = self.is_split(parameter) and block.gate
        name = self.symbol(parameter, block) if has_gate or not self.is_split(parameter) else parameter
        position = [block.unit(row) if has_gate else row, *([] if column is None else [column])]
        return f"{name}[{', '.join(map(str, position))}]"


def row_names(cell: Cell) -> RowNames:
    """Find the gate that each row of the weighted sums and parameters of a cell computes.

    The step runs once, on random numbers. A row computes a gate if it reaches only this one through
    elementwise functions: the rows of the input weights of an LSTM compute ``i``, ``f``, ``g`` and ``o``. A
    gate is a quantity behind an activation function. Without one, as for the candidate of minGRU, it is the
    last quantity that the rows reach by additions alone.

    Returns:
        The names. If the step can't run on random numbers, nothing has a gate.
    """
    torch_names = drop_in_layer(type(cell)) is not None
    try:
        nodes = _step_nodes(cell)
    except Exception:  # user code can raise anything
        return RowNames({}, frozenset(), cell.hidden, torch_names)
    parameters = {name: getattr(cell, name) for name in cell.shapes()}
    uses = _Uses(nodes, parameters)
    for name in uses.quantities:
        uses.add(name)
    states = set(cell.state)
    sizes = {name: nodes[name].numbers.numel() for name in uses.quantities}
    sizes |= {name: value.shape[uses.axis(name)] for name, value in parameters.items() if value.dim()}
    gates = {name: uses.gates(name, size, states) for name, size in sizes.items()}
    blocks = {name: tuple(_blocks(parts)) for name, parts in gates.items()}
    split = {name for name, parts in blocks.items() if len(parts) > 1}
    for name, parts in gates.items():  # a quantity that computes several gates isn't a gate itself
        blocks[name] = tuple(_blocks(None if end and end[0] in split else end for end in parts))
    known = {name: parts for name, parts in blocks.items() if parts}
    return RowNames(known, frozenset(uses.by_column), cell.hidden, torch_names)


def _step_nodes(cell: Cell) -> dict[str, Node]:
    """Run a step on random numbers and return the node of each quantity."""
    like = next((getattr(cell, name) for name in cell.shapes()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)

    def random(size: int) -> Tensor:
        return torch.randn(1, size, generator=generator).to(like)

    x, *state = random(cell.input), *map(random, cell.state_sizes().values())
    recorder = CallRecorder()
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(cuda_devices(x)):
        with recorder:
            _, named = run_with_locals(cell, x, *state)
        return computation_graph(recorder, named, {})


class _Uses:
    """Which elements of quantities and parameters each quantity is computed from, and by which path."""

    def __init__(self, nodes: Mapping[str, Node], parameters: Mapping[str, Tensor]) -> None:
        self._nodes = nodes
        self._parameters = {id(value): name for name, value in parameters.items()}
        self._columns = {
            name: value.shape[-1] if value.dim() > 1 else 1 for name, value in parameters.items()
        }
        # by name and element: the elements of quantities that use it
        self._uses: dict[tuple[str, int], list[tuple[str, int, _Path]]] = {}
        self._constant: dict[int, bool] = {}
        self.quantities = [name for name, node in nodes.items() if not self._is_constant(node)]
        self.by_column: set[str] = set()  # weights whose columns are the rows of the weighted sums

    def axis(self, parameter: str) -> int:
        """Return the axis of a parameter whose elements have names."""
        return 1 if parameter in self.by_column else 0

    def _is_constant(self, node: Node) -> bool:
        """Whether a node is computed from parameters and constants only."""
        if id(node) not in self._constant:
            if node.kind == "value":
                named = self._nodes.get(node.name)
                is_cut = named is not None and named.tensor is node.tensor and named is not node
                self._constant[id(node)] = (
                    self._is_constant(named) if is_cut and named else id(node.tensor) in self._parameters
                )
            else:
                self._constant[id(node)] = all(map(self._is_constant, node.operands))
        return self._constant[id(node)]

    def add(self, name: str) -> None:
        """Record what the elements of a quantity are computed from."""
        elements = torch.arange(self._nodes[name].numbers.numel())
        self._walk(self._nodes[name], elements, (name, elements), "moved")

    def _walk(self, node: Node, index: Tensor, target: tuple[str, Tensor], path: _Path) -> None:
        """Follow elements of a node to the named elements that they are computed from.

        Args:
            node: The node.
            index: Flat indices in it.
            target: The quantity, and the element of it that is computed from each of these.
            path: The path from the node to the quantity.
        """
        match node.kind:
            case "value":
                self._record(node, index, target, path)
            case "moved" if node.source_operands is not None:
                sources = node.source_operands.cpu()[index]
                for k, (operand, element_map) in enumerate(
                    zip(node.operands, node.element_maps, strict=True)
                ):
                    mine = sources == k
                    if element_map is not None and mine.any():
                        self._walk(
                            operand, element_map.cpu()[index[mine]], (target[0], target[1][mine]), path
                        )
            case "sum":
                size = node.numbers.shape[-1]
                unit, weight = index % size, node.operands[1]
                path = _summed(path)
                # The first column stands for the whole row.
                first = unit if node.weight_transposed else unit * weight.numbers.shape[-1]
                self._walk(weight, first, target, path)
                for bias in node.operands[2:]:
                    self._walk(bias, unit, target, path)
            case "rows" if node.name in _NORMALIZATIONS | _VECTOR_ACTIVATIONS:
                path = "activation" if node.name in _VECTOR_ACTIVATIONS else _summed(path)
                for operand in node.operands:
                    if operand.numbers.numel() == node.numbers.numel():
                        self._walk(operand, index, target, path)
            case "infix" | "negated" | "call":
                self._walk_elementwise(node, index, target, path)

    def _walk_elementwise(self, node: Node, index: Tensor, target: tuple[str, Tensor], path: _Path) -> None:
        tensors = [k for k, operand in enumerate(node.operands) if operand.tensor is not None]
        if node.kind == "infix" and node.name == "div" and 0 in tensors:
            tensors, path = [0], _summed(path)  # a divisor only rescales
        elif node.kind == "call" and len(tensors) == 1:
            path = "activation"
        elif node.kind == "call" or (node.name == "mul" and len(tensors) > 1):
            path = "gated" if path in ("activation", "gated") else "product"
        else:
            path = _summed(path)
        for k in tensors:
            element_map = node.element_maps[k]
            self._walk(node.operands[k], index if element_map is None else element_map[index], target, path)

    def _record(self, node: Node, index: Tensor, target: tuple[str, Tensor], path: _Path) -> None:
        if node.name in self.quantities and node.name != target[0]:
            source = node.name
        elif node.name in self._nodes and node.name not in self.quantities:
            self._walk(self._nodes[node.name], index, target, path)
            return
        elif id(node.tensor) in self._parameters:
            source = self._parameters[id(node.tensor)]
            columns = self._columns[source]
            if columns > 1 and len(index) > 1 and bool((index < columns).all()):
                self.by_column.add(source)
            elif columns > 1:
                index = index // columns
        else:
            return
        for element, result in zip(index.tolist(), target[1].tolist(), strict=True):
            self._uses.setdefault((source, element), []).append((target[0], result, path))

    def gates(self, name: str, size: int, states: set[str]) -> list[tuple[str, int] | None]:
        """Return the gate and its element that each row computes; None if it isn't a single one."""
        if not any((name, row) in self._uses for row in range(size)):
            return []
        found = [self._gate(name, row, states) for row in range(size)]
        counts: dict[tuple[str, int] | None, int] = {}
        for gate in found:
            counts[gate] = counts.get(gate, 0) + 1
        return [
            gate if counts[gate] == 1 else self._linear_end(name, row, states)
            for row, gate in enumerate(found)
        ]

    def _gate(self, name: str, row: int, states: set[str]) -> tuple[str, int] | None:
        reached = self._reached(name, row, states)
        for is_state, path in itertools.product((False, True), ("activation", "gated")):
            ends = {end for end, paths in reached.items() if path in paths and (end[0] in states) == is_state}
            if ends:
                return self._final_name(next(iter(ends)), states) if len(ends) == 1 else None
        return self._linear_end(name, row, states)

    def _reached(self, name: str, row: int, states: set[str]) -> dict[tuple[str, int], set[_Path]]:
        """Return the elements that a row reaches, up to the first activation function or state."""
        reached: dict[tuple[str, int], set[_Path]] = {}
        waiting: list[tuple[str, int, _Path]] = [(name, row, "moved")]
        while waiting:
            source, element, before = waiting.pop()
            for target, index, path in self._uses.get((source, element), ()):
                if before == "product":
                    path = "gated" if path in ("activation", "gated") else "product"
                known = reached.setdefault((target, index), set())
                if path not in known:
                    known.add(path)
                    if target not in states and path in ("moved", "linear", "product"):
                        waiting.append((target, index, path))
        return reached

    def _linear_end(self, name: str, row: int, states: set[str]) -> tuple[str, int] | None:
        """Return the last element that a row reaches by additions alone, if it isn't part of a state."""
        current, last = (name, row), None
        while True:
            uses = self._uses.get(current, ())
            ends = {use[:2] for use in uses if use[2] in ("moved", "linear") and use[0] not in states}
            if len(ends) != 1:
                return last
            current = last = ends.pop()

    def _final_name(self, gate: tuple[str, int], states: set[str]) -> tuple[str, int]:
        """Follow a gate to a quantity that is part of it, or another activation function of it alone."""
        uses = [use for use in self._uses.get(gate, ()) if use[0] not in states]
        parts = {use[:2] for use in uses if use[2] == "moved"}
        if len(parts) == 1:
            return parts.pop()
        if len({use[:2] for use in uses}) == 1 and uses[0][2] == "activation":
            end = uses[0][:2]
            sources = {
                source[0] for source, targets in self._uses.items() if end in {use[:2] for use in targets}
            }
            if sources - states == {gate[0]}:
                return end
        return gate


def _summed(path: _Path) -> _Path:
    return "linear" if path == "moved" else path


def _blocks(gates: Iterable[tuple[str, int] | None]) -> list[RowBlock]:
    """Join consecutive rows of the same gate. Rows without a gate are one block."""
    blocks: list[RowBlock] = []
    for row, end in enumerate(gates):
        gate, unit = ("", row) if end is None else end
        last = blocks[-1] if blocks else None
        follows = last and last.gate == gate and unit == last.first_unit + row - last.rows.start
        if last and follows:
            blocks[-1] = RowBlock(gate, range(last.rows.start, row + 1), last.first_unit)
        else:
            blocks.append(RowBlock(gate, range(row, row + 1), unit))
    return blocks

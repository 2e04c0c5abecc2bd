"""What is computed around a loop: products and sums of all time steps at once, and what parameters make."""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines.compiler.batch_layout import ShiftedState, whole
from unrolled.engines.compiler.ir import BATCH_SYMBOL, is_number, is_sum_of_rows, per_row
from unrolled.engines.compiler.views import Place, places
from unrolled.engines.native.matmul import products

aten = torch.ops.aten

Values = dict[fx.Node, Any]

_SUM = 2  # in the place that tells a product whether to add to what is there


@dataclass
class _Pending:
    """Work that waits to be handed over together, and the tensors that it points into."""

    numbers: list[int] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)


_Step = Callable[[Values, int, _Pending], None]


class BulkOps:
    """Nodes of a graph, to compute for any number of rows at once.

    A node that reduces over the batch so reduces over all time steps as well. Products and sums of
    columns are handed to the compiled library together; what else there is, torch computes.

    Args:
        nodes: in order.
        results: those of them, or of their inputs, that are wanted as tensors.
        known: nodes whose values are given as they are, though they may be views of others.
        dtype: of all of them.
    """

    def __init__(
        self,
        nodes: list[fx.Node],
        results: Collection[fx.Node],
        known: Collection[fx.Node],
        dtype: torch.dtype,
    ) -> None:
        self._dtype = dtype
        self._places = places([*nodes, *results], known)
        bases = dict.fromkeys(place.base for place in self._places.values())
        numbers = [base for base in bases if is_number(base) and base not in known and base not in nodes]
        self._results = [node for node in results if self._places[node].base is not node]
        self._steps: list[_Step] = []
        self._within: dict[fx.Node, tuple[fx.Node, int]] = {}  # parts of a whole, and where in it they are
        nodes = [*numbers, *nodes]  # whatever loop those were written for
        for node in nodes:
            self._within |= _parts_of(node)
        wholes = {node for node, _ in self._within.values()}
        for node in nodes:
            if node in wholes:
                continue
            if self._places.get(node, Place(node, 0, (), ())).base is not node:
                continue
            if node.target is aten.mm.default:
                self._steps.append(self._product(node))
            elif is_sum_of_rows(node):
                self._steps.append(self._sum(node))
            else:
                self._steps.append(self._by_torch(node))
        alone = [n for n in nodes if self._places.get(n, Place(n, 0, (), ())).base is n]
        self.makes = {*wholes, *self._results, *(n for n in alone if n not in self._within)}

    def __call__(self, values: Values, rows: int) -> None:
        """Compute the nodes; ``values`` has their inputs and gets them and the results."""
        if not self._steps and not self._results:
            return
        pending = _Pending()
        for step in self._steps:
            step(values, rows, pending)
        self._run(pending)
        for node in self._results:
            place = self._places[node]
            values[node] = place.of(whole(values[place.base]), rows)

    def _run(self, pending: _Pending) -> None:
        if pending.numbers:
            products(self._dtype).at_once(array.array("q", pending.numbers))
            pending.numbers.clear()
            pending.alive.clear()

    def _product(self, node: fx.Node) -> _Step:
        left, right = (self._places[operand] for operand in node.all_input_nodes[:2])
        if len(node.all_input_nodes) == 1:
            right = left
        shape = tuple(node.meta["val"].shape)
        inner = left.shape[1]
        item = self._dtype.itemsize

        def step(values: Values, rows: int, pending: _Pending) -> None:
            deep = rows if inner == BATCH_SYMBOL else inner
            high, wide = (rows if size == BATCH_SYMBOL else size for size in shape)
            a, b = values[left.base], values[right.base]
            out = self._room(node, values, a.state if isinstance(a, ShiftedState) else a, high, wide)
            parts = [(a, b, 0, 0, deep)]
            if inner == BATCH_SYMBOL:
                parts = _parts(a, b, rows)
            for k, (one, other, at, there, many) in enumerate(parts):
                pending.alive += (one, other)
                pending.numbers += (
                    *(out, k > 0),
                    one.data_ptr() + (left.offset + at * left.strides[1]) * item,
                    *left.strides,
                    other.data_ptr() + (right.offset + there * right.strides[0]) * item,
                    *(*right.strides, high, wide, many),
                )

        return step

    def _sum(self, node: fx.Node) -> _Step:
        source = self._places[node.all_input_nodes[0]]
        if len(source.shape) != 2 or source.shape[0] != BATCH_SYMBOL or source.strides[1] != 1:
            return self._by_torch(node)
        width, offset = source.shape[1], source.offset * self._dtype.itemsize

        def step(values: Values, rows: int, pending: _Pending) -> None:
            given = whole(values[source.base])
            out = self._room(node, values, given, width)
            pending.alive.append(given)
            start = given.data_ptr() + offset
            pending.numbers += (*(out, _SUM), *(0, 0, 0), *(start, source.strides[0], 0), *(rows, width, 0))

        return step

    def _room(self, node: fx.Node, values: Values, like: Tensor, *shape: int) -> int:
        """The address of where a node goes: a tensor of its own, or its place in a whole."""
        whole, at = self._within.get(node, (node, 0))
        if whole is node:
            values[node] = like.new_empty(shape)
        elif whole not in values:
            values[whole] = like.new_empty(whole.meta["val"].shape)
        return int(values[whole].data_ptr()) + at * self._dtype.itemsize

    def _by_torch(self, node: fx.Node) -> _Step:
        function, args, kwargs = node.target, self._argument(node.args), self._argument(node.kwargs)
        assert callable(function)

        def step(values: Values, rows: int, pending: _Pending) -> None:
            self._run(pending)
            made = function(*args(values, rows), **kwargs(values, rows))
            values[node] = made.contiguous() if isinstance(made, Tensor) else made

        return step

    def _argument(self, given: Any) -> Callable[[Values, int], Any]:
        """What an argument is, once the values of nodes and the number of rows are known."""
        if isinstance(given, fx.Node):
            place = self._places.get(given)
            if place is None:
                return lambda values, rows: values[given]
            if given.meta["val"].dtype is torch.bool:  # the loop keeps 0 and 1
                return lambda values, rows: place.of(whole(values[place.base]), rows).bool()
            return lambda values, rows: place.of(whole(values[place.base]), rows)
        if isinstance(given, (list, tuple)):
            parts = [self._argument(part) for part in given]
            return lambda values, rows: [part(values, rows) for part in parts]
        if isinstance(given, dict):
            named = {name: self._argument(part) for name, part in given.items()}
            return lambda values, rows: {name: part(values, rows) for name, part in named.items()}
        if type(given) is int and given == BATCH_SYMBOL:
            return lambda values, rows: rows
        return lambda values, rows: given


def _parts_of(node: fx.Node) -> dict[fx.Node, tuple[fx.Node, int]]:
    """Products and sums that come one below the other in a node alone, which holds them and where from."""
    parts = node.all_input_nodes
    if node.target is not aten.cat.default or len(node.args) > 1 or per_row(node):
        return {}
    if not all(
        (part.target is aten.mm.default or is_sum_of_rows(part)) and len(part.users) == 1 for part in parts
    ):
        return {}
    ends = list(itertools.accumulate(part.meta["val"].numel() for part in parts))
    return {part: (node, at) for part, at in zip(parts, [0, *ends], strict=False)}


def _parts(a: Any, b: Any, rows: int) -> list[tuple[Tensor, Tensor, int, int, int]]:
    """A sum over all rows in parts that lie regularly: tensors, their first rows, and how many.

    A state before each step is a state after each step, moved by one, and the initial one.
    """
    if not isinstance(a, ShiftedState) and not isinstance(b, ShiftedState):
        return [(a, b, 0, 0, rows)]
    if isinstance(a, ShiftedState) and isinstance(b, ShiftedState):
        return [(a.whole(), b.whole(), 0, 0, rows)]
    moved: ShiftedState = a if isinstance(a, ShiftedState) else b
    parts = []
    for tensor, at, there, many in moved.parts(rows):
        parts.append((tensor, b, there, at, many) if moved is a else (a, tensor, at, there, many))
    return parts or [(moved.state, moved.state, 0, 0, 0)]

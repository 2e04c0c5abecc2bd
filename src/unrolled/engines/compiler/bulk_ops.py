"""Operations around a loop, computed for all time steps at once, or from parameters only."""

from __future__ import annotations

import array
import functools
import itertools
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines.compiler.batch_layout import ShiftedState, materialize
from unrolled.engines.compiler.ir import BATCH_SYMBOL, is_batch_sum, is_batched, is_number
from unrolled.engines.compiler.views import TensorView, resolve_views

aten = torch.ops.aten

Values = dict[fx.Node, Any]

HALF_DTYPES = (torch.bfloat16, torch.float16)
_MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
_COLUMN_SUMS = 2  # marks sums of columns, in the number that is 0 or 1 for products (products.cpp)


@dataclass
class _PendingOps:
    """Operations for the backend that have not run yet, and the tensors that they read."""

    numbers: list[int] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)


_Step = Callable[[Values, int, _PendingOps], None]


class BulkOps:
    """Graph nodes, computed for all rows of all time steps at once.

    A node that reduces over the batch thus reduces over all time steps, too. Successive matrix products and
    sums of columns go to a backend in one call. torch computes the other nodes.

    Args:
        nodes: The nodes, in graph order.
        results: Nodes, or inputs of nodes, whose values are needed as tensors even if they are views.
        opaque: Nodes to treat as given tensors, even if they are views of others.
        dtype: Dtype of values of the batch, in which bools are 0 and 1. Values of parameters have their own,
            or float32 if parameters have a half-precision type.
        runner: Runs matrix products and sums of columns, given eleven numbers for each: the address of the
            result, the kind, the addresses and strides of both operands, and the height, width and depth.
            None: torch computes them.
        device: Device of all tensors.

    Attributes:
        inputs: Nodes whose values a call reads, or that are results and not computed here.
        outputs: Nodes whose values a call adds.
    """

    def __init__(
        self,
        nodes: list[fx.Node],
        results: Collection[fx.Node],
        opaque: Collection[fx.Node],
        dtype: torch.dtype,
        runner: Callable[[array.array[int]], None] | None,
        device: torch.device,
    ) -> None:
        self._dtype, self._device = dtype, device
        self._runner = runner
        self._views = resolve_views([*nodes, *results], opaque)
        bases = dict.fromkeys(view.base for view in self._views.values())
        numbers = [base for base in bases if is_number(base) and base not in opaque and base not in nodes]
        self._results = [node for node in results if self._views[node].base is not node]
        self._steps: list[_Step] = []
        self._concatenated: dict[fx.Node, tuple[fx.Node, int]] = {}  # the concatenation, and the offset in it
        nodes = [*numbers, *nodes]  # constants may be in the graph before any of these nodes
        for node in nodes:
            self._concatenated |= self._concatenated_parts(node)
        concatenations = {node for node, _ in self._concatenated.values()}
        for node in nodes:
            if node in concatenations:
                continue
            if self._views.get(node, TensorView(node, 0, (), ())).base is not node:
                continue
            if self._is_product(node):
                self._steps.append(self._product(node))
            elif self._is_column_sum(node):
                self._steps.append(self._column_sum(node))
            else:
                self._steps.append(self._torch_op(node))
        bases_of_nodes = [n for n in nodes if self._views.get(n, TensorView(n, 0, (), ())).base is n]
        separate = (n for n in bases_of_nodes if n not in self._concatenated)
        self.outputs = {*concatenations, *self._results, *separate}
        read = {operand for node in bases_of_nodes for operand in node.all_input_nodes}
        read = {self._views[n].base if n in self._views else n for n in (*read, *results)}
        self.inputs = read.difference(nodes)

    def __call__(self, values: Values, rows: int) -> None:
        """Compute the nodes.

        Args:
            values: Values of the nodes' inputs. Their outputs are added.
            rows: Number of rows of all time steps.
        """
        if not self._steps and not self._results:
            return
        pending = _PendingOps()
        for step in self._steps:
            step(values, rows, pending)
        self._run(pending)
        for node in self._results:
            view = self._views[node]
            values[node] = view.apply_to(materialize(values[view.base]), rows)

    def _run(self, pending: _PendingOps) -> None:
        if pending.numbers:
            assert self._runner is not None
            self._runner(array.array("q", pending.numbers))
            pending.numbers.clear()
            pending.alive.clear()

    def _is_product(self, node: fx.Node) -> bool:
        """Return whether the backend computes a node as a matrix product."""
        if self._runner is None:
            return False
        operands = [*node.all_input_nodes, node]
        return node.target is aten.mm.default and all(n.meta["val"].dtype is self._dtype for n in operands)

    def _is_column_sum(self, node: fx.Node) -> bool:
        """Return whether the backend computes a node as a sum over the rows of the batch."""
        if self._runner is None or not is_batch_sum(node) or node.meta["val"].dtype is not self._dtype:
            return False
        view = self._views[node.all_input_nodes[0]]
        return len(view.shape) == 2 and view.shape[0] == BATCH_SYMBOL and view.strides[1] == 1

    def _product(self, node: fx.Node) -> _Step:
        left, right = (self._views[operand] for operand in node.args)  # type: ignore[index]
        shape = tuple(node.meta["val"].shape)
        inner = left.shape[1]
        itemsize = self._dtype.itemsize

        def step(values: Values, rows: int, pending: _PendingOps) -> None:
            depth = rows if inner == BATCH_SYMBOL else inner
            height, width = (rows if size == BATCH_SYMBOL else size for size in shape)
            a, b = values[left.base], values[right.base]
            if inner != BATCH_SYMBOL:
                a, b = materialize(a), materialize(b)
            out = self._allocate(node, values, a.state if isinstance(a, ShiftedState) else a, height, width)
            segments = [(a, b, 0, 0, depth)]
            if inner == BATCH_SYMBOL:
                segments = _segments(a, b, rows)
            for k, (left_tensor, right_tensor, left_start, right_start, length) in enumerate(segments):
                pending.alive += (left_tensor, right_tensor)
                pending.numbers += (
                    *(out, k > 0),
                    left_tensor.data_ptr() + (left.offset + left_start * left.strides[1]) * itemsize,
                    *left.strides,
                    right_tensor.data_ptr() + (right.offset + right_start * right.strides[0]) * itemsize,
                    *(*right.strides, height, width, length),
                )

        return step

    def _column_sum(self, node: fx.Node) -> _Step:
        view = self._views[node.all_input_nodes[0]]
        width, offset = view.shape[1], view.offset * self._dtype.itemsize

        def step(values: Values, rows: int, pending: _PendingOps) -> None:
            base = materialize(values[view.base])
            out = self._allocate(node, values, base, width)
            pending.alive.append(base)
            start = base.data_ptr() + offset
            operands = (*(0, 0, 0), *(start, view.strides[0], 0))
            pending.numbers += (*(out, _COLUMN_SUMS), *operands, *(rows, width, 0))

        return step

    def _allocate(self, node: fx.Node, values: Values, like: Tensor, *shape: int) -> int:
        """Allocate a node's value, or the concatenation that contains it, and return its address."""
        tensor, offset = self._concatenated.get(node, (node, 0))
        if tensor is node:
            values[node] = like.new_empty(shape)
        elif tensor not in values:
            values[tensor] = like.new_empty(tensor.meta["val"].shape)
        return int(values[tensor].data_ptr()) + offset * self._dtype.itemsize

    def _concatenated_parts(self, node: fx.Node) -> dict[fx.Node, tuple[fx.Node, int]]:
        """Return the parts of a concatenation that can be computed in place, with the node and their offsets.

        This is possible if all of them are different products and sums that nothing else reads.
        """
        parts = node.all_input_nodes
        if node.target is not aten.cat.default or len(node.args) > 1 or is_batched(node):
            return {}
        if len(parts) != len(node.args[0]) or not all(  # type: ignore[arg-type]
            (self._is_product(part) or self._is_column_sum(part)) and len(part.users) == 1 for part in parts
        ):
            return {}
        ends = list(itertools.accumulate(part.meta["val"].numel() for part in parts))
        return {part: (node, offset) for part, offset in zip(parts, [0, *ends], strict=False)}

    def _torch_op(self, node: fx.Node) -> _Step:
        own_device = {"device": self._device} if "device" in node.kwargs else {}  # captured on the CPU
        args, kwargs = self._argument(node.args), self._argument({**node.kwargs, **own_device})
        function = node.target
        assert callable(function)
        if function is aten.view.default:
            function = aten.reshape.default  # the operand has other strides than during the capture
        in_loops_dtype, checks = is_batched(node), _error_checks(node)
        operand_dtype = self._operand_dtype(node)

        def step(values: Values, rows: int, pending: _PendingOps) -> None:
            self._run(pending)
            operands = args(values, rows)
            if operand_dtype is not None:
                operands = _converted(operands, operand_dtype)
            result = function(*operands, **kwargs(values, rows))
            for index, check in checks:
                check(result[index])
            if in_loops_dtype:
                values[node] = result.to(self._dtype).contiguous()
            elif isinstance(result, Tensor):
                values[node] = result.resolve_conj().resolve_neg().contiguous()
            else:
                values[node] = result

        return step

    def _operand_dtype(self, node: fx.Node) -> torch.dtype | None:
        """Return the dtype to convert half-precision operands of a node to. None to keep their dtype.

        Values that depend only on parameters are small, so float32 costs little and avoids extra rounding.
        """
        if self._dtype not in HALF_DTYPES:
            return None
        if not any(is_batched(operand) for operand in node.all_input_nodes):
            return torch.float32
        return self._dtype if node.target in _MATRIX_PRODUCTS else None

    def _argument(self, argument: Any) -> Callable[[Values, int], Any]:
        """Return a function that evaluates an argument, given the values of nodes and the number of rows."""
        if isinstance(argument, fx.Node):
            view = self._views.get(argument)
            if view is None:
                return lambda values, rows: values[argument]
            if argument.meta["val"].dtype is torch.bool:  # stored as 0 and 1 in the dtype of the loop
                return lambda values, rows: view.apply_to(materialize(values[view.base]), rows).bool()
            return lambda values, rows: view.apply_to(materialize(values[view.base]), rows)
        if isinstance(argument, (list, tuple)):
            items = [self._argument(item) for item in argument]
            return lambda values, rows: [item(values, rows) for item in items]
        if isinstance(argument, dict):
            named = {name: self._argument(item) for name, item in argument.items()}
            return lambda values, rows: {name: item(values, rows) for name, item in named.items()}
        if type(argument) is int and argument == BATCH_SYMBOL:
            return lambda values, rows: rows
        return lambda values, rows: argument


def _converted(operand: Any, dtype: torch.dtype) -> Any:
    """Convert all float32 and half-precision tensors in an operand to one dtype."""
    if isinstance(operand, (list, tuple)):
        return [_converted(item, dtype) for item in operand]
    if isinstance(operand, Tensor) and operand.dtype in (torch.float32, *HALF_DTYPES):
        return operand.to(dtype)
    return operand


def _error_checks(node: fx.Node) -> list[tuple[Any, Callable[[Tensor], None]]]:
    """Return what checks the results of a node, such as whether a matrix could be inverted.

    No other node reads a check, so it isn't computed as a node of its own.

    Returns:
        The index of a result, and a function that raises an error if the result reports one.
    """
    return [
        (item.args[1], functools.partial(_check_errors, arguments=check.args[1:], options=check.kwargs))
        for item in node.users
        if item.target is operator.getitem
        for check in item.users
        if check.target is aten._linalg_check_errors.default
    ]


def _check_errors(info: Tensor, arguments: Any, options: Any) -> None:
    aten._linalg_check_errors.default(info, *arguments, **options)


def _segments(a: Any, b: Any, rows: int) -> list[tuple[Tensor, Tensor, int, int, int]]:
    """Split a sum over all rows into sums over contiguous rows of two tensors.

    A shifted state consists of two segments: the state after each step, and the initial state.

    Returns:
        For each segment its tensors, the first row of each, and the number of rows.
    """
    if not isinstance(a, ShiftedState) and not isinstance(b, ShiftedState):
        return [(a, b, 0, 0, rows)]
    if isinstance(a, ShiftedState) and isinstance(b, ShiftedState):
        return [(a.materialize(), b.materialize(), 0, 0, rows)]
    shifted: ShiftedState = a if isinstance(a, ShiftedState) else b
    segments = []
    for tensor, row, start, length in shifted.segments(rows):
        segments.append((tensor, b, start, row, length) if shifted is a else (a, tensor, row, start, length))
    return segments

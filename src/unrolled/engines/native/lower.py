"""Write a captured graph in a smaller language: every value of the batch becomes ``(batch, width)``.

A step may view its values with heads, permute, stack, roll or pad them. None of that computes anything: it
says which column stands where. So a value is kept as its *columns*, each a column of a two-dimensional
value that was computed, a constant, or an element of a parameter; torch's own operation, run on these
names, moves them. What computes (functions of an element, reductions over features, products) is then
written anew, run of columns by run of columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from unrolled.engines.native.columns import Columns, Row, small
from unrolled.engines.native.common import join
from unrolled.engines.native.program import ROWS, UnsupportedError
from unrolled.engines.native.rules import RULES

aten = torch.ops.aten


def lower(module: fx.GraphModule, arguments: Sequence[Tensor], moving: Sequence[bool]) -> fx.GraphModule:
    """The graph in terms of values of two axes.

    Args:
        module: a graph of torch's small operations.
        arguments: fake tensors for its placeholders; those of the batch are ``(ROWS, width)``.
        moving: for each argument, whether it changes in the loop: a product with what doesn't is kept apart.

    Raises:
        UnsupportedError: an operation that mixes rows of the batch, or has no such form.
    """

    def run(*values: Tensor) -> Any:
        return _Lowering(module, moving).lower(values)

    lowered = make_fx(run)(*arguments)
    lowered.graph.eliminate_dead_code()
    join(lowered.graph)
    return lowered


class _Lowering(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, moving: Sequence[bool]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False
        self.columns = Columns()
        self.seeds = list(moving)

    def lower(self, values: Sequence[Tensor]) -> Any:
        columns = self.columns
        given = [
            columns.row(value, moving) if ROWS in value.shape else value
            for value, moving in zip(values, self.seeds, strict=True)
        ]
        result = self.run(*given, enable_io_processing=False)
        return tree_map(lambda v: columns.whole(v.columns.flatten()) if isinstance(v, Row) else v, result)

    def run_node(self, node: fx.Node) -> Any:
        self.columns.node = node
        return super().run_node(node)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        values: list[Any] = []
        tree_map(values.append, (args, kwargs))
        value = self.columns.node.meta.get("val")
        if not any(isinstance(v, Row) for v in values):
            if isinstance(value, Tensor) and any(size and size % ROWS == 0 for size in value.shape):
                return self._filled(target, args, value)
            if not any(isinstance(v, FakeTensor) for v in values):
                with _disable_current_modes():
                    return target(*args, **kwargs)
            return target(*args, **kwargs)
        if target in RULES:
            return RULES[target](self.columns, *args, **kwargs)
        if target in _MOVES:
            return self._move(target, args, kwargs, value)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            return self.columns.pointwise(target, *args, **kwargs)
        raise UnsupportedError(f"{target} is not in the compiler's vocabulary")

    def _filled(self, target: Any, args: Any, value: Tensor) -> Row:
        """A constant for every row of the batch."""
        if target in (aten.full.default, aten.full_like.default):
            return self.columns.constant(args[1], tuple(value.shape))
        if target in (aten.zeros.default, aten.empty.memory_format, aten.empty_permuted.default):
            return self.columns.constant(0, tuple(value.shape))
        if target is aten.ones.default:
            return self.columns.constant(1, tuple(value.shape))
        if target in (aten.expand.default, aten.view.default, aten.clone.default):
            return Row(np.broadcast_to(self.columns.names(args[0]), small(value.shape)), tuple(value.shape))
        raise UnsupportedError(f"{target} makes a value for the whole batch")

    def _move(self, target: Any, args: Any, kwargs: Any, value: Any) -> Any:
        """Torch's own operation on the names of the columns."""
        first = next(
            v for v in (args[0] if isinstance(args[0], (list, tuple)) else args) if isinstance(v, Row)
        )
        _check_axis(target, first, args, value)

        def names(argument: Any) -> Any:
            if isinstance(argument, (Row, Tensor)) and not (
                target is aten.index_select.default and argument is args[2]
            ):
                return torch.from_numpy(np.ascontiguousarray(self.columns.names(argument)).copy())
            if isinstance(argument, int) and argument and argument % ROWS == 0:
                return argument // ROWS
            return argument

        with _disable_current_modes():
            if target is aten.constant_pad_nd.default:
                fill = self.columns.names(args[2] if len(args) > 2 else 0)
                moved = target(names(args[0]), args[1], -1)
                moved = torch.where(moved < 0, torch.tensor(int(fill)), moved)
            else:
                moved = target(*tree_map(names, args, is_leaf=lambda v: isinstance(v, Row)), **kwargs)
            if isinstance(moved, (tuple, list)):
                return [Row(part.numpy(), tuple(v.shape)) for part, v in zip(moved, value, strict=True)]
            return Row(moved.numpy(), tuple(value.shape))


def _check_axis(target: Any, row: Row, args: Any, value: Any) -> None:
    """Raise where rows of the batch would be moved."""
    rank, axis = len(row.shape), row.axis
    if target in _AXIS:
        place = _AXIS[target]
        given = args[place] if len(args) > place else 0
        moved = given if isinstance(given, (list, tuple)) else [given]
        free = target is aten.slice.Tensor and args[2:] and args[2] in (0, None) and args[3] >= ROWS
        if (not moved or axis in [m % rank for m in moved]) and not free:
            raise UnsupportedError(f"{target} mixes rows of the batch")
    if target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        new = tuple(value.shape)
        at = next((k for k, size in enumerate(new) if size and size % ROWS == 0), None)
        if at is None or math.prod(new[:at]) != math.prod(row.shape[:axis]):
            raise UnsupportedError(f"{target} mixes rows of the batch")
    if target is aten.constant_pad_nd.default and any(args[1][2 * (rank - 1 - axis) : 2 * (rank - axis)]):
        raise UnsupportedError(f"{target} adds rows to the batch")
    if target is aten.repeat.default and args[1][len(args[1]) - rank + axis] != 1:
        raise UnsupportedError(f"{target} repeats rows of the batch")


_AXIS = {
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.flip.default: 1,
    aten.roll.default: 2,
    aten.index_select.default: 1,
    aten.split_with_sizes.default: 2,
    aten.cat.default: 1,
    aten.unbind.int: 1,
    aten.slice_scatter.default: 2,
    aten.select_scatter.default: 2,
}
_MOVES = {
    *_AXIS,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.repeat.default,
    aten.constant_pad_nd.default,
    aten.diagonal.default,
}

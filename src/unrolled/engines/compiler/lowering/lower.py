"""Write a captured graph in a smaller language: every value of the batch becomes ``(batch, width)``.

A step may view its values with heads, permute, stack, roll or pad them. None of that computes anything: it
says which column stands where. So a value is kept as its *columns*, each a column of a two-dimensional
value that was computed, a constant, or an element of a parameter; torch's own operation, run on these
names, moves them. What computes (functions of an element, reductions over features, products) is then
written anew, run of columns by run of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from unrolled.engines.compiler.cse import join
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.arithmetic import RULES
from unrolled.engines.compiler.lowering.columns import OF_TRUTH, Columns, ColumnView, without_batch
from unrolled.engines.compiler.lowering.movement import MOVES, PLACES, move
from unrolled.engines.compiler.lowering.reductions import REDUCTIONS
from unrolled.engines.compiler.source_location import Marked

aten, prims = torch.ops.aten, torch.ops.prims


def lower(
    module: fx.GraphModule, arguments: Sequence[Tensor], moving: Sequence[bool], dtype: torch.dtype
) -> fx.GraphModule:
    """The graph in terms of values of two axes.

    Args:
        module: a graph of torch's small operations.
        arguments: fake tensors for its placeholders; those of the batch are ``(ROWS, width)``.
        moving: for each argument, whether it changes in the loop: a product with what doesn't is kept apart.
        dtype: what the loop computes in.

    Raises:
        UnsupportedError: an operation that mixes rows of the batch, or has no such form.
    """

    def run(*values: Tensor) -> Any:
        return _Lowering(module, moving, dtype).lower(values)

    lowered = make_fx(run)(*arguments)
    lowered.graph.eliminate_dead_code()
    join(lowered.graph)
    return lowered


class _Lowering(Marked):
    def __init__(self, module: fx.GraphModule, moving: Sequence[bool], dtype: torch.dtype) -> None:
        super().__init__(module)
        self.columns = Columns(dtype)
        self.seeds = list(moving)

    def lower(self, values: Sequence[Tensor]) -> Any:
        columns = self.columns
        given = [
            columns.row(value, moving) if BATCH_SYMBOL in value.shape else value
            for value, moving in zip(values, self.seeds, strict=True)
        ]
        result = self.run(*given, enable_io_processing=False)
        return tree_map(
            lambda v: columns.whole(v.columns.flatten()) if isinstance(v, ColumnView) else v, result
        )

    def run_node(self, n: fx.Node) -> Any:
        self.columns.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        values: list[Any] = []
        tree_map(values.append, (args, kwargs))
        value = self.columns.node.meta.get("val")
        if not any(isinstance(v, ColumnView) for v in values):
            if isinstance(value, Tensor) and any(size and size % BATCH_SYMBOL == 0 for size in value.shape):
                return self._filled(target, args, value)
            if not any(isinstance(v, FakeTensor) for v in values):
                with _disable_current_modes():
                    return target(*args, **kwargs)
            return target(*args, **kwargs)
        dtypes = self._dtypes(target, values)
        if target in _RULES:
            return _RULES[target](self.columns, *args, **kwargs)
        if target in MOVES:
            return move(self.columns, target, args, kwargs)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            if target is aten.add.Tensor and dtypes == {torch.bool}:
                target = aten.logical_or.default
            return self.columns.pointwise(target, *args, **kwargs)
        raise UnsupportedError(f"{target} is not in the compiler's vocabulary")

    def _dtypes(self, target: Any, values: list[Any]) -> set[torch.dtype]:
        """What a value of the batch is kept in: the loop has one type, so whole numbers must be small.

        Raises:
            UnsupportedError: the loop's type can't hold them.
        """
        made = self.columns.node.meta.get("val")
        kinds = made if isinstance(made, (tuple, list)) else [made]
        dtypes = {v.dtype for v in kinds if isinstance(v, Tensor)}
        for dtype in dtypes - {self.columns.dtype, torch.bool, torch.int64}:
            if not self._is_truth_for_a_moment():
                raise UnsupportedError(f"{target} changes to {dtype} in the step")
        whole = torch.int64 in dtypes and torch.Tag.pointwise in getattr(target, "tags", ())
        large = any(isinstance(v, int) and abs(v) > _LARGE for v in values)
        if (whole and (large or target not in _WHOLE_NUMBERS)) or (
            target in OF_TRUTH and dtypes != {torch.bool}
        ):
            raise UnsupportedError(f"{target} computes with whole numbers")
        return dtypes

    def _is_truth_for_a_moment(self) -> bool:
        """Whether a truth value becomes 0 or 1 of another type, which every use makes the loop's own."""
        node, users = self.columns.node, list(self.columns.node.users)
        given = node.args[0]
        return (
            isinstance(given, fx.Node)
            and given.meta["val"].dtype is torch.bool
            and node.target in (aten._to_copy.default, prims.convert_element_type.default)
            and all(getattr(user.meta.get("val"), "dtype", None) is self.columns.dtype for user in users)
        )

    def _filled(self, target: Any, args: Any, value: Tensor) -> ColumnView:
        """A constant, or what parameters alone make, for every row of the batch."""
        shape = tuple(value.shape)
        if target in _CONSTANTS:
            fill = _CONSTANTS[target]
            return self.columns.constant(args[fill[0]] if isinstance(fill, list) else fill, shape)
        if target is aten.repeat.default:
            times = [size // BATCH_SYMBOL if size % BATCH_SYMBOL == 0 else size for size in args[1]]
            return ColumnView(np.tile(self.columns.names(args[0]), times), shape)
        if target in (aten.expand.default, aten.view.default, aten.clone.default):
            return ColumnView(np.broadcast_to(self.columns.names(args[0]), without_batch(shape)), shape)
        raise UnsupportedError(f"{target} makes a value for the whole batch")


_RULES = {**RULES, **REDUCTIONS, **PLACES}
_LARGE = 2**20
_WHOLE_NUMBERS = {
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.abs.default,
    aten.where.self, aten.maximum.default, aten.minimum.default, aten.clone.default, aten.sgn.default,
    aten.remainder.Scalar, aten.div.Tensor_mode,
}  # fmt: skip
_CONSTANTS: dict[Any, float | list[int]] = {  # by what; or the argument that says by what
    aten.full.default: [1],
    aten.full_like.default: [1],
    aten.new_full.default: [2],
    aten.zeros.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.zeros_like.default: 0.0,
    aten.ones.default: 1.0,
    aten.new_ones.default: 1.0,
    aten.ones_like.default: 1.0,
    aten.empty.memory_format: 0.0,
    aten.empty_permuted.default: 0.0,
    aten.empty_strided.default: 0.0,
    aten.new_empty.default: 0.0,
    aten.new_empty_strided.default: 0.0,
    aten.empty_like.default: 0.0,
}

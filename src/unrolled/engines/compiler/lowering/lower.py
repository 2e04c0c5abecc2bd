"""Lower a captured graph to operations on two-dimensional values ``(batch, width)``.

A step may view its values as heads, permute, stack, roll or pad them. None of that computes anything; it only
moves columns. So a value is represented by the ids of its *columns*. Each is a column of a computed
two-dimensional value, a constant, or an element of a parameter. Torch's own operation runs on the ids to
move them. Operations that compute (elementwise functions, reductions over features, products) are rewritten
for each run of consecutive columns.
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

from unrolled.engines.compiler.cse import eliminate_common
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.compiler.lowering.arithmetic import ARITHMETIC_RULES
from unrolled.engines.compiler.lowering.columns import BITWISE_OPS, Columns, ColumnView, without_batch
from unrolled.engines.compiler.lowering.movement import INDEXING_RULES, MOVEMENT_OPS, move
from unrolled.engines.compiler.lowering.reductions import REDUCTION_RULES
from unrolled.engines.compiler.source_location import LocationInterpreter

aten, prims = torch.ops.aten, torch.ops.prims


def lower(
    module: fx.GraphModule, arguments: Sequence[Tensor], recurrent: Sequence[bool], dtype: torch.dtype
) -> fx.GraphModule:
    """Lower a graph of small torch operations to two-dimensional values.

    Args:
        module: The graph.
        arguments: Fake tensors for its placeholders. Values of the batch are ``(BATCH_SYMBOL, width)``.
        recurrent: For each argument, whether it is a state or the gradient of one, and so changes in the
            loop. A product is split so that its part without such columns can leave the loop.
        dtype: Dtype that the loop computes in.

    Raises:
        UnsupportedError: If an operation mixes rows of the batch, or can't be lowered.
    """

    def run(*values: Tensor) -> Any:
        return _Lowering(module, recurrent, dtype).lower(values)

    lowered = make_fx(run)(*arguments)
    lowered.graph.eliminate_dead_code()
    eliminate_common(lowered.graph)
    return lowered


class _Lowering(LocationInterpreter):
    """Run a captured graph on column views instead of tensors; arguments as for :func:`lower`."""

    def __init__(self, module: fx.GraphModule, recurrent: Sequence[bool], dtype: torch.dtype) -> None:
        super().__init__(module)
        self.columns = Columns(dtype)
        self.recurrent = list(recurrent)

    def lower(self, values: Sequence[Tensor]) -> Any:
        columns = self.columns
        inputs = [
            columns.add(value, recurrent) if BATCH_SYMBOL in value.shape else value
            for value, recurrent in zip(values, self.recurrent, strict=True)
        ]
        result = self.run(*inputs, enable_io_processing=False)
        return tree_map(
            lambda v: columns.to_tensor(v.ids.flatten()) if isinstance(v, ColumnView) else v, result
        )

    def run_node(self, n: fx.Node) -> Any:
        self.columns.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        values: list[Any] = []
        tree_map(values.append, (args, kwargs))
        result = self.columns.node.meta.get("val")
        if not any(isinstance(v, ColumnView) for v in values):
            if isinstance(result, Tensor) and any(size and size % BATCH_SYMBOL == 0 for size in result.shape):
                return self._broadcast_to_batch(target, args, result)
            if not any(isinstance(v, FakeTensor) for v in values):
                with _disable_current_modes():
                    return target(*args, **kwargs)
            return target(*args, **kwargs)
        dtypes = self._result_dtypes(target, values)
        if target in _RULES:
            return _RULES[target](self.columns, *args, **kwargs)
        if target in MOVEMENT_OPS:
            return move(self.columns, target, args, kwargs)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            if target is aten.add.Tensor and dtypes == {torch.bool}:
                target = aten.logical_or.default
            return self.columns.pointwise(target, *args, **kwargs)
        raise UnsupportedError(f"{target} is not supported by the compiler")

    def _result_dtypes(self, target: Any, values: list[Any]) -> set[torch.dtype]:
        """Return the dtypes of the results of the current node.

        The loop stores all values in one floating-point dtype, so integers must be small.

        Raises:
            UnsupportedError: If the loop's dtype can't represent the results.
        """
        result = self.columns.node.meta.get("val")
        results = result if isinstance(result, (tuple, list)) else [result]
        dtypes = {v.dtype for v in results if isinstance(v, Tensor)}
        for dtype in dtypes - {self.columns.dtype, torch.bool, torch.int64}:
            if not self._is_intermediate_bool_cast():
                raise UnsupportedError(f"{target} converts to {dtype} in the step")
        computes_integers = torch.int64 in dtypes and torch.Tag.pointwise in getattr(target, "tags", ())
        large = any(isinstance(v, int) and abs(v) > _MAX_INTEGER for v in values)
        if (computes_integers and (large or target not in _INTEGER_OPS)) or (
            target in BITWISE_OPS and dtypes != {torch.bool}
        ):
            raise UnsupportedError(f"{target} computes with integers")
        return dtypes

    def _is_intermediate_bool_cast(self) -> bool:
        """Return whether a bool is cast to another dtype that every user converts to the loop's dtype."""
        node, users = self.columns.node, list(self.columns.node.users)
        operand = node.args[0]
        return (
            isinstance(operand, fx.Node)
            and operand.meta["val"].dtype is torch.bool
            and node.target in (aten._to_copy.default, prims.convert_element_type.default)
            and all(getattr(user.meta.get("val"), "dtype", None) is self.columns.dtype for user in users)
        )

    def _broadcast_to_batch(self, target: Any, args: Any, value: Tensor) -> ColumnView:
        """Lower an operation without batch operands whose result has a batch dimension."""
        shape = tuple(value.shape)
        if target in _FILL_VALUES:
            fill = _FILL_VALUES[target]
            number = args[fill[0]] if isinstance(fill, list) else fill
            return self.columns.constant(number, shape, value.dtype)
        if target is aten.repeat.default:
            repeats = [size // BATCH_SYMBOL if size % BATCH_SYMBOL == 0 else size for size in args[1]]
            return ColumnView(np.tile(self.columns.ids_of(args[0]), repeats), shape)
        if target in (aten.expand.default, aten.view.default, aten.clone.default):
            return ColumnView(np.broadcast_to(self.columns.ids_of(args[0]), without_batch(shape)), shape)
        raise UnsupportedError(f"{target} creates a value for the whole batch")


_RULES = {**ARITHMETIC_RULES, **REDUCTION_RULES, **INDEXING_RULES}
_MAX_INTEGER = 2**20
_INTEGER_OPS = {
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.abs.default,
    aten.where.self, aten.maximum.default, aten.minimum.default, aten.clone.default, aten.sgn.default,
    aten.remainder.Scalar, aten.div.Tensor_mode,
}  # fmt: skip
_FILL_VALUES: dict[Any, float | list[int]] = {  # the number, or [index] of the argument that has it
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

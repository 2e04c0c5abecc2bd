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

from unrolled.engines._torch_private import FakeTensor, disable_current_modes, make_fx, tree_map
from unrolled.engines.compiler.cse import eliminate_common, eliminate_unused
from unrolled.engines.compiler.ir import BATCH_SYMBOL, MIXES_ROWS, UnsupportedError
from unrolled.engines.compiler.lowering.arithmetic import ARITHMETIC_RULES
from unrolled.engines.compiler.lowering.columns import BITWISE_OPS, Columns, ColumnView, without_batch
from unrolled.engines.compiler.lowering.dtypes import (
    INTEGER_DTYPES,
    INTEGER_OPS,
    WRAPPING_OPS,
    IntegerBounds,
    NeedsFloat64Error,
    check_numbers,
    is_float32,
    round_to_float32,
    wrap_integers,
)
from unrolled.engines.compiler.lowering.movement import INDEXING_RULES, MOVEMENT_OPS, move
from unrolled.engines.compiler.lowering.padding import PADDING_RULES
from unrolled.engines.compiler.lowering.reductions import REDUCTION_RULES
from unrolled.engines.compiler.lowering.scans import SCAN_RULES
from unrolled.engines.compiler.source_location import (
    COMPILER_FAULT,
    LocationInterpreter,
    location_of,
    unsupported,
)

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
        NeedsFloat64Error: If the step needs a float64 loop, and ``dtype`` is float32.
        UnsupportedError: If an operation mixes rows of the batch, or can't be lowered.
    """

    def run(*values: Tensor) -> Any:
        return _Lowering(module, recurrent, dtype).lower(values)

    lowered = make_fx(run)(*arguments)
    eliminate_unused(lowered.graph)
    eliminate_common(lowered.graph)
    for node in lowered.graph.nodes:
        node.meta.setdefault("val", None)  # of an operation without a result, such as a check
    return lowered


class _Lowering(LocationInterpreter):
    """Run a captured graph on column views instead of tensors; arguments as for :func:`lower`."""

    def __init__(self, module: fx.GraphModule, recurrent: Sequence[bool], dtype: torch.dtype) -> None:
        super().__init__(module)
        self.columns = Columns(dtype)
        self.bounds = IntegerBounds(dtype)
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
        try:
            return super().run_node(n)
        except (UnsupportedError, NeedsFloat64Error):
            raise
        except Exception as error:  # the reference engine can still run the step
            reason = f"{COMPILER_FAULT} ({type(error).__name__}: {error}); please report it, with the cell"
            raise unsupported(reason, location_of(n)) from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        node, columns = self.columns.node, self.columns
        result = node.meta.get("val")
        in_float32 = columns.dtype is torch.float64 and is_float32(node)
        if in_float32:
            args = tree_map(self._as_float32, args, is_leaf=lambda v: isinstance(v, ColumnView))
        lowered = self._lower_operation(target, args, kwargs)
        if isinstance(result, Tensor) and result.dtype in INTEGER_DTYPES:
            lowered = self._checked_integers(lowered)
        is_float = isinstance(result, Tensor) and result.dtype.is_floating_point
        if is_float and isinstance(lowered, FakeTensor) and lowered.dtype is not columns.dtype:
            lowered = lowered.to(columns.dtype)
        if in_float32 and is_float and target not in _SELECTIONS and target not in MOVEMENT_OPS:
            if isinstance(lowered, ColumnView):
                return columns.pointwise(round_to_float32, lowered)
            if isinstance(lowered, FakeTensor) and BATCH_SYMBOL not in lowered.shape:
                return round_to_float32(lowered)
        return lowered

    def _lower_operation(self, target: Any, args: Any, kwargs: Any) -> Any:
        values: list[Any] = []
        tree_map(values.append, (args, kwargs))
        result = self.columns.node.meta.get("val")
        if isinstance(result, Tensor) and sum(size % BATCH_SYMBOL == 0 < size for size in result.shape) > 1:
            raise UnsupportedError(f"{target} {MIXES_ROWS}")
        if not any(isinstance(v, ColumnView) for v in values):
            if isinstance(result, Tensor) and any(size and size % BATCH_SYMBOL == 0 for size in result.shape):
                return self._broadcast_to_batch(target, args, result)
            if not any(isinstance(v, FakeTensor) for v in values):
                with disable_current_modes():
                    return target(*args, **kwargs)
            return target(*tree_map(self._in_loop_dtype, args), **kwargs)
        dtypes = self._result_dtypes(target, values)
        if target in _RULES:
            return _RULES[target](self.columns, *args, **kwargs)
        if target in MOVEMENT_OPS:
            return move(self.columns, target, args, kwargs)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            if target is aten.add.Tensor and dtypes == {torch.bool}:
                target = aten.logical_or.default
            return self.columns.pointwise(target, *args, **kwargs)
        raise UnsupportedError(
            f"{target} is not supported by the compiler: compiler/lowering/ has no rule for it"
        )

    def _in_loop_dtype(self, value: Any) -> Any:
        """Return an operand of an operation on parameters; a floating-point one in the loop's dtype."""
        is_float = isinstance(value, Tensor) and value.dtype.is_floating_point and value.dim() > 0
        if not is_float or value.dtype is self.columns.dtype:
            return value
        if isinstance(value, FakeTensor):
            return value.to(self.columns.dtype)
        with disable_current_modes():
            return value.to(self.columns.dtype)

    def _as_float32(self, value: Any) -> Any:
        """Round a number or a float64 constant, which torch converts to float32."""
        if isinstance(value, float):
            return float(np.float32(value))
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.dtype is torch.float64:
            with disable_current_modes():
                return value.float()
        return value

    def _checked_integers(self, lowered: Any) -> Any:
        """Check that the loop's dtype represents the whole numbers that an operation computes.

        Raises:
            NeedsFloat64Error: If a float32 loop can't.
            UnsupportedError: If a float64 loop can't either.
        """
        node = self.columns.node
        self.bounds.add(node, lowered)
        if not isinstance(lowered, ColumnView):
            return lowered
        return wrap_integers(self.columns, lowered, node.meta["val"].dtype, self.bounds)

    def _result_dtypes(self, target: Any, values: list[Any]) -> set[torch.dtype]:
        """Return the dtypes of the results of the current node.

        Raises:
            NeedsFloat64Error: If a float32 loop can't represent the results.
            UnsupportedError: If no loop can.
        """
        result = self.columns.node.meta.get("val")
        results = result if isinstance(result, (tuple, list)) else [result]
        dtypes = {v.dtype for v in results if isinstance(v, Tensor)}
        for dtype in dtypes - {torch.float32, torch.bool, *INTEGER_DTYPES}:
            if dtype is torch.float64 and self.columns.dtype is torch.float32:
                if not self._is_intermediate_bool_cast():
                    raise NeedsFloat64Error
            elif dtype is not torch.float64:
                advice = _COMPLEX_ADVICE if dtype.is_complex else "use float32 or float64 there"
                raise UnsupportedError(f"{target} converts to {dtype} in the step; {advice}")
        computes_integers = not dtypes.isdisjoint(INTEGER_DTYPES) and (
            torch.Tag.pointwise in getattr(target, "tags", ())
        )
        if (computes_integers and target not in INTEGER_OPS) or (
            target in BITWISE_OPS and dtypes != {torch.bool}
        ):
            raise UnsupportedError(f"{target} computes with integers")
        if torch.Tag.pointwise in getattr(target, "tags", ()) and target not in WRAPPING_OPS:
            check_numbers(self.columns.node)
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


_RULES = {**ARITHMETIC_RULES, **REDUCTION_RULES, **SCAN_RULES, **INDEXING_RULES, **PADDING_RULES}
_SELECTIONS = {aten.where.self, aten.clone.default, aten.neg.default, aten.abs.default, aten.detach.default}
_COMPLEX_ADVICE = "compute the real and the imaginary part as two real values"
_FILL_VALUES: dict[Any, float | list[int]] = {  # the number, or [index] of the argument that has it
    aten.full.default: [1],
    aten.full_like.default: [1],
    aten.new_full.default: [2],
    aten.zeros.default: 0.0,
    aten._efficientzerotensor.default: 0.0,
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

"""Values of the batch as arrays of column ids.

A column belongs to a computed value, or is a constant or an element of a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from unrolled.engines._torch_private import FakeTensor, disable_current_modes
from unrolled.engines.compiler.ir import BATCH_SYMBOL, MIXES_ROWS, UnsupportedError

aten = torch.ops.aten

MAX_PIECES = 256  # of one value
MAX_SOURCES = 4000  # of a step, forward and backward: each becomes a few lines of C++ in one function
BITWISE_OPS = {
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.bitwise_not.default,
}  # fmt: skip
ColumnIds = np.ndarray[Any, np.dtype[np.int64]]
_MAX_WIDTH = 1 << 24  # a column id is the number of its source times this, plus the column
_IDENTITY_ADD_ZERO = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
_IDENTITY_TIMES_ONE = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
_SCALAR_SECOND_OPS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_LOGICAL_OPS = {*BITWISE_OPS, aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default}


@dataclass(frozen=True)
class ColumnView:
    """A value of the batch as column ids.

    Attributes:
        ids: Ids of the columns, in the value's shape with the batch size replaced by 1.
        shape: Shape of the value, with ``BATCH_SYMBOL`` for the batch size.
    """

    ids: ColumnIds
    shape: tuple[int, ...]

    @property
    def batch_axis(self) -> int:
        """The batch dimension."""
        return next(k for k, size in enumerate(self.shape) if size and size % BATCH_SYMBOL == 0)


@dataclass(frozen=True)
class _Source:
    """A value that has columns.

    Attributes:
        value: A computed value ``(batch, width)``, the flat elements of a parameter or constant, or a number.
            A computed value has the loop's dtype, or is bool. Operations convert it to the dtype that they
            compute in, see :meth:`Columns.convert`.
        recurrent: Whether the value depends on a state or the gradient of one, and so must be computed in the
            loop.
    """

    value: Tensor | float
    recurrent: bool

    @property
    def is_shared(self) -> bool:
        """Whether the value is the same in all rows of the batch."""
        return not isinstance(self.value, Tensor) or self.value.dim() == 1


class Columns:
    """Table of all columns by id, with the operations that compute on them.

    Args:
        dtype: Dtype of the step.

    Attributes:
        dtype: Dtype of the step.
        sources: All values that have columns.
        node: The node that is being lowered.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sources: list[_Source] = []
        self._ids_by_tensor: dict[int, tuple[Tensor, ColumnIds]] = {}
        self._aranges: dict[tuple[int, int, int], Tensor] = {}
        self.node: fx.Node

    def _add_source(self, source: _Source, width: int) -> ColumnIds:
        """Add a source and return the ids of its columns."""
        self.sources.append(source)
        if width > _MAX_WIDTH:
            raise UnsupportedError(f"it splits a value of {width} elements, more than {_MAX_WIDTH}")
        if len(self.sources) > MAX_SOURCES:
            raise UnsupportedError(f"it splits its features into more than {MAX_SOURCES} pieces in total")
        return np.arange(width) + (len(self.sources) - 1) * _MAX_WIDTH

    def add(self, value: Tensor, recurrent: bool) -> ColumnView:
        """Add a computed value ``(batch, width)``."""
        ids = self._add_source(_Source(value, recurrent), value.shape[1])
        return ColumnView(ids[None], tuple(value.shape))

    def constant(self, value: float, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> ColumnView:
        """Return a value of the given shape with the same number, converted to ``dtype``, everywhere."""
        with disable_current_modes():
            number = float(torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype))
        [column] = self._add_source(_Source(number, False), 1)
        return ColumnView(np.broadcast_to(column, without_batch(shape)), tuple(shape))

    def ids_of(self, value: object) -> ColumnIds:
        """Return the column ids of an operand: a value of the batch, a parameter, a constant or a number."""
        if isinstance(value, ColumnView):
            return value.ids
        if not isinstance(value, Tensor):
            return self._add_source(_Source(float(value), False), 1).reshape(())  # type: ignore[arg-type]
        if id(value) not in self._ids_by_tensor:
            if isinstance(value, FakeTensor):
                source = _Source(self._in_loop_dtype(value.reshape(-1)), False)
            else:
                with disable_current_modes():
                    flat = self._in_loop_dtype(value.reshape(-1))
                    source = _Source(flat if len(flat) != 1 else float(flat), False)
            ids = self._add_source(source, value.numel()).reshape(tuple(value.shape))
            # Keep the tensor alive: its id must not be reused.
            self._ids_by_tensor[id(value)] = (value, ids)
        return self._ids_by_tensor[id(value)][1]

    def _in_loop_dtype(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.dtype.is_floating_point else value

    def is_recurrent(self, ids: ColumnIds) -> bool:
        """Return whether any of the columns depends on a state."""
        return any(self.sources[column // _MAX_WIDTH].recurrent for column in np.ravel(ids).tolist())

    def check_sum_over_batch(self) -> None:
        """Check that the current node may sum over the batch. Only gradients of shared values do.

        Raises:
            UnsupportedError: If the node isn't part of the backward pass.
        """
        location = self.node.meta.get("location")
        if location is None or not location.backward:
            raise UnsupportedError(f"{self.node.target} {MIXES_ROWS}")

    def pieces(self, operands: list[ColumnIds]) -> Iterator[tuple[int, list[tuple[int, bool]]]]:
        """Cut operands into pieces whose columns are consecutive, or repeat one column, in every operand.

        Args:
            operands: Flat column ids, all of the same length.

        Yields:
            The length of a piece, and for each operand its first column id and whether that column repeats.
        """
        total, start, count = len(operands[0]), 0, 0
        run_lengths = [_run_lengths(ids) for ids in operands]
        while start < total:
            runs = [(consecutive[start], equal[start]) for consecutive, equal in run_lengths]
            length = min(max(run) for run in runs)
            yield (
                length,
                [
                    (int(ids[start]), equal >= length and length > 1)
                    for ids, (_, equal) in zip(operands, runs, strict=True)
                ],
            )
            start, count = start + length, count + 1
            if count > MAX_PIECES:
                raise UnsupportedError(f"it rearranges features into more than {MAX_PIECES} pieces")

    def count_runs(self, ids: ColumnIds) -> int:
        """Return into how many runs of consecutive columns the ids are divided."""
        return 1 + int(np.count_nonzero(np.diff(ids.reshape(-1)) != 1))

    def source_of(self, column: int) -> _Source:
        """Return the source that has a column."""
        return self.sources[column // _MAX_WIDTH]

    def take(self, column: int, length: int) -> Tensor | float:
        """Return ``length`` consecutive columns of a source, from ``column`` on."""
        source, start = self.sources[column // _MAX_WIDTH], column % _MAX_WIDTH
        value = source.value
        if not isinstance(value, Tensor):
            return value
        axis = value.dim() - 1
        if start == 0 and length == value.shape[axis]:
            return value
        return self.apply(torch.narrow, value, axis, start, length)

    def convert(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a value in the loop's dtype, in which bools are 0 and 1, or as bool."""
        if value.dtype is dtype:
            return value
        if dtype is torch.bool:
            return self.apply(aten.ne.Scalar, value, 0)
        return self.apply(aten._to_copy.default, value, dtype=dtype)

    @staticmethod
    def apply(target: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply an operation to a tensor without rows: a constant, or a value made of parameters."""
        if isinstance(value, FakeTensor):
            return target(value, *args, **kwargs)  # type: ignore[no-any-return]
        with disable_current_modes():
            return target(value, *args, **kwargs)  # type: ignore[no-any-return]

    def to_tensor(self, ids: ColumnIds) -> Tensor:
        """Return columns as one value ``(batch, width)`` in the loop's dtype."""
        parts = []
        for length, [(column, repeats)] in self.pieces([ids]):
            part = self.take(column, 1 if repeats else length)
            if isinstance(part, Tensor):
                part = self.convert(part, self.dtype)
            if not isinstance(part, Tensor) or part.dim() == 1:
                zeros = torch.full((BATCH_SYMBOL, length), 0.0, dtype=self.dtype)
                part = zeros + part
            elif repeats:
                part = part.expand(BATCH_SYMBOL, length).clone()
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def stored(self, x: ColumnView) -> ColumnView:
        """Return a copy that the loop stores as one value, so that its readers load it."""
        tensor = self.to_tensor(x.ids.reshape(-1))
        if len(list(self.pieces([x.ids.reshape(-1)]))) == 1:
            tensor = torch.cat([tensor], 1)
        return self.reshape(self.add(tensor, self.is_recurrent(x.ids)), x.shape)

    def pointwise(self, target: Any, *args: Any, **kwargs: Any) -> ColumnView:
        """Apply an elementwise operation to its operands, piece by piece."""
        shapes = [without_batch(a.shape) for a in args if isinstance(a, (ColumnView, Tensor))]
        base = np.broadcast_shapes(*shapes)
        views = [a for a in args if isinstance(a, ColumnView)]
        shape = _with_batch(base, views)
        schema = target._schema.arguments
        positions = [
            k
            for k, a in enumerate(args)
            if isinstance(a, (ColumnView, Tensor))
            or (isinstance(a, (int, float)) and "Tensor" in str(schema[k].type))
        ]
        operands = [np.broadcast_to(self.ids_of(args[k]), base).reshape(-1) for k in positions]
        if target is aten.where.self:
            conditions = [self._constant_value(column) for column in operands[0].tolist()]
            selected = np.where([bool(value) for value in conditions], operands[1], operands[2])
            computed = np.array([value is None for value in conditions], dtype=bool)
            if not computed.all():
                if computed.any():
                    views = [
                        ColumnView(ids[computed][None], (BATCH_SYMBOL, computed.sum())) for ids in operands
                    ]
                    selected[computed] = self.pointwise(target, *views).ids.flatten()
                return ColumnView(selected.reshape(base), shape)
        results = []
        for length, piece in self.pieces(operands):
            width = 1 if all(repeats or length == 1 for _, repeats in piece) else length
            values = [self.take(column, 1 if repeats else length) for column, repeats in piece]
            value = self._apply(target, args, kwargs, dict(zip(positions, values, strict=True)))
            if isinstance(value, tuple):  # an identity: one of the operands is the result
                column, repeats = piece[value[0]]
                results.append(np.full(length, column) if repeats else np.arange(length) + column)
                continue
            recurrent = any(self.sources[column // _MAX_WIDTH].recurrent for column, _ in piece)
            ids = self._add_source(_Source(value, recurrent), width)
            results.append(np.broadcast_to(ids, length))
        result_ids = np.concatenate(results) if results else operands[0]
        return ColumnView(result_ids.reshape(base), shape)

    def _apply(self, target: Any, args: Any, kwargs: Any, values: dict[int, Any]) -> Any:
        """Apply an elementwise operation to one piece.

        Args:
            target: The operation.
            args: Positional arguments of the whole operation.
            kwargs: Keyword arguments.
            values: Values of the piece, by position in ``args``.

        Returns:
            A tensor, a constant, or ``(k,)`` if the result is the operand at index ``k`` of ``values``.
        """
        arguments = [values.get(k, a) for k, a in enumerate(args)]
        if all(isinstance(value, float) or not isinstance(value, FakeTensor) for value in values.values()):
            with disable_current_modes():  # all operands are constants: compute the result now
                constants = [
                    torch.as_tensor(a, dtype=self.dtype) if k in values else a
                    for k, a in enumerate(arguments)
                ]
                if target in BITWISE_OPS:
                    constants = [a.bool() for a in constants]
                result = target(*constants, **kwargs)
                if result.numel() == 1:
                    return float(result)
                return result.to(self.dtype) if result.is_floating_point() else result
        first, second = [*arguments, None, None][:2]
        if (target in _IDENTITY_ADD_ZERO and _equals(second, 0)) or (
            target in _IDENTITY_TIMES_ONE and _equals(second, 1)
        ):
            return (0,)
        if (target is aten.add.Tensor and _equals(first, 0) and not kwargs) or (
            target is aten.mul.Tensor and _equals(first, 1)
        ):
            return (1,)
        for k, value in values.items():
            is_bool = target in _LOGICAL_OPS or (target is aten.where.self and k == 0)
            dtype = torch.bool if is_bool else self.dtype
            if isinstance(value, Tensor):
                arguments[k] = self.convert(value, dtype)
            elif k == 0 or target not in _SCALAR_SECOND_OPS:
                arguments[k] = torch.full((), bool(value) if is_bool else value, dtype=dtype)
        return target(*arguments, **kwargs)

    def constant_values(self, ids: ColumnIds) -> ColumnIds | None:
        """Return the number in each column if all are constants, else None."""
        values = [self._constant_value(column) for column in ids.reshape(-1).tolist()]
        return None if None in values else np.array(values).reshape(ids.shape)

    def _constant_value(self, column: int) -> float | None:
        """Return the number in a column, or None if it is computed."""
        value = self.sources[column // _MAX_WIDTH].value
        if isinstance(value, FakeTensor):
            return None
        if isinstance(value, Tensor):
            with disable_current_modes():
                return float(value[column % _MAX_WIDTH])
        return value

    def matmul(self, ids: ColumnIds, matrix: Tensor) -> ColumnView:
        """Multiply ``(batch, k)`` columns by a matrix ``(k, n)`` that all rows share.

        Columns that depend on a state get a separate product, so that the product of the others can leave the
        loop.
        """
        if not matrix.numel():
            return self.constant(0, (BATCH_SYMBOL, matrix.shape[1]))
        if not isinstance(matrix, FakeTensor):
            with disable_current_modes():
                matrix = self._in_loop_dtype(matrix)
        else:
            matrix = self._in_loop_dtype(matrix)
        in_loop = [source.recurrent or source.is_shared for source in map(self.source_of, ids.tolist())]
        cuts = [0, *(k for k in range(1, len(ids)) if in_loop[k] != in_loop[k - 1]), len(ids)]
        matrix, total = self.convert(matrix, self.dtype), None
        for start, end in itertools.pairwise(cuts):
            rows = matrix if end - start == len(ids) else matrix[start:end]
            product = torch.mm(self.to_tensor(ids[start:end]), rows)
            total = product if total is None else total + product
        assert total is not None
        return self.add(total, self.is_recurrent(ids))

    def arange(self, shape: Sequence[int], dim: int) -> Tensor:
        """Return 0, 1, 2, … along a dimension, broadcastable to ``shape``."""
        key = (shape[dim], dim % len(shape), len(shape))
        if key not in self._aranges:
            with disable_current_modes():
                numbers = torch.arange(shape[dim], dtype=self.dtype)
                view = numbers.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
            self._aranges[key] = view
        return self._aranges[key]

    def reshape(self, x: ColumnView, shape: Sequence[int]) -> ColumnView:
        """Return the same columns in another shape."""
        return ColumnView(x.ids.reshape(without_batch(shape)), tuple(shape))


def _equals(value: object, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


def _run_lengths(ids: ColumnIds) -> tuple[list[int], list[int]]:
    """Return for each position how many ids from there on are consecutive, and how many are equal."""
    columns = ids.tolist()
    consecutive, equal = [1] * len(columns), [1] * len(columns)
    for k in range(len(columns) - 2, -1, -1):
        if columns[k + 1] == columns[k] + 1 and columns[k] // _MAX_WIDTH == columns[k + 1] // _MAX_WIDTH:
            consecutive[k] = consecutive[k + 1] + 1
        if columns[k + 1] == columns[k]:
            equal[k] = equal[k + 1] + 1
    return consecutive, equal


def _with_batch(shape: Sequence[int], views: list[ColumnView]) -> tuple[int, ...]:
    """Return a broadcast shape with the batch size in the dimension where ``views`` have it."""
    view = max(views, key=lambda v: len(v.shape))
    axis = view.batch_axis - len(view.shape)
    return tuple(n * BATCH_SYMBOL if k - len(shape) == axis else n for k, n in enumerate(shape))


def without_batch(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape with the batch size replaced by 1, and multiples of it by the factor."""
    return tuple(size // BATCH_SYMBOL if size and size % BATCH_SYMBOL == 0 else size for size in shape)

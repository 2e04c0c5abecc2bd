"""Values of the batch as columns: of values that were computed, constants, or elements of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError

aten = torch.ops.aten

MOST_PIECES = 256  # of one value
MOST_VALUES = 4000  # of one step, forward and backward: each is a few lines of C++ in one function
OF_TRUTH = {
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.bitwise_not.default,
}  # fmt: skip
Names = np.ndarray[Any, np.dtype[np.int64]]  # of columns
_WIDTH = 1 << 24  # names of columns: the value's number times this, plus the column


@dataclass(frozen=True)
class ColumnView:
    """A value of the batch: the names of its columns, in its shape with 1 for the batch."""

    columns: Names
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The axis of the batch."""
        return next(k for k, size in enumerate(self.shape) if size and size % BATCH_SYMBOL == 0)


@dataclass(frozen=True)
class _Source:
    value: Tensor | float  # (batch, width); or the elements of a parameter or a constant, in a row
    moving: bool

    @property
    def shared(self) -> bool:
        return not isinstance(self.value, Tensor) or self.value.dim() == 1


class Columns:
    """All columns by name, and what computes on them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of the step
        self.sources: list[_Source] = []
        self._elements: dict[int, tuple[Tensor, Names]] = {}
        self.node: fx.Node  # that is being lowered

    def _name(self, source: _Source, width: int) -> Names:
        self.sources.append(source)
        if width > _WIDTH:
            raise UnsupportedError(f"it takes apart a value of {width} elements, more than {_WIDTH}")
        if len(self.sources) > MOST_VALUES:
            raise UnsupportedError(f"it cuts its features into more than {MOST_VALUES} pieces in all")
        return np.arange(width) + (len(self.sources) - 1) * _WIDTH

    def row(self, value: Tensor, moving: bool) -> ColumnView:
        """A value ``(batch, width)`` that was computed."""
        names = self._name(_Source(value, moving), value.shape[1])
        return ColumnView(names[None], tuple(value.shape))

    def constant(self, value: float, shape: Sequence[int]) -> ColumnView:
        """The same number in every row and column."""
        name = self._name(_Source(float(value), False), 1)
        return ColumnView(np.broadcast_to(name[0], without_batch(shape)), tuple(shape))

    def names(self, value: object) -> Names:
        """The names of the columns of any operand."""
        if isinstance(value, ColumnView):
            return value.columns
        if not isinstance(value, Tensor):
            return self._name(_Source(float(value), False), 1).reshape(())  # type: ignore[arg-type]
        if id(value) not in self._elements:
            if isinstance(value, FakeTensor):
                source = _Source(value.reshape(-1), False)
            else:
                with _disable_current_modes():
                    flat = value.reshape(-1)
                    source = _Source(flat if len(flat) != 1 else float(flat), False)
            names = self._name(source, value.numel()).reshape(tuple(value.shape))
            self._elements[id(value)] = (value, names)  # the value is kept, so that its id stays its own
        return self._elements[id(value)][1]

    def moving(self, names: Names) -> bool:
        """Whether any of these columns changes in the loop."""
        return any(self.sources[name // _WIDTH].moving for name in np.ravel(names).tolist())

    def pieces(self, operands: list[Names]) -> Iterator[tuple[int, list[tuple[int, bool]]]]:
        """Cut flat operands where a run of any ends: its length, each one's first name and if it repeats."""
        count, at, pieces = len(operands[0]), 0, 0
        lengths = [_runs(names) for names in operands]
        while at < count:
            ends = [(one[at], same[at]) for one, same in lengths]
            length = min(max(pair) for pair in ends)
            yield (
                length,
                [(int(n[at]), s >= length and length > 1) for n, (_, s) in zip(operands, ends, strict=True)],
            )
            at, pieces = at + length, pieces + 1
            if pieces > MOST_PIECES:
                raise UnsupportedError(f"it rearranges features into more than {MOST_PIECES} pieces")

    def runs(self, names: Names) -> int:
        """How many pieces columns are cut into."""
        return 1 + int(np.count_nonzero(np.diff(names.reshape(-1)) != 1))

    def source(self, name: int) -> _Source:
        """The value that has a column."""
        return self.sources[name // _WIDTH]

    def take(self, name: int, length: int) -> Tensor | float:
        """Columns of a source that lie next to one another."""
        source, start = self.sources[name // _WIDTH], name % _WIDTH
        value = source.value
        if not isinstance(value, Tensor):
            return value
        axis = value.dim() - 1
        if start == 0 and length == value.shape[axis]:
            return value
        if isinstance(value, FakeTensor):
            return value.narrow(axis, start, length)
        with _disable_current_modes():
            return value.narrow(axis, start, length)

    def whole(self, names: Names) -> Tensor:
        """Columns as one value ``(batch, width)``."""
        parts = []
        for length, [(name, repeats)] in self.pieces([names]):
            part = self.take(name, 1 if repeats else length)
            if not isinstance(part, Tensor) or part.dim() == 1:
                fill = torch.full((BATCH_SYMBOL, length), 0.0, dtype=self.dtype)
                part = fill + part
            elif repeats:
                part = part.expand(BATCH_SYMBOL, length).clone()
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def pointwise(self, target: Any, *args: Any, **kwargs: Any) -> ColumnView:
        """A function of the elements of rows, by its operation."""
        shapes = [without_batch(a.shape) for a in args if isinstance(a, (ColumnView, Tensor))]
        base = np.broadcast_shapes(*shapes)
        rows = [a for a in args if isinstance(a, ColumnView)]
        shape = _with_batch(base, rows)
        schema = target._schema.arguments
        places = [
            k
            for k, a in enumerate(args)
            if isinstance(a, (ColumnView, Tensor))
            or (isinstance(a, (int, float)) and "Tensor" in str(schema[k].type))
        ]
        operands = [np.broadcast_to(self.names(args[k]), base).reshape(-1) for k in places]
        if target is aten.where.self:
            numbers = [self._number(name) for name in operands[0].tolist()]
            found = np.where([bool(number) for number in numbers], operands[1], operands[2])
            open_ = np.array([number is None for number in numbers], dtype=bool)
            if not open_.all():
                if open_.any():
                    rows = [ColumnView(names[open_][None], (BATCH_SYMBOL, open_.sum())) for names in operands]
                    found[open_] = self.pointwise(target, *rows).columns.flatten()
                return ColumnView(found.reshape(base), shape)
        results = []
        for length, taken in self.pieces(operands):
            wide = 1 if all(same or length == 1 for _, same in taken) else length
            pieces = [self.take(name, 1 if same else length) for name, same in taken]
            piece = self._apply(target, args, kwargs, dict(zip(places, pieces, strict=True)))
            if isinstance(piece, tuple):  # one of the operands, as it is
                name, same = taken[piece[0]]
                results.append(np.full(length, name) if same else np.arange(length) + name)
                continue
            moving = any(self.sources[name // _WIDTH].moving for name, _ in taken)
            names = self._name(_Source(piece, moving), wide)
            results.append(np.broadcast_to(names, length))
        found = np.concatenate(results) if results else operands[0]
        return ColumnView(found.reshape(base), shape)

    def _apply(self, target: Any, args: Any, kwargs: Any, pieces: dict[int, Any]) -> Any:
        """The operation on pieces: a tensor, a constant, or the place of the operand that it leaves alone."""
        given = [pieces.get(k, a) for k, a in enumerate(args)]
        if all(isinstance(piece, float) or not isinstance(piece, FakeTensor) for piece in pieces.values()):
            with _disable_current_modes():
                real = [
                    torch.as_tensor(g, dtype=torch.float64) if k in pieces else g for k, g in enumerate(given)
                ]
                if target in OF_TRUTH:
                    real = [g.bool() for g in real]
                found = target(*real, **kwargs)
                if found.numel() == 1:
                    return float(found)
                return found.to(self.dtype) if found.is_floating_point() else found
        first, second = [*given, None, None][:2]
        if (target in _ZERO_ON_THE_RIGHT and _is(second, 0)) or (
            target in _ONE_ON_THE_RIGHT and _is(second, 1)
        ):
            return (0,)
        if (target is aten.add.Tensor and _is(first, 0) and not kwargs) or (
            target is aten.mul.Tensor and _is(first, 1)
        ):
            return (1,)
        for k, piece in pieces.items():
            if isinstance(piece, float) and (k == 0 or target not in _SCALARS_RIGHT):
                given[k] = torch.full((), piece, dtype=self.dtype)
        return target(*given, **kwargs)

    def known(self, names: Names) -> Names | None:
        """The number in each column, where all are constants."""
        found = [self._number(name) for name in names.reshape(-1).tolist()]
        return None if None in found else np.array(found).reshape(names.shape)

    def _number(self, name: int) -> float | None:
        """The number in a column; None where it is computed."""
        value = self.sources[name // _WIDTH].value
        if isinstance(value, FakeTensor):
            return None
        if isinstance(value, Tensor):
            with _disable_current_modes():
                return float(value[name % _WIDTH])
        return value

    def times(self, names: Names, matrix: Tensor) -> ColumnView:
        """Columns ``(k)`` with a matrix ``(k, n)`` that all rows share.

        What moves in the loop is multiplied apart from the rest.
        """
        moving = [source.moving or source.shared for source in map(self.source, names.tolist())]
        cuts = [0, *(k for k in range(1, len(names)) if moving[k] != moving[k - 1]), len(names)]
        total = None
        for start, end in itertools.pairwise(cuts):
            rows = matrix if end - start == len(names) else matrix[start:end]
            part = torch.mm(self.whole(names[start:end]), rows)
            total = part if total is None else total + part
        assert total is not None
        return self.row(total, self.moving(names))

    def numbers(self, shape: Sequence[int], dim: int) -> Tensor:
        """0, 1, 2 … along an axis."""
        with _disable_current_modes():
            numbers = torch.arange(shape[dim], dtype=self.dtype)
            return numbers.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])

    def reshape(self, row: ColumnView, shape: Sequence[int]) -> ColumnView:
        """The same columns in another shape."""
        return ColumnView(row.columns.reshape(without_batch(shape)), tuple(shape))


def _is(value: object, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


_ZERO_ON_THE_RIGHT = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
_ONE_ON_THE_RIGHT = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


_SCALARS_RIGHT = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def _runs(names: Names) -> tuple[list[int], list[int]]:
    """From each place on: how many names follow one another, and how many are the same."""
    given = names.tolist()
    follow, same = [1] * len(given), [1] * len(given)
    for k in range(len(given) - 2, -1, -1):
        if given[k + 1] == given[k] + 1 and given[k] // _WIDTH == given[k + 1] // _WIDTH:
            follow[k] = follow[k + 1] + 1
        if given[k + 1] == given[k]:
            same[k] = same[k + 1] + 1
    return follow, same


def _with_batch(without_batch: Sequence[int], rows: list[ColumnView]) -> tuple[int, ...]:
    """A shape with the batch where one of the rows, and no broadcast, has it."""
    row = max(rows, key=lambda r: len(r.shape))
    axis = row.axis - len(row.shape)
    return tuple(
        n * BATCH_SYMBOL if k - len(without_batch) == axis else n for k, n in enumerate(without_batch)
    )


def without_batch(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the batch: 1 in its place, or what it is multiplied with."""
    return tuple(size // BATCH_SYMBOL if size and size % BATCH_SYMBOL == 0 else size for size in shape)

"""Values of the batch as columns: of values that were computed, constants, or elements of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from unrolled.engines.native.program import ROWS, UnsupportedError

aten = torch.ops.aten

MOST_PIECES = 256  # of one value
Names = np.ndarray[Any, np.dtype[np.int64]]  # of columns
_WIDTH = 1 << 24  # names of columns: the value's number times this, plus the column


@dataclass(frozen=True)
class Row:
    """A value of the batch: the names of its columns, in its shape with 1 for the batch."""

    columns: Names
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The axis of the batch."""
        return next(k for k, size in enumerate(self.shape) if size and size % ROWS == 0)


@dataclass(frozen=True)
class _Source:
    value: Tensor | float  # (batch, width); or the elements of a parameter, in a row; or a constant
    moving: bool
    real: Tensor | None = None  # the elements of a constant tensor

    @property
    def shared(self) -> bool:
        return not isinstance(self.value, Tensor) or self.value.dim() == 1


class Columns:
    """All columns by name, and what computes on them."""

    def __init__(self) -> None:
        self.sources: list[_Source] = []
        self._elements: dict[int, tuple[Tensor, Names]] = {}
        self.node: fx.Node  # that is being lowered

    def _name(self, source: _Source, width: int) -> Names:
        self.sources.append(source)
        return np.arange(width) + (len(self.sources) - 1) * _WIDTH

    def row(self, value: Tensor, moving: bool) -> Row:
        """A value ``(batch, width)`` that was computed."""
        names = self._name(_Source(value, moving), value.shape[1])
        return Row(names[None], tuple(value.shape))

    def constant(self, value: float, shape: Sequence[int]) -> Row:
        """The same number in every row and column."""
        name = self._name(_Source(float(value), False), 1)
        return Row(np.broadcast_to(name[0], small(shape)), tuple(shape))

    def names(self, value: object) -> Names:
        """The names of the columns of any operand."""
        if isinstance(value, Row):
            return value.columns
        if not isinstance(value, Tensor):
            return self._name(_Source(float(value), False), 1).reshape(())  # type: ignore[arg-type]
        if id(value) not in self._elements:
            real = None if isinstance(value, FakeTensor) else value
            if real is not None and real.numel() == 1:
                with _disable_current_modes():
                    number = float(real)
                names = self._name(_Source(number, False), 1).reshape(tuple(real.shape))
            else:
                names = self._name(_Source(value.reshape(-1), False, real), value.numel()).reshape(
                    tuple(value.shape)
                )
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
        return value.narrow(axis, start, length)

    def whole(self, names: Names) -> Tensor:
        """Columns as one value ``(batch, width)``."""
        parts = []
        for length, [(name, repeats)] in self.pieces([names]):
            part = self.take(name, 1 if repeats else length)
            if not isinstance(part, Tensor) or part.dim() == 1:
                fill = torch.full((ROWS, length), 0.0, dtype=self.dtype)
                part = fill + part
            elif repeats:
                part = part.expand(ROWS, length).clone()
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @property
    def dtype(self) -> torch.dtype:
        """That of the step."""
        return next(s.value.dtype for s in self.sources if isinstance(s.value, Tensor))

    def pointwise(self, target: Any, *args: Any, **kwargs: Any) -> Row:
        """A function of the elements of rows, by its operation."""
        shapes = [small(a.shape) for a in args if isinstance(a, (Row, Tensor))]
        base = np.broadcast_shapes(*shapes)
        rows = [a for a in args if isinstance(a, Row)]
        shape = _with_batch(base, rows)
        places = [k for k, a in enumerate(args) if isinstance(a, (Row, Tensor))]
        if target in _SCALARS_TOO:
            places = [k for k, a in enumerate(args) if isinstance(a, (Row, Tensor, int, float))]
        operands = [np.broadcast_to(self.names(args[k]), base).reshape(-1) for k in places]
        if target is aten.where.self and (known := self._known(operands[0])) is not None:
            return Row(np.where(known, operands[1], operands[2]).reshape(base), shape)
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
        return Row(np.concatenate(results).reshape(base), shape)

    def _apply(self, target: Any, args: Any, kwargs: Any, pieces: dict[int, Any]) -> Any:
        """The operation on pieces: a tensor, a constant, or the place of the operand that it leaves alone."""
        numbers = [isinstance(piece, float) for piece in pieces.values()]
        given = [pieces.get(k, a) for k, a in enumerate(args)]
        if all(numbers):
            with _disable_current_modes():
                real = [
                    torch.tensor(g, dtype=torch.float64) if k in pieces else g for k, g in enumerate(given)
                ]
                return float(target(*real, **kwargs))
        first, second = [*given, None, None][:2]
        if (target in _ZERO_ON_THE_RIGHT and _is(second, 0)) or (
            target in _ONE_ON_THE_RIGHT and _is(second, 1)
        ):
            return (0,)
        if (target is aten.add.Tensor and _is(first, 0) and not kwargs) or (
            target is aten.mul.Tensor and _is(first, 1)
        ):
            return (1,)
        if target is aten.where.self:
            return torch.where(*given)
        for k, piece in pieces.items():
            if isinstance(piece, float) and (k == 0 or target not in _SCALARS_RIGHT):
                given[k] = torch.full((), piece, dtype=self.dtype)
        return target(*given, **kwargs)

    def _known(self, names: Names) -> Names | None:
        """The truth of each column, where all are constants."""
        found = []
        for name in names.tolist():
            source = self.sources[name // _WIDTH]
            if isinstance(source.value, float):
                found.append(source.value != 0)
            elif source.real is not None:
                with _disable_current_modes():
                    found.append(bool(source.real.reshape(-1)[name % _WIDTH]))
            else:
                return None
        return np.array(found)

    def numbers(self, shape: Sequence[int], dim: int) -> Tensor:
        """0, 1, 2 … along an axis."""
        with _disable_current_modes():
            numbers = torch.arange(shape[dim], dtype=self.dtype)
            return numbers.view([-1 if d == dim else 1 for d in range(len(shape))])

    def reshape(self, row: Row, shape: Sequence[int]) -> Row:
        """The same columns in another shape."""
        return Row(row.columns.reshape(small(shape)), tuple(shape))


def _is(value: object, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


_ZERO_ON_THE_RIGHT = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
_ONE_ON_THE_RIGHT = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


_SCALARS_RIGHT = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_SCALARS_TOO = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self,
    aten.maximum.default, aten.minimum.default, aten.pow.Tensor_Tensor, aten.le.Tensor,
}  # fmt: skip


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


def _with_batch(small: Sequence[int], rows: list[Row]) -> tuple[int, ...]:
    """A shape with the batch where one of the rows, and no broadcast, has it."""
    row = max(rows, key=lambda r: len(r.shape))
    axis = row.axis - len(row.shape)
    return tuple(n * ROWS if k - len(small) == axis else n for k, n in enumerate(small))


def small(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the batch: 1 in its place, or what it is multiplied with."""
    return tuple(size // ROWS if size and size % ROWS == 0 else size for size in shape)

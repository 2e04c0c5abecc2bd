"""The rows of a batch on the page: which ones, their labels, and how little their data repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unrolled.tracing.indexing import normalize_index

# If no rows are chosen, the page has several only if it stays small and is quickly written.
MAX_ROWS = 8
MAX_STEPS = 300  # of all rows together: each step runs again, which takes time
_SHARE_OF_LIMIT = 3  # one third of the values that a page may have
_SHARED_PARTS = ("diagram", "program")  # of a layer's data: their entries are compared one by one


@dataclass(frozen=True)
class RowChoice:
    """The rows that a page may have.

    Attributes:
        rows: Their numbers in the batch.
        is_chosen: Whether the caller has chosen them. Otherwise, the page has as many as fit.
        is_single: Whether labels and predictions are those of one row, not a list for each row.
    """

    rows: tuple[int, ...]
    is_chosen: bool
    is_single: bool

    @classmethod
    def of(
        cls,
        batch: int | Iterable[int] | None,
        lengths: Sequence[int],
        texts: Iterable[list[Any] | None],
        bad: int | None = None,
    ) -> RowChoice:
        """Choose rows.

        Args:
            batch: The row, or several rows, or None for the first rows.
            lengths: The number of time steps of each row of the batch.
            texts: The labels and predictions. If they are for one row, and no row is chosen, it is row 0.
            bad: A row with an error. If no rows are chosen, and it isn't one of the first that fit, it comes
                before them.

        Raises:
            IndexError: If there is no such row.
            TypeError: If ``batch`` is something else.
            ValueError: If a row has no time steps, or ``batch`` is empty or repeats a row.
        """
        if batch is None:
            is_single = len(lengths) == 1 or any(one is not None and not is_nested(one) for one in texts)
            first = range(len(lengths))[:1] if is_single else range(len(lengths))
            rows = tuple(row for row in first if lengths[row])[:MAX_ROWS]
            if not rows:
                raise ValueError("a page needs a row with time steps, but this trace has none")
            if bad is not None and not is_single:
                steps = itertools.accumulate(lengths[row] for row in rows)
                if bad not in [row for row, total in zip(rows, steps, strict=True) if total <= MAX_STEPS]:
                    rows = (bad, *(row for row in rows if row != bad))[:MAX_ROWS]
            return cls(rows, False, is_single)
        several = None if isinstance(batch, str) or not isinstance(batch, Iterable) else list(batch)
        numbers: list[Any] = [batch] if several is None else several
        rows = tuple(normalize_index("row", number, len(lengths)) for number in numbers)
        if not rows:
            raise ValueError("batch should have at least one row, got none")
        if len(set(rows)) < len(rows):
            raise ValueError(f"batch should have each row once, got {', '.join(map(str, rows))}")
        for row in rows:
            if lengths[row] == 0:
                raise ValueError(f"row {row} has no time steps: choose another row with batch=")
        return cls(rows, True, several is None)

    def texts(
        self, name: str, values: list[Any] | None, lengths: Sequence[int]
    ) -> dict[int, list[str] | None]:
        """Return the labels or predictions of each row, one for each time step.

        Args:
            name: The name of the argument, for error messages.
            values: The argument: those of the one row, or a list for each chosen row, or for each row of the
                batch if none are chosen.
            lengths: The number of time steps of each row of the batch.

        Raises:
            TypeError: If there is no list for each row.
            ValueError: If the number of lists or of entries is wrong.
        """
        if values is None:
            return dict.fromkeys(self.rows)
        if self.is_single:
            (row,) = self.rows
            return {row: _texts(name, values, lengths[row])}
        listed = self.rows if self.is_chosen else range(len(lengths))
        if len(values) != len(listed):
            raise ValueError(f"{name} should have one list per row ({len(listed)}), got {len(values)}")
        by_row = dict(zip(listed, values, strict=True))
        return {
            row: _texts(f"{name} of row {row}", as_list(f"{name} of row {row}", by_row[row]), lengths[row])
            for row in self.rows
        }

    def fitting(
        self, lengths: Sequence[int], sizes: Iterable[tuple[int, int]], limit: int
    ) -> tuple[int, ...]:
        """Return the rows whose numbers fit on the page: all that were chosen, else at least one.

        Args:
            lengths: The number of time steps of each row of the batch.
            sizes: For each layer, the number of its parameters and of the values of a step.
            limit: The maximum number of values of a layer.
        """
        if self.is_chosen:
            return self.rows
        per_layer, steps = list(sizes), 0
        for count, row in enumerate(self.rows):
            steps += lengths[row]
            is_too_large = any(
                weights + per_step * steps > limit // _SHARE_OF_LIMIT for weights, per_step in per_layer
            )
            if count and (steps > MAX_STEPS or is_too_large):
                return self.rows[:count]
        return self.rows


def as_list(name: str, values: Any) -> list[Any]:
    """Return an argument with an entry for each time step, or a list for each row, as a list.

    Raises:
        TypeError: If it can't be one.
    """
    if isinstance(values, (bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} should be an iterable of strings, one per time step, got {type(values).__name__}"
        )
    return list(values)


def is_nested(values: list[Any]) -> bool:
    """Whether the entries are lists, one for each row."""
    return bool(values) and all(isinstance(value, (list, tuple)) for value in values)


def _texts(name: str, values: list[Any], length: int) -> list[str]:
    if len(values) != length:
        raise ValueError(f"{name} should have one entry per time step ({length}), got {len(values)}")
    return [str(value) for value in values]


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a row's data that differ from those of another row.

    The page merges them again, in ``rows.js``. What is the same, such as the parameters and the program of a
    step, is stored once.

    Args:
        first: The data of the first row.
        other: The data of the other row, with the same layers.
    """
    result = _different(first, other)
    result["layers"] = [
        _layer_differences(a, b) for a, b in zip(first["layers"], other["layers"], strict=True)
    ]
    return result


def _layer_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = _different(first, other)
    return result | {name: _different(first[name], other[name]) for name in _SHARED_PARTS if name in result}


def _different(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in other.items() if name not in first or value != first[name]}

"""The Python values that a step reads: options, class attributes, globals, closures, default arguments.

A captured graph contains these values as constants, so it is valid only as long as they stay the same.
``value_search.py`` finds them, and ``watched_values.py`` notices when one is replaced.
"""

from __future__ import annotations

import hashlib
from typing import Any

from unrolled.cells.base import Cell
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.value_search import ValueSearch

MAX_VERSIONS = 8  # of the values of a cell for which its step is captured


class StepValues:
    """The values that a cell's step reads, at one moment.

    Args:
        cell: The cell. It may be wrapped, and its parameters may be bound.

    Attributes:
        digest: A text that is the same for equal values.
        derived: What an engine derives from the cell with these values.
        changed: Path of the first value that differs from those before.

    Raises:
        UnsupportedError: If there are too many values.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = _plain_cell(cell)
        self.derived: dict[object, Any] = {}
        self.changed = ""
        self._search = self._read()
        self.digest = _digest(self._search)

    def _read(self) -> ValueSearch:
        names = frozenset[str]()
        while True:  # each function that is found may name further attributes
            search = ValueSearch(self._cell, names)
            if search.names == names:
                return search
            names = frozenset(search.names)

    @property
    def only_here(self) -> str:
        """Path of a value that may be another one in another process; see :class:`ValueSearch`."""
        return self._search.only_here

    def unchanged(self) -> bool:
        """Return whether the values are still the same. It takes about 1 µs unless one was replaced."""
        if self._search.watched.unchanged():
            return True
        search = self._read()
        if _digest(search) != self.digest:
            return False
        self._search = search  # other objects with equal values
        return True

    def difference(self, other: StepValues) -> str:
        """Return the path of a value that differs."""
        mine, others = self._search.contents, other._search.contents
        return next(path for path in {**others, **mine} if mine.get(path) != others.get(path))


def _digest(search: ValueSearch) -> str:
    return hashlib.sha256(repr([*search.contents.items()]).encode()).hexdigest()[:32]


def step_values(cell: Cell) -> StepValues:
    """Return the values that a cell's step reads now; the same object as before if they are the same.

    Raises:
        UnsupportedError: If there are too many values.
    """
    cache = cell.__dict__["_engine_cache"]  # the cell's bound copies share it
    values: StepValues | None = cache.get("values")
    if values is not None and values.unchanged():
        return values
    if "error" in cache:
        raise UnsupportedError(cache["error"])
    try:
        new = StepValues(cell)
    except UnsupportedError as error:
        raise reject(cell, str(error)) from None
    new.changed = "" if values is None else new.difference(values)
    cache["values"] = new
    return new


def reject(cell: Cell, reason: str) -> UnsupportedError:
    """Return an UnsupportedError, which :func:`step_values` will raise for the cell from now on."""
    cache = cell.__dict__["_engine_cache"]
    cache["error"] = reason
    cache.pop("values", None)
    return UnsupportedError(reason)


def count_version(cell: Cell, values: StepValues, contents: str = "") -> None:
    """Count the different values for which a cell's step is captured.

    Args:
        cell: The cell.
        values: The values that its step reads.
        contents: A digest of tensors whose values are constants, if they differ from those before.

    Raises:
        UnsupportedError: If there are more than ``MAX_VERSIONS``.
    """
    digests: set[str] = cell.__dict__["_engine_cache"].setdefault("digests", set())
    digest = values.digest + contents
    if digest not in digests and len(digests) == MAX_VERSIONS:
        if contents:
            raise UnsupportedError(f"tensors that its step uses as indices have changed {MAX_VERSIONS} times")
        raise UnsupportedError(
            f"values that its step reads have changed {MAX_VERSIONS} times, now {values.changed}: make a "
            "value that changes often a tensor that is an attribute of the cell, or part of the input"
        )
    digests.add(digest)


BY_REFERENCE = "now has to run the step again"  # for gradients of gradients, for instance


def check_same_values(cell: Cell, digest: str, reason: str) -> None:
    """Raise RuntimeError unless a cell's step still reads the same values.

    Args:
        cell: The cell.
        digest: Digest of the values, see :class:`StepValues`.
        reason: Why they must be the same.
    """
    values = step_values(cell)
    if values.digest != digest:
        raise RuntimeError(
            f"{type(cell.innermost).__name__}: {values.changed or 'a value that its step reads'} has changed "
            f"since the graph was created, which {reason}"
        )


def _plain_cell(cell: Cell) -> Cell:
    """Return a cell without its wrappers and its tensors."""
    cell = cell.innermost
    while "unbound" in cell.__dict__:
        cell = cell.__dict__["unbound"].innermost
    return cell

"""Python values with the places where they are stored, to notice cheaply when one is replaced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


class WatchedValues:
    """Places in memory, and the objects that were found there."""

    def __init__(self) -> None:
        self._conditions: list[str] = []  # expressions that are true as long as nothing is replaced
        self._names: dict[str, Any] = {}  # the objects that the conditions name
        self._unchanged: Callable[[], bool] | None = None

    def unchanged(self) -> bool:
        """Return whether the same objects are still there."""
        if self._unchanged is None:
            # A compiled expression takes half the time of a loop over the places.
            condition = " and ".join(self._conditions) or "True"
            self._unchanged = eval(f"lambda: {condition}", self._names)
        try:
            return self._unchanged()
        except Exception:  # a key or an attribute is gone; code of the user may raise anything
            return False

    def item(self, mapping: Any, key: Any) -> Any:
        """Watch an item of a dictionary, and return it."""
        value = mapping[key]
        self._watch("{}[{}] is {}", mapping, key, value)
        return value

    def attribute(self, owner: Any, name: str) -> Any:
        """Watch an attribute, whose name is an identifier, and return it.

        Raises:
            AttributeError: If there is none.
        """
        value = getattr(owner, name)
        self._watch(f"{{}}.{name} is {{}}", owner, value)
        return value

    def size(self, collection: Any) -> None:
        """Watch the number of items of a collection."""
        self._watch("len({}) == {}", collection, len(collection))

    def sequence(self, values: Any) -> None:
        """Watch all items of a list or another collection, and their order."""
        copy = [*values]
        self.size(values)
        self._watch("all(map({}, {}, {}))", operator.is_, values, copy)

    def result(self, read: Callable[[], Any]) -> Any:
        """Watch the object that a function returns, and return it."""
        value = read()
        self._watch("{}() is {}", read, value)
        return value

    def content(self, read: Callable[[], Any]) -> Any:
        """Watch a value that a function computes, compared with ``==``, and return it."""
        value = read()
        self._watch("{}() == {}", read, value)
        return value

    def _watch(self, condition: str, *objects: Any) -> None:
        names = [f"_{len(self._names) + k}" for k in range(len(objects))]
        self._names.update(zip(names, objects, strict=True))
        self._conditions.append(condition.format(*names))
        self._unchanged = None

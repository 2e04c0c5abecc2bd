"""Python values with the places where they are stored, to notice cheaply when one is replaced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


class WatchedValues:
    """Places in memory, and the objects that were found there."""

    def __init__(self) -> None:
        self._items: list[tuple[Any, Any, Any]] = []  # a dictionary, a key and the item
        self._attributes: list[tuple[Any, str, Any]] = []  # an object, a name and the attribute
        self._sizes: list[tuple[Any, int]] = []  # a collection and its number of items
        self._contents: list[tuple[Callable[[], Any], Any]] = []  # a function and what it returned

    def unchanged(self) -> bool:
        """Return whether the same objects are still there."""
        try:
            for mapping, key, item in self._items:
                if mapping[key] is not item:
                    return False
            for collection, size in self._sizes:
                if len(collection) != size:
                    return False
            for owner, name, attribute in self._attributes:
                if getattr(owner, name) is not attribute:
                    return False
            for read, content in self._contents:
                if read() != content:
                    return False
        except Exception:  # a key or an attribute is gone; code of the user may raise anything
            return False
        return True

    def item(self, mapping: Any, key: Any) -> Any:
        """Watch an item of a dictionary, and return it."""
        value = mapping[key]
        self._items.append((mapping, key, value))
        return value

    def attribute(self, owner: Any, name: str) -> Any:
        """Watch an attribute, and return it.

        Raises:
            AttributeError: If there is none.
        """
        value = getattr(owner, name)
        self._attributes.append((owner, name, value))
        return value

    def size(self, collection: Any) -> None:
        """Watch the number of items of a collection."""
        self._sizes.append((collection, len(collection)))

    def sequence(self, values: Any) -> None:
        """Watch all items of a list or another collection, and their order."""
        copy = [*values]
        self.size(values)
        self._contents.append((lambda: all(map(operator.is_, values, copy)), True))

    def content(self, read: Callable[[], Any]) -> Any:
        """Watch a value that a function computes, compared with ``==``, and return it."""
        value = read()
        self._contents.append((read, value))
        return value

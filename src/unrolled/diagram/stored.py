"""Placements of the library's cells, found by a longer search than there is time for when drawing."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files

from unrolled.diagram.lanes import Wiring
from unrolled.diagram.routing import Placement

FILE = "placements.json"


def wiring_key(wiring: Wiring) -> str:
    """Return a key that wirings share only if they are equal."""
    return hashlib.sha256(repr(wiring).encode()).hexdigest()[:16]


def stored_placement(wiring: Wiring) -> Placement | None:
    """Return the stored placement of a wiring, or None.

    Args:
        wiring: The wiring. If it changes, because its cell does, its placement is searched for again.
    """
    found = _stored().get(wiring_key(wiring))
    return None if found is None else Placement(*(tuple(part) for part in found))


@cache
def _stored() -> dict[str, list[list[int]]]:
    loaded: dict[str, list[list[int]]] = json.loads(files("unrolled.diagram").joinpath(FILE).read_text())
    return loaded

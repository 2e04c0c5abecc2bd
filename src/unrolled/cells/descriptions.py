"""Descriptions of a cell's quantities, from its docstring."""

from __future__ import annotations

import inspect
import re

from unrolled.cells.base import Cell


def quantity_descriptions(cell: type[Cell]) -> dict[str, str]:
    """Return the descriptions of the quantities in the section ``Quantities:`` of the cell's docstring."""
    section = re.search(r"^Quantities:\n((?:[ ]+.*\n?)+)", inspect.getdoc(cell) or "", re.MULTILINE)
    lines = section[1].splitlines() if section else []
    entries = (line.strip().partition(": ") for line in lines)
    return {name: description for name, _, description in entries}

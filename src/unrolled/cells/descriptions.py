"""Descriptions of a cell, of its options and of its quantities, from its docstring."""

from __future__ import annotations

import inspect
import re
import textwrap

from unrolled.cells.base import Cell

_SECTION = re.compile(r"^(Options|Quantities):\n((?:[ ]+.*(?:\n|\Z))+)", re.MULTILINE)


def option_descriptions(cell: type[Cell]) -> dict[str, str]:
    """Return the descriptions of the options in the section ``Options:`` of the cell's docstring."""
    return _section(cell, "Options")


def quantity_descriptions(cell: type[Cell]) -> dict[str, str]:
    """Return the descriptions of the quantities in the section ``Quantities:`` of the cell's docstring."""
    return _section(cell, "Quantities")


def docstring_paragraphs(cell: type[Cell]) -> list[str]:
    """Return the paragraphs of the cell's docstring that belong to neither of these sections."""
    text = _SECTION.sub("", _docstring(cell)).replace("``", "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def _docstring(cell: type[Cell]) -> str:
    return (inspect.getdoc(cell) or "") if cell.__doc__ else ""


def _section(cell: type[Cell], title: str) -> dict[str, str]:
    entries: list[list[str]] = []
    for name, body in _SECTION.findall(inspect.getdoc(cell) or ""):
        for line in textwrap.dedent(body).splitlines() if name == title else ():
            if line.startswith(" ") and entries:  # the entry goes on
                entries[-1].append(line.strip())
            else:
                entries.append([line.strip()])
    pairs = (" ".join(lines).partition(": ") for lines in entries)
    return {name: description for name, _, description in pairs}

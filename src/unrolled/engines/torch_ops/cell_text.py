"""Cells as text, the form in which torch's graphs and their files hold them, and the cells of such texts."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import CellWrapper, wrap

_cells: dict[str, Cell] = {}
_local: dict[object, str] = {}  # texts of cells that no other process can make, by identity
_lock = threading.Lock()


def text_of(cell: Cell, training: bool) -> str:
    """A text that stands for a cell in this mode, without its tensors: its class, sizes and options.

    Where the class is a module's, and the options are numbers and texts, the text can be read in another
    process too.
    """
    whole, cell = cell, cell.innermost
    cls = type(cell)
    what: dict[str, Any] = {
        "cell": f"{cls.__module__}:{cls.__qualname__}",
        "input": cell.input,
        "hidden": cell.hidden,
        "bias": cell.bias,
        "options": cell.chosen_options(),
        "training": training,
    }
    if isinstance(whole, CellWrapper):
        what["variants"] = json.loads(json.dumps(whole.chain))  # lists, as they will be read
    try:
        text = json.dumps(what)
        exact = json.loads(text) == what and _class(what["cell"]) is cls
    except (TypeError, ValueError):
        exact = False
    if not exact:
        with _lock:
            number = _local.setdefault((whole.identity(), training), str(len(_local)))
        text = json.dumps({**what, "options": repr(what["options"]), "only here": number})
    if text not in _cells:
        made = whole.bind({})
        made.training = training
        _cells[text] = made
    return text


def cell_of(text: str) -> Cell:
    """The cell that a text stands for.

    Raises:
        ValueError: its class is of a module that isn't imported, or it is a cell of another process.
    """
    found = _cells.get(text)
    if found is not None:
        return found
    what = json.loads(text)
    if "only here" in what:
        raise ValueError(
            f"this graph uses the cell {what['cell']} with the options {what['options']}, which exists in "
            "the process that made the graph only: define the class in a module, with options that are "
            "numbers or texts, to load the graph elsewhere"
        )
    cls = _class(what["cell"])
    made: Cell = cls(what["input"], what["hidden"], bias=what["bias"], **what["options"])
    made = wrap(made, _tuples(what.get("variants", ())))
    made.training = what["training"]
    return _cells.setdefault(text, made)


def _tuples(given: Any) -> Any:
    return tuple(map(_tuples, given)) if isinstance(given, (list, tuple)) else given


def _class(name: str) -> type[Cell]:
    """A class by its module and name. No module is imported: a file is not to choose what runs."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    if found is None:
        raise ValueError(f"this graph uses the cell {path} of the module {module}: import {module} first")
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Cell)):
        raise ValueError(f"this graph uses the cell {path} of the module {module}, which has no such cell")
    return found

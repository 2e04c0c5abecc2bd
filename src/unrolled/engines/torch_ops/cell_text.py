"""Cells as JSON text, the form in which torch graphs and exported programs store them."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import CellWrapper, wrap
from unrolled.engines.fork_safety import renew_after_fork

_cells: dict[str, Cell] = {}
_process_local: dict[object, str] = {}  # by identity: numbers of cells that no other process can construct
_lock = threading.Lock()


def serialize_cell(cell: Cell, training: bool) -> str:
    """Return a text that describes a cell without its tensors: class, sizes, options and mode.

    Another process can read the text if the class is defined at the top level of a module and all options
    are numbers or strings.
    """
    outer, cell = cell, cell.innermost
    cls = type(cell)
    description: dict[str, Any] = {
        "cell": f"{cls.__module__}:{cls.__qualname__}",
        "input": cell.input,
        "hidden": cell.hidden,
        "bias": cell.bias,
        "options": cell.chosen_options(),
        "training": training,
    }
    if isinstance(outer, CellWrapper):
        description["variants"] = json.loads(json.dumps(outer.spec))  # tuples become lists, as in JSON
    try:
        text = json.dumps(description)
        is_portable = json.loads(text) == description and _find_class(description["cell"]) is cls
    except (TypeError, ValueError):
        is_portable = False
    if not is_portable:
        with _lock:
            number = _process_local.setdefault((outer.identity(), training), str(len(_process_local)))
        text = json.dumps({**description, "options": repr(description["options"]), "only here": number})
    if text not in _cells:
        unbound = outer.bind({})
        unbound.training = training
        _cells[text] = unbound
    return text


def deserialize_cell(text: str) -> Cell:
    """Return the cell that a text describes.

    Raises:
        ValueError: If the module of its class is not imported, or the cell exists in another process only.
    """
    cell = _cells.get(text)
    if cell is not None:
        return cell
    description = json.loads(text)
    if "only here" in description:
        raise ValueError(
            f"this graph uses the cell {description['cell']} with the options {description['options']}, "
            "which exists only in the process that created the graph. To load the graph elsewhere, define "
            "the class at the top level of a module, with options that are numbers or strings"
        )
    cls = _find_class(description["cell"])
    cell = cls(
        description["input"], description["hidden"], bias=description["bias"], **description["options"]
    )
    cell = wrap(cell, _lists_to_tuples(description.get("variants", ())))
    cell.training = description["training"]
    return _cells.setdefault(text, cell)


def _lists_to_tuples(value: Any) -> Any:
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, (list, tuple)) else value


def _find_class(name: str) -> type[Cell]:
    """Return a class by module and name. It imports nothing: a file must not decide which code runs."""
    module_name, _, path = name.partition(":")
    value: Any = sys.modules.get(module_name)
    if value is None:
        raise ValueError(
            f"this graph uses the cell {path} of the module {module_name}: import {module_name} first"
        )
    for part in path.split("."):
        value = getattr(value, part, None)
    if not (isinstance(value, type) and issubclass(value, Cell)):
        raise ValueError(
            f"this graph uses the cell {path} of the module {module_name}, but the module has no such cell"
        )
    return value


@renew_after_fork
def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()

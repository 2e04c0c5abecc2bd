"""Cells as JSON text, the form in which torch graphs and exported programs store them."""

from __future__ import annotations

import json
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import CellWrapper, wrap
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.step_values import step_values
from unrolled.engines.fork_safety import renew_after_fork

_MAX_CELLS = 1000
_cells: weakref.WeakValueDictionary[str, GraphCell] = weakref.WeakValueDictionary()
_recent: dict[str, GraphCell] = {}  # keeps the last cells alive
_lock = threading.Lock()
_JSON_TYPES = {int, float, bool, str, type(None)}


class GraphCell:
    """A cell in a torch graph. It keeps the values that its step read when the graph was created.

    Attributes:
        cell: The cell, without tensors.
        values: The values that its step read.
        compiled: The compiled cell by default dtype and dtype.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell, self.values = cell, step_values(cell)
        self.compiled: dict[object, CompiledCell] = {}


def serialize_cell(cell: Cell, training: bool) -> str:
    """Return a text that describes a cell without its tensors: class, sizes, options and mode.

    Another process can read the text if the class is defined at the top level of a module and all options
    are numbers or strings. In this process, the text also stands for the values that the step reads now.

    Raises:
        UnsupportedError: If the step may read too many values.
    """
    values = step_values(cell)
    key = ("text", cell._wrapper_spec, training)
    stored: tuple[str, GraphCell] | None = values.derived.get(key)
    if stored is not None:
        _keep(*stored)  # not that of an equal cell, whose values may have changed since
        return stored[0]
    outer, cell = cell, cell.innermost
    cls = type(cell)
    description: dict[str, Any] = {
        "cell": f"{cls.__module__}:{cls.__qualname__}",
        "input": cell.input,
        "hidden": cell.hidden,
        "bias": cell.bias,
        "options": cell.chosen_options(),
        "training": training,
        "values": values.digest,
    }
    if isinstance(outer, CellWrapper):
        description["variants"] = outer.spec
    try:
        is_portable = _is_json(description["options"]) and _find_class(description["cell"]) is cls
    except ValueError:
        is_portable = False
    if not is_portable:
        description |= {"options": repr(description["options"]), "only here": True}
    text = json.dumps(description)
    unbound = outer.bind({})
    unbound.training = training
    graph_cell = _keep(text, GraphCell(unbound))
    values.derived[key] = text, graph_cell
    return text


def check_constants(cell: Cell, constants: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedError if constants of a cell's loops aren't described by its text.

    Args:
        cell: The cell.
        constants: Its tensor attributes that are constants of its loops, by name.
    """
    for name in constants.keys() & vars(cell.innermost).keys():
        raise UnsupportedError(
            f"in a graph, its attribute {name}, which it uses as an index, must belong to its class"
        )


def deserialize_cell(text: str) -> GraphCell:
    """Return the cell that a text describes.

    Raises:
        ValueError: If the module of its class is not imported, or the cell exists in another process only.
    """
    graph_cell = _cells.get(text)
    if graph_cell is not None:
        return _keep(text, graph_cell)
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
    return _keep(text, GraphCell(cell))


def _keep(text: str, graph_cell: GraphCell) -> GraphCell:
    """Keep the cell of a text alive, and return it."""
    with _lock:
        _cells[text] = graph_cell
        _recent.pop(text, None)
        _recent[text] = graph_cell
        while len(_recent) > _MAX_CELLS:
            del _recent[next(iter(_recent))]
    return graph_cell


def _is_json(value: Any) -> bool:
    """Return whether a value is the same after a round trip through JSON, and so are its types."""
    if type(value) is list:
        return all(map(_is_json, value))
    if type(value) is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())
    return type(value) in _JSON_TYPES


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

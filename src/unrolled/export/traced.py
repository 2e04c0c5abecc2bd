"""What the values of a model's graph are, while it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from unrolled.export.errors import ExportError
from unrolled.export.program import Value
from unrolled.export.stateless import Call
from unrolled.export.supported import KEEP_FEATURES, input_features


@dataclass
class Traced:
    """A value of the graph.

    Attributes:
        content: What it is in each time step.
        axes: For each of its axes the axis of the model's input. An embedding adds axis 2.
        padded: Number of zeros before the first time step.
        surplus: Number of time steps after the last one.
    """

    content: Call | Value
    axes: tuple[int, int, int]
    padded: int = 0
    surplus: int = 0


@dataclass
class LayerResult:
    """What a layer returns: its output and its final state."""

    name: str
    output: Traced


@dataclass
class FinalState:
    """The final state of a layer."""

    name: str


def location(node: fx.Node) -> str:
    """Return the line of the model's code that a node comes from, in parentheses."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [(path, line) for path, line in lines if "/torch/" not in path]
    return f" ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else ""


def input_width(model: nn.Module, graph: fx.Graph) -> int:
    """Return the number of features of a model's input, as the first module that reads it says.

    Raises:
        ExportError: If no module says it.
    """
    same: set[Any] = set()  # nodes with as many features
    for node in graph.nodes:
        if node.op == "placeholder":
            same |= set() if same else {node}
        elif node.args and node.args[0] in same:
            module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Embedding):
                return 1
            if module is not None and (features := input_features(module)) is not None:
                return features
            if module is not None and not isinstance(module, KEEP_FEATURES):
                return 1  # the module can't be exported; the error names it
            same.add(node)
    raise ExportError(f"none of the modules of {type(model).__name__} has a fixed number of input features")

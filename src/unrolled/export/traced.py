"""What the values of a model's graph are, while it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from unrolled.export.program import Value
from unrolled.export.stateless import Call


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

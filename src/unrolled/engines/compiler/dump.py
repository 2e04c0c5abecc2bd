"""A captured step and its split, written out for a reader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines.compiler.capture import Captured
from unrolled.engines.compiler.ir import BATCH_SYMBOL
from unrolled.engines.compiler.partition import LoopPartition

_COLUMN = 72  # where the shapes stand


@dataclass(frozen=True)
class Listing:
    """What ``UNROLLED_LOG=graph`` prints: every node once, under the place where it is computed.

    Parameters, states and the input have the names of the cell; ``B`` stands for the batch.
    """

    cell: Cell
    dtype: torch.dtype
    captured: Captured
    forward: LoopPartition
    backward: LoopPartition

    def __str__(self) -> str:
        names = self._names()
        lines = [f"{type(self.cell.innermost).__name__}, {self.dtype}"]
        for title, part in (("forward", self.forward), ("backward", self.backward)):
            for place, nodes in (
                ("before the loop, once for all time steps", part.before),
                ("in the loop", part.loop),
                ("after the loop, once for all time steps", part.after),
            ):
                if nodes:
                    lines.append(f"{title}, {place}:")
                    lines += [f"  {_line(node, names)}" for node in nodes]
            if part.loop:
                lines.append(f"  reads {_listed(part.reads, names)}")
                lines.append(f"  keeps {_listed(part.keeps, names)}")
                carried = [
                    f"{names[old]} <- {names[new]}" for old, new in zip(part.old, part.new, strict=True)
                ]
                lines.append(f"  carries {', '.join(carried)}")
        return "\n".join(lines)

    def _names(self) -> dict[fx.Node, str]:
        captured = self.captured
        names = {node: node.name for node in captured.graph.nodes}
        states = list(self.cell.state)
        names |= dict(zip(captured.params, (*self.cell.shapes(), "columns"), strict=False))
        names |= dict(zip(captured.states, states, strict=True))
        names |= dict(zip(captured.carries, (f"grad_{name}" for name in states), strict=True))
        return names | {captured.x: "x", captured.grad_output: "grad_output"}


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    function = str(node.target).removeprefix("aten.").removesuffix(".default")
    given = [_argument(value, names) for value in node.args]
    given += [f"{name}={_argument(value, names)}" for name, value in node.kwargs.items()]
    text = f"{names[node]} = {function}({', '.join(given)})"
    return f"{text:<{_COLUMN}} {_shape(node.meta['val'])}"


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(part, names) for part in value)}]"
    return "B" if type(value) is int and value == BATCH_SYMBOL else str(value)


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f"({', '.join('B' if size == BATCH_SYMBOL else str(size) for size in value.shape)})"


def _listed(nodes: Iterable[fx.Node], names: dict[fx.Node, str]) -> str:
    return ", ".join(names[node] for node in nodes) or "nothing"

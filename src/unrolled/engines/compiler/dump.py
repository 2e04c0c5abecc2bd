"""Print a captured step and its partitions, for ``UNROLLED_LOG=graph``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines.compiler.capture import CapturedStep
from unrolled.engines.compiler.ir import BATCH_SYMBOL
from unrolled.engines.compiler.partition import LoopPartition

_SHAPE_COLUMN = 72  # text column at which shapes begin


@dataclass(frozen=True)
class GraphDump:
    """Text form of a captured step: each node once, below the part of the program that computes it.

    The text is built only by ``str()``, so that logging costs nothing if it is off. Parameters, states and
    the input have the cell's names, and ``B`` is the batch size.
    """

    cell: Cell
    dtype: torch.dtype
    captured: CapturedStep
    forward: LoopPartition
    backward: LoopPartition

    def __str__(self) -> str:
        names = self._names()
        lines = [f"{type(self.cell.innermost).__name__}, {self.dtype}"]
        for direction, part in (("forward", self.forward), ("backward", self.backward)):
            for position, nodes in (
                ("before the loop, once for all time steps", part.prologue),
                ("in the loop", part.loop),
                ("after the loop, once for all time steps", part.epilogue),
            ):
                if nodes:
                    lines.append(f"{direction}, {position}:")
                    lines += [f"  {_line(node, names)}" for node in nodes]
            if part.loop:
                lines.append(f"  reads {_join(part.inputs, names)}")
                lines.append(f"  keeps {_join(part.saved, names)}")
                states = zip(part.old_states, part.new_states, strict=True)
                lines.append(f"  carries {', '.join(f'{names[old]} <- {names[new]}' for old, new in states)}")
        return "\n".join(lines)

    def _names(self) -> dict[fx.Node, str]:
        captured = self.captured
        names = {node: node.name for node in captured.graph.nodes}
        states = list(self.cell.state)
        names |= dict(zip(captured.params, (*self.cell.shapes(), "extra_inputs"), strict=False))
        names |= dict(zip(captured.states, states, strict=True))
        names |= dict(zip(captured.carries, (f"grad_{name}" for name in states), strict=True))
        return names | {captured.x: "x", captured.grad_output: "grad_output"}


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    function = str(node.target).removeprefix("aten.").removesuffix(".default")
    arguments = [_argument(value, names) for value in node.args]
    arguments += [f"{name}={_argument(value, names)}" for name, value in node.kwargs.items()]
    text = f"{names[node]} = {function}({', '.join(arguments)})"
    return f"{text:<{_SHAPE_COLUMN}} {_shape(node.meta['val'])}"


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    return "B" if type(value) is int and value == BATCH_SYMBOL else str(value)


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f"({', '.join('B' if size == BATCH_SYMBOL else str(size) for size in value.shape)})"


def _join(nodes: Iterable[fx.Node], names: dict[fx.Node, str]) -> str:
    return ", ".join(names[node] for node in nodes) or "nothing"

"""Print a captured step and its partitions, for ``UNROLLED_LOG=graph``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines.compiler.capture import CapturedStep
from unrolled.engines.compiler.ir import BATCH_SYMBOL, label
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
        lines = [f"{type(self.cell.innermost).__name__}, {self.dtype}"]
        for direction, part in (("forward", self.forward), ("backward", self.backward)):
            for position, nodes in (
                ("before the loop, once for all time steps", part.prologue),
                ("in the loop", part.loop),
                ("after the loop, once for all time steps", part.epilogue),
            ):
                if nodes:
                    lines.append(f"{direction}, {position}:")
                    lines += [f"  {_line(node)}" for node in nodes]
            if part.loop:
                lines.append(f"  reads {_join(part.inputs)}")
                lines.append(f"  keeps {_join(part.saved)}")
                states = zip(part.old_states, part.new_states, strict=True)
                lines.append(f"  carries {', '.join(f'{label(old)} <- {label(new)}' for old, new in states)}")
        return "\n".join(lines)


def label_inputs(cell: Cell, captured: CapturedStep) -> None:
    """Label the inputs of a captured step with the names that the cell gives them."""
    states = list(cell.state)
    labels = dict(zip(captured.params, (*cell.shapes(), "extra_inputs"), strict=False))
    labels |= dict(zip(captured.states, states, strict=True))
    labels |= dict(zip(captured.carries, (f"grad_{name}" for name in states), strict=True))
    for node, name in (labels | {captured.x: "x", captured.grad_output: "grad_output"}).items():
        node.meta["label"] = name


def _line(node: fx.Node) -> str:
    function = str(node.target).removeprefix("aten.").removesuffix(".default")
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    text = f"{label(node)} = {function}({', '.join(arguments)})"
    return f"{text:<{_SHAPE_COLUMN}} {_shape(node.meta['val'])}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return label(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item) for item in value)}]"
    return "B" if type(value) is int and value == BATCH_SYMBOL else str(value)


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f"({', '.join('B' if size == BATCH_SYMBOL else str(size) for size in value.shape)})"


def _join(nodes: Iterable[fx.Node]) -> str:
    return ", ".join(map(label, nodes)) or "nothing"

"""Print a captured step, its partitions and its saved values, for ``UNROLLED_LOG=graph,saved``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines.compiler.capture import CapturedStep
from unrolled.engines.compiler.ir import BATCH_SYMBOL, is_batched, label
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


@dataclass(frozen=True)
class SavedDump:
    """The values that a training call stores for its backward pass, as text, without input and parameters.

    The text is built only by ``str()``. ``B`` is the number of rows of all time steps.

    Attributes:
        name: Name of the cell.
        dtype: Dtype of the loop.
        states: States whose values of all steps are stored.
        values: All other stored values.
    """

    name: str
    dtype: torch.dtype
    states: Sequence[fx.Node]
    values: Sequence[fx.Node]

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.dtype}"]
        lines += [f"  {_with_shape(label(state), state)}" for state in self.states]
        lines += [f"  {_line(value)}" for value in self.values]
        per_row = per_call = 0
        for node in (*self.states, *self.values):
            value = node.meta["val"]
            if is_batched(node):  # bools are stored in the dtype of the loop
                per_row += math.prod(value.shape) // BATCH_SYMBOL * self.dtype.itemsize
            else:
                per_call += value.numel() * value.dtype.itemsize
        once = f", and {per_call} bytes once" if per_call else ""
        lines.append(f"  {per_row} bytes for each row of each time step{once}")
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
    return _with_shape(f"{label(node)} = {function}({', '.join(arguments)})", node)


def _with_shape(text: str, node: fx.Node) -> str:
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

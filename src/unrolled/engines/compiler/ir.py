"""What the compiler's stages hand to one another: values of the batch, products, the emitted source."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_REDUCTIONS = {aten.sum.dim_IntList, aten.prod.dim_int, aten.amax.default, aten.amin.default}
BATCH_SYMBOL = 1_000_003  # the batch while capturing: no other size is likely to equal this prime


class UnsupportedError(Exception):
    """A step that the compiler can't take, and why."""


def per_row(node: fx.Node) -> bool:
    """Whether a node has a row for each row of the batch (else it is made of parameters alone)."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and BATCH_SYMBOL in value.shape


def is_sum_of_rows(node: fx.Node) -> bool:
    """Whether a node is the sum of each column of another."""
    return node.target is torch.ops.aten.sum.dim_IntList and node.args[1:] == ([0],)


def width(node: fx.Node) -> int:
    """The columns of a value of the loop."""
    shape = node.meta["val"].shape
    return int(shape[1]) if per_row(node) else math.prod(shape)


def dependents(seeds: Iterable[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    found = set(seeds)
    for node in order:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that they follow from."""
    waiting = list(nodes)
    found = set(waiting)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def inputs_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {found for node in nodes for found in node.all_input_nodes}


def is_reduction(node: fx.Node) -> bool:
    """Whether a node reduces each row of a value to one number."""
    return node.target in _REDUCTIONS


def is_number(node: fx.Node) -> bool:
    """Whether a node is one number, the same for all rows and columns."""
    return node.target is aten.full.default

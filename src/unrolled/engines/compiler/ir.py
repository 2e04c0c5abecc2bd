"""Definitions that all stages of the compiler share: the batch symbol, and queries on graph nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_REDUCTIONS = {aten.sum.dim_IntList, aten.prod.dim_int, aten.amax.default, aten.amin.default}
BATCH_SYMBOL = 1_000_003  # batch size during capture: a prime that no other size is likely to equal

MIXES_ROWS = (
    "mixes rows of the batch, which must be independent; compute over the features (dim=-1), or compute "
    "statistics over the batch before the layer"
)


class UnsupportedError(Exception):
    """The compiler can't compile a step; the message gives the reason."""


def label(node: fx.Node) -> str:
    """Return the name of a node in printed graphs and kernels: that of the cell, if it is an input."""
    name: str = node.meta.get("label", node.name)
    return name


def is_batched(node: fx.Node) -> bool:
    """Return whether a node's value has a batch dimension (if not, it depends on parameters only)."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and BATCH_SYMBOL in value.shape


def is_batch_sum(node: fx.Node) -> bool:
    """Return whether a node sums a value over the batch dimension."""
    return node.target is torch.ops.aten.sum.dim_IntList and node.args[1:] == ([0],)


def width(node: fx.Node) -> int:
    """Return the number of columns of a value in the loop."""
    shape = node.meta["val"].shape
    return int(shape[1]) if is_batched(node) else math.prod(shape)


def dependents(seeds: Iterable[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    """Return ``seeds`` and all operations that depend on them; ``order`` has the nodes in graph order."""
    reached = set(seeds)
    for node in order:
        if node.op == "call_function" and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return ``nodes`` and everything that they are computed from."""
    pending = list(nodes)
    reached = set(pending)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in reached:
                reached.add(node)
                pending.append(node)
    return reached


def select_ancestors(nodes: list[fx.Node], results: Iterable[fx.Node]) -> list[fx.Node]:
    """Return those of ``nodes`` that ``results`` are computed from."""
    required = ancestors(results)
    return [node for node in nodes if node in required]


def inputs_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the direct inputs of ``nodes``."""
    return {operand for node in nodes for operand in node.all_input_nodes}


def is_reduction(node: fx.Node) -> bool:
    """Return whether a node reduces each row of a value to one number."""
    return node.target in _REDUCTIONS


def is_product(node: fx.Node) -> bool:
    """Return whether a node is a matrix product."""
    return node.target is aten.mm.default or is_quantized(node)


def is_quantized(node: fx.Node) -> bool:
    """Return whether a node is a matrix product with quantized weights."""
    return node.target is torch.ops.unrolled.quantized_mm.default


def is_number(node: fx.Node) -> bool:
    """Return whether a node is a constant number, the same for all rows and columns."""
    return node.target is aten.full.default

"""Merge gradient arrays of the backward that have columns in common.

A cell that multiplies a pre-activation by a gate, as in ``n = tanh(x_n + r * h_n)``, has two arrays of
gradients: one for the products with the input, one for those with the state. They differ in some columns
only. This pass merges them into one array, and the products and sums after the loop read slices of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import is_batch_sum, is_batched, width

aten = torch.ops.aten


def merge_gradient_columns(graph: fx.Graph, in_loops: set[fx.Node]) -> None:
    """Merge pairs of arrays that begin with the same columns, for their readers after the loop.

    Args:
        graph: Graph of a step and its backward; it is changed.
        in_loops: Nodes that a loop computes. They read the original arrays.
    """
    order = {node: k for k, node in enumerate(graph.nodes)}
    arrays = [node for node in graph.nodes if _is_array(node) and _is_mergeable(node, in_loops)]
    while arrays:
        first = arrays.pop(0)
        if any(_is_left_operand(first, user) for user in first.users if user not in in_loops):
            continue  # its columns end up in two ranges, and the products of both would have to be added
        for second in arrays:
            common = _common_prefix(_parts(first), _parts(second))
            if common and all(order[part] < order[first] for part in _parts(second)):
                _merge(graph, first, second, common, in_loops)
                arrays.remove(second)
                break


def _parts(array: fx.Node) -> list[fx.Node]:
    return list(array.args[0])  # type: ignore[arg-type]


def _common_prefix(first: list[fx.Node], second: list[fx.Node]) -> int:
    """Return the length of the common prefix of two lists."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a is not b), min(len(first), len(second)))


def _is_array(node: fx.Node) -> bool:
    """Return whether a node concatenates columns of values of the batch."""
    return node.target is aten.cat.default and is_batched(node) and node.args[1:] in ((1,), (-1,))


def _is_mergeable(array: fx.Node, in_loops: set[fx.Node]) -> bool:
    """Return whether everything that reads an array after the loop can read slices of a merged one."""
    readers = [user for user in array.users if user not in in_loops]
    return bool(readers) and all(
        is_batch_sum(user)
        or _is_left_operand(array, user)
        or (_is_transpose(user) and all(_is_left_operand(user, product) for product in user.users))
        for user in readers
    )


def _is_transpose(node: fx.Node) -> bool:
    return node.target is aten.t.default or (node.target is aten.permute.default and node.args[1] == [1, 0])


def _is_left_operand(array: fx.Node, node: fx.Node) -> bool:
    """Return whether ``node`` is a matrix product whose left operand, and only that, is ``array``."""
    return (
        node.target is aten.mm.default
        and node.args[0] is array
        and node.args[1] is not array
        and array not in node.args[1].all_input_nodes  # type: ignore[union-attr]
    )


def _merge(graph: fx.Graph, first: fx.Node, second: fx.Node, common: int, in_loops: set[fx.Node]) -> None:
    """Merge two arrays: columns of the first only, then the common ones, then those of the second only."""
    first_parts, second_parts = _parts(first), _parts(second)
    shared, only_first, only_second = first_parts[:common], first_parts[common:], second_parts[common:]
    a, b, c = (sum(map(width, parts)) for parts in (only_first, shared, only_second))
    with graph.inserting_before(first):
        merged = _call(graph, aten.cat.default, [*only_first, *shared, *only_second], 1)
        transposed = _call(graph, aten.t.default, merged)
    for array, ranges in ((first, [(a, a + b), (0, a)]), (second, [(a, a + b + c)])):
        ranges = [columns for columns in ranges if columns[0] < columns[1]]
        for user in [user for user in array.users if user not in in_loops]:
            for reader in list(user.users) if _is_transpose(user) else [user]:
                with graph.inserting_before(reader):
                    results = [_read_slice(graph, reader, transposed, *columns) for columns in ranges]
                    result = results[0] if len(results) == 1 else _call(graph, aten.cat.default, results)
                reader.replace_all_uses_with(result)
                graph.erase_node(reader)
            if not user.users and _is_transpose(user):
                graph.erase_node(user)


def _read_slice(graph: fx.Graph, reader: fx.Node, transposed: fx.Node, start: int, end: int) -> fx.Node:
    """Repeat a product or a sum for a range of the merged array's columns.

    Args:
        graph: The graph; nodes are added.
        reader: The product or the sum.
        transposed: Transpose of the merged array.
        start: First column.
        end: Last column, exclusive.
    """
    columns = _call(graph, aten.slice.Tensor, transposed, 0, start, end)
    if is_batch_sum(reader):
        return _call(graph, aten.sum.dim_IntList, _call(graph, aten.t.default, columns), [0])
    if is_batched(reader):
        columns = _call(graph, aten.t.default, columns)
    return _call(graph, aten.mm.default, columns, reader.args[1])


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Add an operation to the graph."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node

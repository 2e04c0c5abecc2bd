"""Columns that two arrays of the backward have in common, kept once for all time steps.

A cell that multiplies a sum by a gate, as in ``n = tanh(x_n + r * h_n)``, has two arrays of gradients that
differ in some columns only: of its sums with the input, and of those with the state. They are joined to one
array, and the products and sums after the loop read parts of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from unrolled.engines.compiler.ir import is_sum_of_rows, per_row, width

aten = torch.ops.aten


def share(graph: fx.Graph, in_loops: set[fx.Node]) -> None:
    """Join every two arrays that begin with the same columns, as far as they are read after the loop.

    Args:
        graph: of a step and its backward; it is changed.
        in_loops: nodes that a loop computes; they read the arrays as before.
    """
    order = {node: k for k, node in enumerate(graph.nodes)}
    arrays = [node for node in graph.nodes if _is_array(node) and _can_share(node, in_loops)]
    while arrays:
        first = arrays.pop(0)
        if any(_is_left(user, first) for user in first.users if user not in in_loops):
            continue  # it comes in two ranges: their products would have to be summed
        for second in arrays:
            common = _common(_parts(first), _parts(second))
            if common and all(order[part] < order[first] for part in _parts(second)):
                _join(graph, first, second, common, in_loops)
                arrays.remove(second)
                break


def _parts(array: fx.Node) -> list[fx.Node]:
    return list(array.args[0])  # type: ignore[arg-type]


def _common(first: list[fx.Node], second: list[fx.Node]) -> int:
    """How many nodes two lists begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a is not b), min(len(first), len(second)))


def _is_array(node: fx.Node) -> bool:
    return node.target is aten.cat.default and per_row(node) and node.args[1:] in ((1,), (-1,))


def _can_share(array: fx.Node, in_loops: set[fx.Node]) -> bool:
    outside = [user for user in array.users if user not in in_loops]
    return bool(outside) and all(
        is_sum_of_rows(user)
        or _is_left(user, array)
        or (_is_turned(user) and all(_is_left(other, user) for other in user.users))
        for user in outside
    )


def _is_turned(node: fx.Node) -> bool:
    return node.target is aten.t.default or (node.target is aten.permute.default and node.args[1] == [1, 0])


def _is_left(node: fx.Node, array: fx.Node) -> bool:
    """Whether a node is a product with an array on its left, and nothing of it on its right."""
    return (
        node.target is aten.mm.default
        and node.args[0] is array
        and node.args[1] is not array
        and array not in node.args[1].all_input_nodes  # type: ignore[union-attr]
    )


def _join(graph: fx.Graph, first: fx.Node, second: fx.Node, common: int, in_loops: set[fx.Node]) -> None:
    """Keep what only the first has, then what both have, then what only the second has."""
    mine, others = _parts(first), _parts(second)
    shared, rest, tail = mine[:common], mine[common:], others[common:]
    a, b, c = (sum(map(width, parts)) for parts in (rest, shared, tail))
    with graph.inserting_before(first):
        turned = _call(graph, aten.t.default, _call(graph, aten.cat.default, [*rest, *shared, *tail], 1))
    for array, ranges in ((first, [(a, a + b), (0, a)]), (second, [(a, a + b + c)])):
        ranges = [columns for columns in ranges if columns[0] < columns[1]]
        for user in [user for user in array.users if user not in in_loops]:
            for reader in list(user.users) if _is_turned(user) else [user]:
                with graph.inserting_before(reader):
                    made = [_read_anew(graph, reader, turned, *columns) for columns in ranges]
                    new = made[0] if len(made) == 1 else _call(graph, aten.cat.default, made)
                reader.replace_all_uses_with(new)
                graph.erase_node(reader)
            if not user.users and _is_turned(user):
                graph.erase_node(user)


def _read_anew(graph: fx.Graph, reader: fx.Node, turned: fx.Node, start: int, end: int) -> fx.Node:
    """What a product or a sum is for a range of the columns of the joined array."""
    part = _call(graph, aten.slice.Tensor, turned, 0, start, end)
    if is_sum_of_rows(reader):
        return _call(graph, aten.sum.dim_IntList, _call(graph, aten.t.default, part), [0])
    if per_row(reader):
        part = _call(graph, aten.t.default, part)
    return _call(graph, aten.mm.default, part, reader.args[1])


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node

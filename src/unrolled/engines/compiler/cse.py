"""Remove the operations of a graph that nothing uses, and repeated ones."""

from __future__ import annotations

from typing import Any

from torch import fx

from unrolled.engines._torch_private import OpOverload


def eliminate_unused(graph: fx.Graph) -> None:
    """Remove each operation whose result nothing uses. Checks, which have no result, stay."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or _has_no_result(node))


def _has_no_result(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def eliminate_common(graph: fx.Graph) -> None:
    """Replace each operation by the first one with the same target and arguments.

    No operation may have side effects. ``torch._functorch.compile_utils`` has a similar function, but
    importing it takes longer than capturing, partitioning and printing a step.
    """
    first_by_key: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = first_by_key.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(argument: Any) -> object:
    """Return a hashable key of an argument that tells 1, 1.0 and True apart, and 0.0 and -0.0."""
    if isinstance(argument, (list, tuple)):
        return tuple(map(_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in sorted(argument.items()))
    return argument if isinstance(argument, fx.Node) else (type(argument), repr(argument))

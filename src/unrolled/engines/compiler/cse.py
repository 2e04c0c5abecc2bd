"""Compute once what a graph computes several times."""

from __future__ import annotations

from typing import Any

from torch import fx


def join(graph: fx.Graph) -> None:
    """Of the nodes that do the same with the same, keep the first; none of them may have an effect.

    Torch has such a function in ``torch._functorch.compile_utils``; to import it takes longer than to
    capture, split and emit a step.
    """
    seen: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(given: Any) -> object:
    """What tells arguments apart: 1, 1.0 and True are three, 0.0 and -0.0 two."""
    if isinstance(given, (list, tuple)):
        return tuple(map(_key, given))
    if isinstance(given, dict):
        return tuple((name, _key(value)) for name, value in sorted(given.items()))
    return given if isinstance(given, fx.Node) else (type(given), repr(given))

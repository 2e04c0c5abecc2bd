"""What is computed around a loop: products of all time steps at once, and what parameters alone make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from unrolled.engines.native.products import products
from unrolled.engines.native.program import ROWS


class Around:
    """Nodes of a graph, to compute for any number of rows at once.

    A node that reduces over the batch so reduces over all time steps as well.
    """

    def __init__(self, nodes: list[fx.Node]) -> None:
        self._steps = [(n, _function(n), _argument(n.args), _argument(n.kwargs)) for n in nodes]

    def __call__(self, values: dict[fx.Node, Any], rows: int) -> None:
        """Compute the nodes; ``values`` has their inputs and gets them."""
        for node, function, args, kwargs in self._steps:
            values[node] = function(*args(values, rows), **kwargs(values, rows))


def _function(node: fx.Node) -> Callable[..., Any]:
    if node.target is torch.ops.aten.mm.default:
        return products(node.meta["val"].dtype).mm
    assert callable(node.target)
    return node.target


def _argument(given: Any) -> Callable[[dict[fx.Node, Any], int], Any]:
    """What an argument is, once the values of nodes and the number of rows are known."""
    if isinstance(given, fx.Node):
        return lambda values, rows: values[given]
    if isinstance(given, (list, tuple)):
        parts = [_argument(part) for part in given]
        return lambda values, rows: [part(values, rows) for part in parts]
    if isinstance(given, dict):
        named = {name: _argument(part) for name, part in given.items()}
        return lambda values, rows: {name: part(values, rows) for name, part in named.items()}
    if type(given) is int and given == ROWS:
        return lambda values, rows: rows
    return lambda values, rows: given

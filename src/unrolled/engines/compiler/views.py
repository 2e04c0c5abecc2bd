"""Where the values around a loop lie: views of what was computed or given, resolved once."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from unrolled.engines.compiler.ir import BATCH_SYMBOL

aten = torch.ops.aten

_VIEWS = {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.slice.Tensor,
    aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A view: elements of a base, whose elements lie next to one another.

    Attributes:
        base: the node that holds them.
        offset: of the first, in elements.
        shape: with ROWS in the place of the rows of all time steps.
        strides: in elements.
    """

    base: fx.Node
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @cached_property
    def whole(self) -> bool:
        """Whether it is its base as it lies."""
        dense = self.strides == torch.empty(self.shape, device="meta").stride()
        return self.offset == 0 and self.shape == tuple(self.base.meta["val"].shape) and dense

    def of(self, base: Tensor, rows: int) -> Tensor:
        """The view, once the base and the number of rows are known; a base may have its time axis apart."""
        if self.whole:
            return base if base.dim() == len(self.shape) else base.view(-1, base.shape[-1])
        shape = [rows if size == BATCH_SYMBOL else size for size in self.shape]
        return base.as_strided(shape, self.strides, base.storage_offset() + self.offset)


def places(nodes: Iterable[fx.Node], known: Collection[fx.Node] = ()) -> dict[fx.Node, Place]:
    """The place of every node and of every input of one.

    Args:
        nodes: of a graph.
        known: nodes that are kept as they are, though they may be views of others.
    """
    found: dict[fx.Node, tuple[fx.Node, Tensor]] = {}

    def resolve(node: fx.Node) -> tuple[fx.Node, Tensor]:
        if node not in found:
            source = node.args[0] if node.target in _VIEWS and node not in known else None
            if isinstance(source, fx.Node):
                base, view = resolve(source)
                assert callable(node.target)
                found[node] = base, node.target(view, *node.args[1:], **node.kwargs)
            else:
                found[node] = node, torch.empty(node.meta["val"].shape, device="meta")
        return found[node]

    for node in nodes:
        for one in (*node.all_input_nodes, node):
            if isinstance(one.meta["val"], Tensor):
                resolve(one)
    return {
        node: Place(base, int(view.storage_offset()), tuple(view.shape), view.stride())
        for node, (base, view) in found.items()
    }

"""Views among the values around a loop, resolved to offset and strides once per compilation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from unrolled.engines.compiler.ir import BATCH_SYMBOL, is_batched
from unrolled.engines.fork_safety import lazy_property

aten = torch.ops.aten

_VIEW_OPS = {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.slice.Tensor,
    aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default,
}  # fmt: skip


def _apply_view(node: fx.Node, source: Tensor) -> Tensor | None:
    """Return a view operation's result for a meta tensor, or None if its result has to be a copy.

    A loop reads a vector of parameters at consecutive addresses, so a vector with gaps is copied.
    """
    assert callable(node.target)
    try:
        view: Tensor = node.target(source, *node.args[1:], **node.kwargs)
    except RuntimeError:  # the strides allow no such view, because values around a loop are contiguous
        return None
    has_gaps = view.dim() == 1 and not is_batched(node) and view.numel() > 1 and view.stride(0) != 1
    return None if has_gaps else view


@dataclass(frozen=True)
class TensorView:
    """A strided view of a contiguous base.

    Attributes:
        base: Node whose value holds the elements.
        offset: Offset of the first element, in elements.
        shape: Shape of the view, with ``BATCH_SYMBOL`` for the number of rows of all time steps.
        strides: Strides, in elements.
    """

    base: fx.Node
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @lazy_property
    def is_base(self) -> bool:
        """Whether the view has the shape and strides of its base."""
        dense = self.strides == torch.empty(self.shape, device="meta").stride()
        return self.offset == 0 and self.shape == tuple(self.base.meta["val"].shape) and dense

    def apply_to(self, base: Tensor, rows: int) -> Tensor:
        """Return the view of a concrete base.

        Args:
            base: Value of the base node: ``(rows, width)`` or ``(time, batch, width)``.
            rows: Number of rows of all time steps.
        """
        if self.is_base:
            return base if base.dim() == len(self.shape) else base.view(-1, base.shape[-1])
        shape = [rows if size == BATCH_SYMBOL else size for size in self.shape]
        return base.as_strided(shape, self.strides, base.storage_offset() + self.offset)

    @property
    def repeats(self) -> bool:
        """Whether an element of the base appears several times in the view."""
        return any(size > 1 and stride == 0 for size, stride in zip(self.shape, self.strides, strict=True))

    def may_overlap(self, other: TensorView) -> bool:
        """Return whether two views may share elements of a base."""
        mine, theirs = self._range, other._range
        return self.base is other.base and mine.start < theirs.stop and theirs.start < mine.stop

    @property
    def _range(self) -> range:
        """The range of elements of the base from the first to the last one of the view."""
        steps = ((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return range(self.offset, self.offset + sum(steps) + 1)


def resolve_views(nodes: Iterable[fx.Node], opaque: Collection[fx.Node] = ()) -> dict[fx.Node, TensorView]:
    """Return ``nodes`` and their inputs as views of nodes that are no views themselves.

    Args:
        nodes: Nodes of a graph.
        opaque: Nodes to treat as bases, even if they are views of others.
    """
    resolved: dict[fx.Node, tuple[fx.Node, Tensor]] = {}

    def resolve(node: fx.Node) -> tuple[fx.Node, Tensor]:
        if node not in resolved:
            source = node.args[0] if node.target in _VIEW_OPS and node not in opaque else None
            view = None
            if isinstance(source, fx.Node):
                base, source_view = resolve(source)
                view = _apply_view(node, source_view)
            if view is None:
                base, view = node, torch.empty(node.meta["val"].shape, device="meta")
            resolved[node] = base, view
        return resolved[node]

    for node in nodes:
        for operand in (*node.all_input_nodes, node):
            if isinstance(operand.meta["val"], Tensor):
                resolve(operand)
    return {
        node: TensorView(base, int(view.storage_offset()), tuple(view.shape), view.stride())
        for node, (base, view) in resolved.items()
    }


def needs_copy(nodes: Sequence[fx.Node | None], opaque: Collection[fx.Node]) -> list[bool]:
    """Return which values must be copied, so that writing to one of them doesn't change another.

    Args:
        nodes: The nodes of the values. None for no value.
        opaque: See :func:`resolve_views`.
    """
    views = resolve_views([node for node in nodes if node is not None], opaque)
    earlier: list[TensorView] = []
    flags = []
    for node in nodes:
        view = None if node is None else views[node]
        flags.append(view is not None and (view.repeats or any(map(view.may_overlap, earlier))))
        earlier += [] if view is None else [view]
    return flags

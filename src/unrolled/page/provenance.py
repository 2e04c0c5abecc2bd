"""How numbers were made, as plain data for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.tracing.provenance import Node


class Exporter:
    """Turns the derivations of one step into plain data, and gathers the numbers that have no name.

    Args:
        known: names, such as ``parameter weight_ih``, of tensors that the page has anyway, by their id.
        hidden: how the tensors are made that have a name in the step, but don't stand on the page.
        runs: of moved tensors, kept from one step to the next, by the id of what says where they come from.

    Attributes:
        nodes: the data: what a node is made of stands before it.
        unnamed: tensors without a name whose numbers are needed, in the order of their numbers.
    """

    def __init__(
        self,
        known: Mapping[int, str],
        hidden: Mapping[str, Node],
        runs: dict[int, tuple[Tensor, list[list[int]]]],
    ) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.unnamed: list[Tensor] = []
        self._known = known
        self._hidden = hidden
        self._runs = runs
        self._done: dict[int, int] = {}

    def add(self, node: Node, needed: bool = False) -> int:
        """The place of a node among the data.

        Args:
            node: what to add.
            needed: whether its numbers are, not only what it is made of.
        """
        if id(node) not in self._done:
            data = self._data(node)
            self.nodes.append(data)
            self._done[id(node)] = len(self.nodes) - 1
        place = self._done[id(node)]
        if needed and node.kind == "moved":
            for part in node.operands:
                self.add(part, needed=True)
        elif needed and not {"of", "via"} & self.nodes[place].keys():
            self.nodes[place]["of"] = self._unnamed(node.numbers)
        return place

    def _data(self, node: Node) -> dict[str, Any]:
        data: dict[str, Any] = {"kind": node.kind}
        if node.name:
            data["name"] = node.name
        if node.kind == "value" and node.name in self._hidden:
            data["via"] = self.add(self._hidden[node.name], needed=True)
        elif node.kind == "value":
            data["of"] = self._label(node)
        if node.kind in ("value", "rows"):
            data["shape"] = list(node.numbers.shape)
        whole = node.kind in ("sum", "rows")
        data["parts"] = [self.add(part, needed=whole) for part in node.operands]
        if node.kind == "sum":
            data["size"], data["length"] = node.numbers.shape[-1], node.operands[0].numbers.shape[-1]
            data["turned"] = node.turned
        elif node.kind == "rows":
            rows = node.numbers.shape[0] if node.numbers.dim() > 1 else 1
            own = [part.numbers.dim() > 1 and part.numbers.shape[0] == rows for part in node.operands]
            data["rows"], data["own"] = rows, own if node.numbers.dim() > 1 else [False] * len(own)
            data["counts"] = [part.numbers.numel() for part in node.operands]
        elif node.which is not None:
            if id(node.which) not in self._runs:
                self._runs[id(node.which)] = (
                    node.which,
                    _runs(node),
                )  # an id stays its own as long as it lives
            data["runs"] = self._runs[id(node.which)][1]
        elif any(place is not None for place in node.places):
            data["at"] = [None if place is None else place.tolist() for place in node.places]
        return data

    def _label(self, node: Node) -> str:
        if node.name:
            return f"quantity {node.name}"
        return self._known.get(id(node.numbers)) or self._unnamed(node.numbers)

    def _unnamed(self, tensor: Tensor) -> str:
        if tensor.is_complex():  # of which the page says that they are not there
            return "complex"
        for place, known in enumerate(self.unnamed):
            if known is tensor:
                return f"unnamed {place}"
        self.unnamed.append(tensor)
        return f"unnamed {len(self.unnamed) - 1}"


def _runs(node: Node) -> list[list[int]]:
    """Where the elements of a moved tensor come from: operand, first, count and stride of each run."""
    assert node.which is not None
    which = node.which.cpu().numpy()
    table = torch.stack([place for place in node.places if place is not None])
    places = table.gather(0, node.which.unsqueeze(0))[0].cpu().numpy()
    stride, goes_on = np.diff(places), which[1:] == which[:-1]
    breaks = np.flatnonzero(~goes_on[1:] | ~goes_on[:-1] | (stride[1:] != stride[:-1])) + 1
    runs: list[list[int]] = []
    start = 0
    while start < len(places):
        many = start + 1 < len(places) and bool(goes_on[start])
        after = np.searchsorted(breaks, start, side="right")
        end = int(breaks[after] if after < len(breaks) else len(places) - 1) if many else start
        runs.append(
            [int(which[start]), int(places[start]), end - start + 1, int(stride[start]) if many else 1]
        )
        start = end + 1
    return runs

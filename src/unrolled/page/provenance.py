"""The computation graph of a step as plain data for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unrolled.tracing.element_moves import find_runs
from unrolled.tracing.provenance import Node


class GraphEncoder:
    """Encodes the computation graph of one step, and collects tensors without a name that it needs.

    Args:
        known_tensors: The keys of tensors that are on the page, such as ``parameter weight_ih``, by id.
        hidden: The nodes of named quantities that are not on the page.
        run_cache: The encoded element sources of moved tensors, by the id of ``source_operands``. Pass the
            same dictionary for all steps.

    Attributes:
        nodes: The encoded nodes. Operands come before the nodes that use them.
        unnamed: The tensors without a name whose values are needed.
    """

    def __init__(
        self,
        known_tensors: Mapping[int, str],
        hidden: Mapping[str, Node],
        run_cache: dict[int, tuple[Tensor, list[list[int]]]],
    ) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.unnamed: list[Tensor] = []
        self._known_tensors = known_tensors
        self._hidden = hidden
        self._run_cache = run_cache
        self._indices: dict[int, int] = {}  # by the id of the node

    def add(self, node: Node, needs_values: bool = False) -> int:
        """Add a node and its operands.

        Args:
            node: The node.
            needs_values: Whether the page needs the values of the node, and not only its operands.

        Returns:
            The index of the node in ``nodes``.
        """
        if id(node) not in self._indices:
            data = self._encode(node)
            self.nodes.append(data)
            self._indices[id(node)] = len(self.nodes) - 1
        index = self._indices[id(node)]
        if needs_values and node.kind == "moved":
            for part in node.operands:
                self.add(part, needs_values=True)
        elif needs_values and not {"source", "computedBy"} & self.nodes[index].keys():
            self.nodes[index]["source"] = self._add_unnamed(node.numbers)
        return index

    def _encode(self, node: Node) -> dict[str, Any]:
        data: dict[str, Any] = {"kind": node.kind}
        if node.name:
            data["name"] = node.name
        if node.kind == "value" and node.name in self._hidden:
            data["computedBy"] = self.add(self._hidden[node.name], needs_values=True)
        elif node.kind == "value":
            data["source"] = self._source_key(node)
        if node.kind in ("value", "rows"):
            data["shape"] = list(node.numbers.shape)
        needs_values = node.kind in ("sum", "rows")
        data["operands"] = [self.add(part, needs_values) for part in node.operands]
        if node.kind == "sum":
            data["outputSize"] = node.numbers.shape[-1]
            data["inputSize"] = node.operands[0].numbers.shape[-1]
            data["weightTransposed"] = node.weight_transposed
        elif node.kind == "rows":
            is_matrix = node.numbers.dim() > 1
            rows = node.numbers.shape[0] if is_matrix else 1
            data["rowCount"] = rows
            data["hasRows"] = [
                is_matrix and part.numbers.dim() > 1 and part.numbers.shape[0] == rows
                for part in node.operands
            ]
            data["operandSizes"] = [part.numbers.numel() for part in node.operands]
        elif node.source_operands is not None:
            data["runs"] = self._element_runs(node, node.source_operands)
        elif any(element_map is not None for element_map in node.element_maps):
            data["elementMaps"] = [None if m is None else m.tolist() for m in node.element_maps]
        return data

    def _element_runs(self, node: Node, source_operands: Tensor) -> list[list[int]]:
        if id(source_operands) not in self._run_cache:
            maps = [element_map for element_map in node.element_maps if element_map is not None]
            runs = find_runs(source_operands, maps)
            # keep a reference to the tensor: its id may be reused once it is deleted
            self._run_cache[id(source_operands)] = (source_operands, runs)
        return self._run_cache[id(source_operands)][1]

    def _source_key(self, node: Node) -> str:
        if node.name:
            return f"quantity {node.name}"
        return self._known_tensors.get(id(node.numbers)) or self._add_unnamed(node.numbers)

    def _add_unnamed(self, tensor: Tensor) -> str:
        if tensor.is_complex():  # the page says that these values are missing
            return "complex"
        for index, known in enumerate(self.unnamed):
            if known is tensor:
                return f"unnamed {index}"
        self.unnamed.append(tensor)
        return f"unnamed {len(self.unnamed) - 1}"

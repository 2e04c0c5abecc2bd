"""The diagram of a layer's step as plain data for the page: nodes, numbers and geometry."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from unrolled.diagram.groups import fold
from unrolled.diagram.layout import layout
from unrolled.diagram.model import Diagram, DiagramNode, DiagramTrace, Normalization, Term
from unrolled.diagram.shapes import is_fader, is_normalized, weight_index
from unrolled.diagram.unfold import unfold
from unrolled.page.sampling import encode_values


def diagram_data(traced: DiagramTrace) -> dict[str, Any]:
    """Return the nodes of a diagram, and its numbers at every step.

    The numbers of a step are stored one tensor after the other.
    """
    values = traced.values
    return {
        "nodes": [_node(node) for node in traced.diagram.nodes],
        "states": [{"name": s.name, "end": s.end, "value": s.value} for s in traced.diagram.states],
        "definitions": [asdict(definition) for definition in traced.diagram.definitions],
        "inputValue": traced.diagram.input_value,
        "sizes": [value.numel() for value in values[0]],
        "values": encode_values(_stacked(values)),
    }


def _stacked(values: list[list[Tensor]]) -> Tensor:
    """Return the numbers of all steps, ``(time, numbers)``, in single precision if that is exact."""
    stacked = torch.stack([torch.cat([value.flatten() for value in step]) for step in values])
    is_single = any(value.dtype is torch.float32 for value in values[0])  # else only constants are double
    if is_single and torch.allclose(stacked.float().double(), stacked.double(), 0, 0, equal_nan=True):
        return stacked.float()
    return stacked


def value_sources(traced: DiagramTrace) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """Name the tensors of each step that the numbers of a diagram come from.

    Args:
        traced: The diagram, built with the runs of its steps.

    Returns:
        For each value, its pieces as ``{"name", "elements"}``, or None if it comes from no tensor of the
        step; and the tensors of each step by name.
    """
    tensors = []
    sources: list[Any] = []
    for origins in traced.origins:
        names: dict[int, str] = {}
        found: dict[str, Tensor] = {}
        sources = []
        for origin in origins:
            pieces = []
            for tensor, elements in origin or ():
                name = names.setdefault(id(tensor), f"#{len(names)}")
                found[name] = tensor
                is_whole = elements == tuple(range(tensor.numel()))
                pieces.append({"name": name, "elements": None if is_whole else list(elements)})
            sources.append(pieces or None)
        tensors.append(found)
    return sources, tensors


def drawing_data(diagram: Diagram) -> dict[str, Any]:
    """Return the nodes that are drawn, and where. A node shows the quantity whose values it has.

    Args:
        diagram: The diagram. If it has groups, there is a drawing with them folded, and one with them open.
    """
    folded = _drawing(unfold(fold(diagram)))
    if not diagram.groups:
        return folded
    groups = [{"nodes": list(group.nodes), "title": group.title} for group in diagram.groups]
    return {**folded, "groups": groups, "open": _drawing(diagram)}


def _drawing(diagram: Diagram) -> dict[str, Any]:
    return {
        "nodes": [
            {
                **_drawn(node),
                "normalized": is_normalized(node),
                "isFader": is_fader(node),
                "weight": weight_index(node),
                "sources": [term.source for term in node.terms if term.source is not None],
            }
            for node in diagram.nodes
        ],
        "layout": layout(diagram).to_json(),
        "upright": layout(diagram, "vertical").to_json(),
    }


def _drawn(node: DiagramNode) -> dict[str, Any]:
    return {
        "id": node.id,
        "kind": node.kind,
        "glyph": node.glyph,
        "name": node.name,
        "range": node.range,
        "value": node.value,
    }


def _node(node: DiagramNode) -> dict[str, Any]:
    return {
        **_drawn(node),
        "preActivation": node.pre_activation,
        "formula": node.formula,
        "operation": node.operation,
        "call": node.call,
        "shapes": [list(shape) for shape in node.shapes],
        "terms": [_term(term) for term in node.terms],
    }


def _term(term: Term) -> dict[str, Any]:
    return {
        "source": term.source,
        "text": term.text,
        "weighted": term.weighted,
        "sign": term.sign,
        "value": term.value,
        "elements": None if term.elements is None else list(term.elements),
        "parameter": term.parameter,
        "constants": list(term.constants),
        "rows": None if term.rows is None else list(term.rows),
        "columns": None if term.columns is None else list(term.columns),
        "transposed": term.transposed,
        "blocks": term.blocks,
        "bias": term.bias,
        "biasRows": None if term.bias_rows is None else list(term.bias_rows),
        "gate": term.gate,
        "gain": term.gain,
        "divides": term.divides,
        "call": term.call,
        "normalization": None if term.normalization is None else _normalization(term.normalization),
    }


def _normalization(normalization: Normalization) -> dict[str, Any]:
    return {
        "group": normalization.group,
        "sign": normalization.sign,
        "text": normalization.text,
        "call": normalization.call,
        "parameters": list(normalization.parameters),
        "rows": list(normalization.rows),
        "size": normalization.size,
    }

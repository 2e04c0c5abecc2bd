"""Draw a cell of one layer with a node for each of its weighted sums."""

from __future__ import annotations

from dataclasses import replace

from unrolled.diagram.model import Diagram, DiagramNode, Term


def unfold(diagram: Diagram) -> Diagram:
    """Replace the layer of a cell that is nothing else by its weighted sums, their sum and the activation.

    So the diagram of an RNN shows what its input and its previous state add.

    Args:
        diagram: The diagram.

    Returns:
        The diagram; the same one if the cell has more nodes, or the layer has only one term with a value.
    """
    if len(diagram.nodes) != 1:
        return diagram
    [layer] = diagram.nodes
    parts = [term for term in layer.terms if term.source is not None]
    if (
        layer.operation != "activation"
        or layer.pre_activation is None
        or len(parts) < 2
        or any(term.value is None or term.normalized for term in layer.terms)
    ):
        return diagram
    nodes: list[DiagramNode] = []
    terms = []
    for term in layer.terms:
        if term.source is None or term.value is None:
            terms.append(term)
            continue
        node = DiagramNode(f"n{len(nodes)}", "layer", "W", "", (replace(term, sign=1),), value=term.value)
        nodes.append(node)
        terms.append(Term(node.id, sign=term.sign, value=term.value))
    total = DiagramNode(f"n{len(nodes)}", "operation", "+", "", tuple(terms), value=layer.pre_activation)
    end = replace(
        layer,
        id=f"n{len(nodes) + 1}",
        terms=(Term(total.id, value=total.value),),
        pre_activation=None,
    )
    states = tuple(replace(state, end=end.id) for state in diagram.states)
    return replace(diagram, nodes=(*nodes, total, end), states=states)

"""The diagram of one step of a cell: its nodes, and what each of them reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One operand of a node.

    Attributes:
        source: What is read: the id of a node, ``"x"`` for the input, or ``"before:NAME"`` for a state before the
            step. None for a term without a line, such as a bias.
        text: The formula of the term. ``{}`` stands for the source.
        weighted: Whether the whole vector is read, through weights; otherwise the element of the same unit.
        sign: 1, or -1 if the term is subtracted.
        value: Index of the values of the term in :attr:`Diagram.value_names`; None if it has none of its own.
        normalized: Whether a normalization is applied to the weighted sum.
    """

    source: str | None
    text: str = "{}"
    weighted: bool = False
    sign: int = 1
    value: int | None = None
    normalized: bool = False


@dataclass(frozen=True)
class DiagramNode:
    """A box, circle or pill of the diagram.

    Attributes:
        id: Unique name, ``"n0"``, ``"n1"``, in the order of computation.
        kind: ``"layer"`` for an activation of a weighted sum or a weighted sum alone, ``"operation"`` for an
            arithmetic operation, ``"function"`` for another function, ``"gain"`` for a product with a constant.
        glyph: The short text in it: ``"σ"``, ``"tanh"``, ``"×"``, ``"+"``, ``"1−"``, ``"W"``.
        name: The quantity that it computes, or empty.
        terms: Its operands.
        range: ``"gate"`` if its values are from 0 to 1, ``"tanh"`` if they are from -1 to 1, otherwise empty.
        value: Index of its values.
        pre_activation: Index of the values that the activation is applied to, or None.
        formula: Its formula if it isn't a sum of its terms. ``{}`` stands for the terms.
    """

    id: str
    kind: str
    glyph: str
    name: str
    terms: tuple[Term, ...]
    range: str = ""
    value: int = 0
    pre_activation: int | None = None
    formula: str = ""


@dataclass(frozen=True)
class DiagramState:
    """A state: the id of the node that computes its new value, and the index of its values before the step."""

    name: str
    end: str
    value: int


@dataclass(frozen=True)
class Group:
    """Nodes that can be folded into one, such as one of several passes through the same layers."""

    name: str
    title: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Diagram:
    """The diagram of one step.

    Attributes:
        cell: Class name of the cell.
        states: Its states; the first is the output.
        nodes: Its nodes, in the order of computation.
        input_value: Index of the values of the input.
        groups: Groups of nodes that are folded at first.
    """

    cell: str
    states: tuple[DiagramState, ...]
    nodes: tuple[DiagramNode, ...]
    input_value: int
    groups: tuple[Group, ...] = ()

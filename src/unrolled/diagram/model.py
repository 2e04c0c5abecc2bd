"""The diagram of one step of a cell: its nodes, and what each of them reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """A normalization of the weighted sums that a gate reads.

    Attributes:
        group: Terms of a node with the same group are added before the normalization.
        sign: 1, or -1 if the term is subtracted from the others before the normalization.
        text: Its formula. ``{}`` stands for the sum of the terms.
        call: Its call as Python code. ``{}`` stands for the sum of the terms, and then for each parameter.
        parameters: The indices of the values of the parameters.
        rows: First and last row, exclusive, of the normalized vector that the gate reads.
        size: Size of the normalized vector.
    """

    group: int
    sign: int
    text: str
    call: str
    parameters: tuple[int, ...]
    rows: tuple[int, int]
    size: int


@dataclass(frozen=True)
class Term:
    """One operand of a node.

    Its value is the element of the source, or for a weighted term a row of the weights times the source, plus
    the bias. It is multiplied by the gain, if there is one.

    Attributes:
        source: What is read: the id of a node, ``"x"`` for the input, or ``"before:NAME"`` for a state before
            the step. None for a term without a line, such as a bias.
        text: The formula of the term, without a normalization. ``{}`` stands for the source.
        weighted: Whether the whole vector is read, through weights; otherwise the element of the same unit.
        sign: 1, or -1 if the term, or its normalization, is subtracted.
        value: Index of the values of the term in the values of a step; None if it has none of its own, as the
            second and later terms of a normalization and the terms of a folded group.
        normalized: Whether a normalization is applied to the weighted sum.
        elements: For each element of the term, the index of the element of the source. None means the same
            index. For a weighted term, the part of the source that is read.
        weight: For a weighted term, index of its weights in :attr:`DiagramTrace.weights`.
        parameter: The parameter that the weights are from. Empty if they are computed from several.
        rows: First and last row, exclusive, of the parameter.
        columns: First and last column, exclusive, of these rows; None for all.
        transposed: Whether the parameter is transposed. ``rows`` and ``columns`` then count in its transpose.
        blocks: Number of blocks of a block-diagonal matrix whose blocks are the rows of the parameter.
        bias: The parameter that is added. Empty if there is none, or it is computed from several.
        bias_rows: First and last row, exclusive, of that parameter; None for all.
        gate: What the formula calls the rows, if they aren't all of the parameter. It may be empty.
        gain: Index of the values of the factor; None without a factor.
        divides: Whether the term is divided by ``gain`` instead.
        call: A comparison that is applied to the element, such as ``"eq({}, 0)"``.
        normalization: The normalization, if there is one.
        constants: The other parameters in its formula, such as those of the gain or the normalization.
    """

    source: str | None
    text: str = "{}"
    weighted: bool = False
    sign: int = 1
    value: int | None = None
    normalized: bool = False
    elements: tuple[int, ...] | None = None
    weight: int | None = None
    parameter: str = ""
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False
    blocks: int = 1
    bias: str = ""
    bias_rows: tuple[int, int] | None = None
    gate: str = ""
    gain: int | None = None
    divides: bool = False
    call: str = ""
    normalization: Normalization | None = None
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class DiagramNode:
    """A box, circle or pill of the diagram.

    Attributes:
        id: Unique name, ``"n0"``, ``"n1"``, in the order of computation.
        kind: ``"layer"`` for an activation of a weighted sum or a weighted sum alone, ``"operation"`` for an
            arithmetic operation, ``"function"`` for another function, ``"gain"`` for a product with a
            constant.
        glyph: The short text in it: ``"σ"``, ``"tanh"``, ``"×"``, ``"+"``, ``"1−"``, ``"W"``.
        name: The quantity that it computes, or empty.
        terms: Its operands.
        range: ``"gate"`` if its values are from 0 to 1, ``"tanh"`` if they are from -1 to 1, otherwise empty.
        value: Index of its values.
        pre_activation: Index of the values that the activation is applied to, or None.
        formula: Its formula if it isn't a sum of its terms. ``{}`` stands for each term with a source; for an
            activation, for the sum of all terms.
        operation: How its values follow from its terms:

            * ``"sum"``: the sum of the terms with their signs.
            * ``"difference"``: the first term minus the second one.
            * ``"product"`` and ``"quotient"`` of the terms.
            * ``"activation"``: ``call`` applied to the sum of the terms.
            * ``"call"``: ``call`` applied to the terms, one for each ``{}``.
            * ``"join"``: the terms one after the other.
            * ``"draw"``: random numbers that were recorded.
            * ``"group"``: several nodes that are folded into this one.
        call: The function as Python code. ``{}`` stands for an operand.
        shapes: For a function that isn't elementwise, the shapes of the operands, with a batch size of 1.
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
    operation: str = "sum"
    call: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class DiagramState:
    """A state: the id of the node that computes its new value, and the index of its values before."""

    name: str
    end: str
    value: int


@dataclass(frozen=True)
class Group:
    """Nodes that can be folded into one, such as one of several passes through the same layers.

    Attributes:
        name: Unique name.
        title: Short text for the folded node.
        nodes: The ids of the nodes. Only the last one is read by other nodes.
    """

    name: str
    title: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Definition:
    """A named constant of a step.

    Attributes:
        name: Its name in formulas.
        text: Its formula.
        parameters: The parameters in its formula.
    """

    name: str
    text: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Diagram:
    """The diagram of one step.

    Attributes:
        cell: Class name of the cell.
        states: Its states; the first is the output.
        nodes: Its nodes, in the order of computation.
        input_value: Index of the values of the input.
        groups: Groups of nodes that are folded at first.
        definitions: The named constants in formulas. A parameter has no definition.
    """

    cell: str
    states: tuple[DiagramState, ...]
    nodes: tuple[DiagramNode, ...]
    input_value: int
    groups: tuple[Group, ...] = ()
    definitions: tuple[Definition, ...] = ()


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a term: the matrix, ``(rows, columns)``, and the bias, ``(rows,)``, or None."""

    matrix: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class DiagramTrace:
    """A diagram and its numbers for one row of the batch.

    Attributes:
        diagram: The diagram.
        steps: The time steps.
        values: For each of these steps, the flat tensors that the indices in the diagram refer to.
        weights: The weights that :attr:`Term.weight` refers to. They are the same at every step.
        origins: For each step and value, the tensors of the step and the elements of each that it consists
            of, or None. Empty unless ``build`` got the runs of the steps.
    """

    diagram: Diagram
    steps: tuple[int, ...]
    values: list[list[Tensor]]
    weights: list[Weights]
    origins: list[list[tuple[tuple[Tensor, tuple[int, ...]], ...] | None]] = field(default_factory=list)


class DiagramError(ValueError):
    """A cell whose step can't be drawn as a diagram."""

"""What a gate multiplies, and which parameters make up a pre-activation, from the graph of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unrolled.tracing.findings import number
from unrolled.tracing.layer_values import LayerValues
from unrolled.tracing.provenance import Node, StepGraph
from unrolled.tracing.thresholds import MAIN_CAUSE, MINIMUM_BIAS


@dataclass(frozen=True)
class GateProduct:
    """Something that a gate multiplies.

    Attributes:
        complement: Whether ``1 − gate`` multiplies it, instead of the gate.
        factor: What is multiplied: the name of a quantity or previous state, or a function such as
            ``tanh(c)``. Empty if it has no short name.
        is_state: Whether it is a state before the step.
    """

    complement: bool
    factor: str
    is_state: bool


def gate_products(graph: StepGraph, gate: str) -> list[GateProduct]:
    """Return what a gate multiplies in a step, without repetitions."""
    products: dict[GateProduct, None] = {}
    for node in _all_nodes(graph):
        if node.kind == "infix" and node.name == "mul":
            pairs = [(node.operands[0], node.operands[1]), (node.operands[1], node.operands[0])]
            for factor, other in pairs:
                if other.tensor is None:
                    continue  # a product with a constant is only a scaled gate
                complement = _is_complement(factor, gate)
                if complement or _is_gate(factor, gate):
                    products[GateProduct(complement, *_factor_name(graph, other))] = None
        elif node.kind == "call" and node.name == "lerp" and _is_gate(node.operands[2], gate):
            for complement, other in ((True, node.operands[0]), (False, node.operands[1])):
                products[GateProduct(complement, *_factor_name(graph, other))] = None
    return list(products)


def _all_nodes(graph: StepGraph) -> Iterator[Node]:
    """Yield every node once."""
    waiting, seen = list(graph.nodes.values()), set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            waiting += node.operands
            yield node


def _without_moves(node: Node) -> Node:
    while node.kind == "moved" and len(node.operands) == 1:
        node = node.operands[0]
    return node


def _is_gate(node: Node, gate: str) -> bool:
    """Whether a node is the gate, or the gate times a constant."""
    node = _without_moves(node)
    if node.kind == "infix" and node.name == "mul":
        tensors = [operand for operand in node.operands if operand.tensor is not None]
        return len(tensors) == 1 and _is_gate(tensors[0], gate)
    return node.kind == "value" and node.name == gate


def _is_complement(node: Node, gate: str) -> bool:
    node = _without_moves(node)
    is_difference = node.kind == "infix" and node.name == "sub"
    return is_difference and node.operands[0].name in ("1", "1.0") and _is_gate(node.operands[1], gate)


def _factor_name(graph: StepGraph, node: Node) -> tuple[str, bool]:
    """Return a short name of a factor, and whether it is a state before the step."""
    node = _without_moves(node)
    for name, state in graph.state_before.items():
        if node.tensor is state:
            return name, True
    if node.kind == "value":
        return node.name, False
    if node.kind == "call" and len(node.operands) == 1:
        inner, is_state = _factor_name(graph, node.operands[0])
        return (f"{node.name}({inner})" if inner and not is_state else ""), False
    return "", False


@dataclass(frozen=True)
class _Term:
    """A term of a pre-activation.

    Attributes:
        kind: ``"bias"``, ``"weights"`` for a weighted sum, or ``"other"``.
        value: Its value.
        parameter, index: The parameter and the row in it, or ``""`` and 0.
        source: What the weights multiply: ``"input"``, or the name of a previous state or quantity.
    """

    kind: str
    value: float
    parameter: str = ""
    index: int = 0
    source: str = ""


def describe_cause(
    values: LayerValues, position: int, row: int, name: str, unit: int
) -> tuple[str, tuple[str, int] | None]:
    """Say which bias or weighted sum makes up most of the pre-activation of a unit.

    Args:
        values: The layer.
        position: Position of the step along the time axis.
        row: The row.
        name: A quantity that a function of one pre-activation computed, such as a gate.
        unit: Flat index of its feature.

    Returns:
        A sentence, empty if there is no main cause, and the parameter and the index of its row.
    """
    graph = values.graph(position, row)
    node = graph.nodes.get(name) if graph else None
    if graph is None or node is None or node.numbers.numel() <= unit:
        return "", None
    node, unit_in_node = node.source(unit)
    while node.kind == "value" and node.name in graph.nodes:  # moved from another quantity
        node, unit_in_node = graph.nodes[node.name].source(unit_in_node)
    if node.kind != "call" or node.operands[0].tensor is None or node.numbers.is_complex():
        return "", None
    terms = list(_terms(values, graph, node.operands[0], node.operand_index(0, unit_in_node), 1.0))
    total = sum(term.value for term in terms)
    biases = sorted((term for term in terms if term.kind == "bias"), key=lambda term: -abs(term.value))
    bias_sum = sum(term.value for term in biases)
    if biases and bias_sum * total > 0 and abs(bias_sum) >= max(MINIMUM_BIAS, MAIN_CAUSE * abs(total)):
        biases = [biases[0]] if abs(biases[0].value) >= MINIMUM_BIAS else biases
        equations = [
            f"{values.part.row_names.element(one.parameter, one.index)} = {_decimals(one.value)}"
            for one in biases
        ]
        subject = "The cause is a bias" if len(equations) == 1 else "The cause is the sum of the biases"
        return f"{subject}: {' and '.join(equations)}.", (biases[0].parameter, biases[0].index)
    sums = [term for term in terms if term.kind == "weights" and term.value * total > 0]
    largest = max(sums, key=lambda term: abs(term.value), default=None)
    if largest is None or abs(largest.value) < MAIN_CAUSE * abs(total):
        return "", None
    names = values.part.row_names
    block = names.block(largest.parameter, largest.index)
    weights = f" with {names.symbol(largest.parameter, block)}" if largest.parameter else ""
    share = f"{_decimals(largest.value)} of {_decimals(total)}"
    if abs(largest.value) > abs(total):
        share = f"{_decimals(largest.value)}, and {_decimals(total)} with all other terms,"
    sentence = (
        f"Most of it comes from the weighted sum of {largest.source}{weights}: {share} at step "
        f"{values.steps[position]}."
    )
    return sentence, (largest.parameter, largest.index) if largest.parameter else None


def _terms(values: LayerValues, graph: StepGraph, node: Node, index: int, sign: float) -> Iterator[_Term]:
    """Yield the terms of a sum."""
    node, index = node.source(index)
    if node.tensor is None:
        return
    defined = graph.nodes.get(node.name) if node.kind == "value" and node.name else None
    if defined is not None and defined is not node and defined.numbers.numel() > index:
        yield from _terms(values, graph, defined, index, sign)
        return
    value = sign * float(node.numbers.flatten()[index])
    parameter = values.parameter_of(node.numbers)
    if node.kind == "infix" and node.name in ("add", "sub"):
        for k, factor in enumerate((1.0, 1.0 if node.name == "add" else -1.0)):
            operand = node.operands[k]
            if operand.tensor is None:
                yield _Term("other", sign * factor * float(operand.name))
            else:
                yield from _terms(values, graph, operand, node.operand_index(k, index), sign * factor)
    elif node.kind == "negated":
        yield from _terms(values, graph, node.operands[0], node.operand_index(0, index), -sign)
    elif node.kind == "sum":
        yield from _weighted_sum_terms(values, graph, node, index, value, sign)
    elif parameter is not None:
        yield _Term("bias", value, parameter, index)
    else:
        yield _Term("other", value)


def _weighted_sum_terms(
    values: LayerValues, graph: StepGraph, node: Node, index: int, value: float, sign: float
) -> Iterator[_Term]:
    """Yield the bias of a weighted sum, and the rest."""
    unit = index % node.numbers.shape[-1]
    if len(node.operands) > 2:
        bias = sign * float(node.operands[2].read()[unit])
        bias_node, bias_unit = node.operands[2].source(unit)
        parameter = values.parameter_of(bias_node.numbers)
        yield _Term("bias" if parameter else "other", bias, parameter or "", bias_unit)
        value -= bias
    weight_node, weight_index = node.operands[1].source(
        unit if node.weight_transposed else unit * node.operands[1].numbers.shape[-1]
    )
    parameter = values.parameter_of(weight_node.numbers) or ""
    source = "input" if node.operands[0].tensor is graph.input else ""
    source = source or _factor_name(graph, node.operands[0])[0] or "other values"
    row = 0 if node.weight_transposed else weight_index // weight_node.numbers.shape[-1]
    yield _Term("weights", value, parameter, row, source)


def _decimals(value: float) -> str:
    """Format a number with two decimal places, or with few digits if it is small or large."""
    return f"{value:.2f}".replace("-", "−") if 0.1 <= abs(value) < 1e4 else number(value)

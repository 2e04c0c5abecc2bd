"""The arithmetic behind one number of a step, as text.

``page/explain.js`` produces the same text in the browser. Change both together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.provenance import INFIX, Node

_SUM, _QUOTIENT, _PRODUCT, _ATOM = range(4)  # operator precedence, loosest first
_PRECEDENCE = {  # of the expression, and the minimum of its left and right operands
    "add": (_SUM, _SUM, _SUM),
    "sub": (_SUM, _SUM, _QUOTIENT),
    "mul": (_PRODUCT, _PRODUCT, _PRODUCT),
    "div": (_QUOTIENT, _PRODUCT, _ATOM),
}


def format_number(value: float | complex) -> str:
    """Format a number with four decimal places, or in scientific notation if it is very small or large."""
    if isinstance(value, complex):
        return f"({format_number(value.real)} + {format_number(value.imag)}i)"
    if not math.isfinite(value) or value == 0 or 5e-5 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


def explain(node: Node, index: int, terms: int) -> str:
    """Format the arithmetic that computed one element of a tensor.

    Args:
        node: Node of the tensor in the computation graph.
        index: Flat index of the element.
        terms: Maximum number of terms of a sum. A longer sum shows its largest terms and the rest's total.
    """
    node, index = node.source(index)
    if node.kind == "value" and node.name:  # an element of another quantity
        return node.name + _subscript(node.numbers, index)
    return _Formatter(terms).format(node, index)[0]


@dataclass(frozen=True)
class _Formatter:
    terms: int

    def format(self, node: Node, index: int) -> tuple[str, int]:
        """Format one element.

        Returns:
            The expression and its precedence.
        """
        match node.kind:
            case "constant":
                return node.name, _ATOM
            case "infix":
                return self._infix(node, index)
            case "negated":
                text = self._operand(node, 0, index, _ATOM)
                return f"-({text})" if text.startswith("-") else f"-{text}", _PRODUCT
            case "sum":
                return self._weighted_sum(node, index)
            case "moved":
                return self.format(*node.source(index))
            case "call":
                operands = enumerate(node.operands)
                texts = [self.format(part, node.operand_index(k, index))[0] for k, part in operands]
                return f"{node.name}({', '.join(texts)})", _ATOM
            case "rows":
                return self._function_of_rows(node, index), _ATOM
        return format_number(_element(node, index)), _ATOM

    def _operand(self, node: Node, operand: int, index: int, minimum: int) -> str:
        """Format an operand, in parentheses if its precedence is below the minimum."""
        text, precedence = self.format(node.operands[operand], node.operand_index(operand, index))
        return text if precedence >= minimum else f"({text})"

    def _infix(self, node: Node, index: int) -> tuple[str, int]:
        precedence, left, right = _PRECEDENCE[node.name]
        text = self._operand(node, 0, index, left) + INFIX[node.name] + self._operand(node, 1, index, right)
        return text, precedence

    def _weighted_sum(self, node: Node, index: int) -> tuple[str, int]:
        """Format a weighted sum: each weight times its input, plus the bias."""
        row, unit = divmod(index, node.numbers.shape[-1])
        input_, weight = (part.read().reshape(part.numbers.shape) for part in node.operands[:2])
        inputs: list[Any] = input_.reshape(-1, input_.shape[-1])[row].tolist()
        weights: list[Any] = (weight[:, unit] if node.weight_transposed else weight[unit]).tolist()
        sizes = [abs(w * v) for w, v in zip(weights, inputs, strict=True)]
        sizes = [size if math.isfinite(size) else math.inf for size in sizes]
        largest = sorted(sorted(range(len(sizes)), key=lambda k: -sizes[k])[: self.terms])
        parts = [f"{format_number(weights[k])}·{format_number(inputs[k])}" for k in largest]
        others = set(range(len(sizes))) - set(largest)
        if others:
            products = [weights[k] * inputs[k] for k in others]
            total = sum(products) if isinstance(products[0], complex) else math.fsum(products)
            parts.append(f"({len(others)} more terms: {format_number(total)})")
        if len(node.operands) > 2:
            parts.append(format_number(node.operands[2].read()[unit].item()))
        return " + ".join(parts), _SUM if len(parts) > 1 else _PRODUCT

    def _function_of_rows(self, node: Node, index: int) -> str:
        """Format one element of a function of whole rows: the function, its operands and a subscript."""
        result = node.numbers
        rows = result.shape[0] if result.dim() > 1 else None
        row = index * result.shape[0] // result.numel() if result.dim() > 1 else 0
        texts = []
        for part in node.operands:
            value = part.read().reshape(part.numbers.shape)
            operand = value[row] if value.dim() > 1 and value.shape[0] == rows else value
            texts.append(_shortened(operand.flatten(), self.terms))
        return f"{node.name}({', '.join(texts)}){_subscript(result, index)}"


def _element(node: Node, index: int) -> float | complex:
    value: float | complex = node.numbers.flatten()[index].item()
    return value


def _subscript(tensor: Tensor, index: int) -> str:
    """Format the position of an element in its row as ``[3]``; empty if it is the only element."""
    position = [int(axis) for axis in torch.unravel_index(torch.tensor(index), tensor.shape)]
    position = position[1:] if tensor.dim() > 1 and len(tensor) == 1 else position
    return f"[{', '.join(map(str, position))}]" if tensor.numel() > 1 else ""


def _shortened(values: Tensor, count: int) -> str:
    """Format the first values of a vector as a list, with an ellipsis if there are more."""
    texts = [format_number(value) for value in values[:count].tolist()]
    return f"[{', '.join([*texts, '…'] if len(values) > count else texts)}]"

"""The arithmetic behind one number of a step, as text with the numbers put in.

``page/explain.js`` writes the same texts in the browser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.provenance import INFIX, Node

_SUM, _QUOTIENT, _PRODUCT, _ATOM = range(4)  # how tightly a text holds together
_STRENGTHS = {  # of the text, and those that its operands need
    "add": (_SUM, _SUM, _SUM),
    "sub": (_SUM, _SUM, _QUOTIENT),
    "mul": (_PRODUCT, _PRODUCT, _PRODUCT),
    "div": (_QUOTIENT, _PRODUCT, _ATOM),
}


def number(value: float | complex) -> str:
    """A number to four decimal places; in scientific form where that would hide it."""
    if isinstance(value, complex):
        return f"({number(value.real)} + {number(value.imag)}i)"
    if not math.isfinite(value) or value == 0 or 5e-5 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


def explain(node: Node, index: int, terms: int) -> str:
    """The arithmetic that made one element of a tensor.

    Args:
        node: how the tensor was made.
        index: of the element, of those of all axes in a row.
        terms: a longer sum shows its largest terms, this many, and what the others add up to.
    """
    node, index = node.source(index)
    if node.kind == "value" and node.name:  # a part of another quantity
        return node.name + _place(node.numbers, index)
    return _Writer(terms).write(node, index)[0]


@dataclass(frozen=True)
class _Writer:
    terms: int

    def write(self, node: Node, index: int) -> tuple[str, int]:
        """The text of one element, and how tightly it holds together."""
        match node.kind:
            case "constant":
                return node.name, _ATOM
            case "infix":
                return self._infix(node, index)
            case "negated":
                text = self._held(node, 0, index, _ATOM)
                return f"-({text})" if text.startswith("-") else f"-{text}", _PRODUCT
            case "sum":
                return self._products(node, index)
            case "moved":
                return self.write(*node.source(index))
            case "call":
                texts = [self.write(part, node.place(k, index))[0] for k, part in enumerate(node.operands)]
                return f"{node.name}({', '.join(texts)})", _ATOM
            case "rows":
                return self._whole(node, index), _ATOM
        return number(_element(node, index)), _ATOM

    def _held(self, node: Node, operand: int, index: int, strength: int) -> str:
        text, own = self.write(node.operands[operand], node.place(operand, index))
        return text if own >= strength else f"({text})"

    def _infix(self, node: Node, index: int) -> tuple[str, int]:
        own, left, right = _STRENGTHS[node.name]
        text = self._held(node, 0, index, left) + INFIX[node.name] + self._held(node, 1, index, right)
        return text, own

    def _products(self, node: Node, index: int) -> tuple[str, int]:
        """A weighted sum: every weight times what it weighs, and the bias."""
        row, unit = divmod(index, node.numbers.shape[-1])
        given, weight = (part.read().reshape(part.numbers.shape) for part in node.operands[:2])
        weighed: list[Any] = given.reshape(-1, given.shape[-1])[row].tolist()
        weights: list[Any] = (weight[:, unit] if node.turned else weight[unit]).tolist()
        size = [abs(w * v) for w, v in zip(weights, weighed, strict=True)]
        size = [most if math.isfinite(most) else math.inf for most in size]
        largest = sorted(sorted(range(len(size)), key=lambda k: -size[k])[: self.terms])
        parts = [f"{number(weights[k])}·{number(weighed[k])}" for k in largest]
        others = set(range(len(size))) - set(largest)
        if others:
            rest = [weights[k] * weighed[k] for k in others]
            total = sum(rest) if isinstance(rest[0], complex) else math.fsum(rest)
            parts.append(f"({len(others)} more terms: {number(total)})")
        if len(node.operands) > 2:
            parts.append(number(node.operands[2].read()[unit].item()))
        return " + ".join(parts), _SUM if len(parts) > 1 else _PRODUCT

    def _whole(self, node: Node, index: int) -> str:
        """A function of whole rows, of which the element is a part."""
        made = node.numbers
        rows = made.shape[0] if made.dim() > 1 else None
        which = index * made.shape[0] // made.numel() if made.dim() > 1 else 0
        texts = []
        for part in node.operands:
            value = part.read().reshape(part.numbers.shape)
            own = value[which] if value.dim() > 1 and value.shape[0] == rows else value
            texts.append(_shortened(own.flatten(), self.terms))
        return f"{node.name}({', '.join(texts)}){_place(made, index)}"


def _element(node: Node, index: int) -> float | complex:
    value: float | complex = node.numbers.flatten()[index].item()
    return value


def _place(tensor: Tensor, index: int) -> str:
    """Where an element stands in its row, in brackets; nothing where it is the only one."""
    at = [int(axis) for axis in torch.unravel_index(torch.tensor(index), tensor.shape)]
    inside = at[1:] if tensor.dim() > 1 and len(tensor) == 1 else at
    return f"[{', '.join(map(str, inside))}]" if tensor.numel() > 1 else ""


def _shortened(values: Tensor, count: int) -> str:
    texts = [number(value) for value in values[:count].tolist()]
    return f"[{', '.join([*texts, '…'] if len(values) > count else texts)}]"

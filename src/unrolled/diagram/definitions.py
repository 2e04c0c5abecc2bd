"""The named constants of a step, which it computes from parameters alone: the gate of MGU3, for instance."""

from __future__ import annotations

from collections.abc import Iterable

from unrolled.diagram.expressions import Expression
from unrolled.diagram.symbols import definition_text, symbol


def find_definitions(outputs: Iterable[Expression]) -> tuple[tuple[str, str], ...]:
    """Return the names of the constants in the formulas of a step, each with its own formula.

    Args:
        outputs: The expressions of the new states.

    Returns:
        The names and formulas. A constant comes after those that it is computed from.
    """
    definitions: dict[str, str] = {}
    stack = [(output, False) for output in outputs]
    seen: set[int] = set()
    while stack:
        expression, operands_done = stack.pop()
        name = symbol(expression.quantity) if expression.static else ""
        if operands_done:
            if name:
                definitions.setdefault(name, definition_text(expression))
        elif id(expression) not in seen:
            seen.add(id(expression))
            stack.append((expression, True))
            stack += [(operand, False) for operand in reversed(_operands(expression))]
    return tuple((name, text) for name, text in definitions.items() if text != name)


def _operands(expression: Expression) -> tuple[Expression, ...]:
    """Return what an expression is computed from, also its weights. Numbers are written as such."""
    if expression.static and not expression.learned:
        return ()
    product = expression.product
    if product is None:
        return expression.arguments
    return (*expression.arguments, product.weight, *(() if product.bias is None else (product.bias,)))

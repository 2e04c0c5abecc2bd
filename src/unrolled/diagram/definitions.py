"""The constants of a step, which it computes from parameters alone: the gate of MGU3, for instance."""

from __future__ import annotations

from collections.abc import Iterable

from unrolled.diagram.expressions import Expression
from unrolled.diagram.model import Definition
from unrolled.diagram.symbols import definition_text, symbol


def find_definitions(outputs: Iterable[Expression]) -> tuple[Definition, ...]:
    """Return the named constants in the formulas of a step.

    Args:
        outputs: The expressions of the new states.

    Returns:
        Their definitions. A constant comes after those that it is computed from.
    """
    definitions: dict[str, Definition] = {}
    stack = [(output, False) for output in outputs]
    seen: set[int] = set()
    while stack:
        expression, operands_done = stack.pop()
        name = symbol(expression.quantity) if expression.static else ""
        if operands_done:
            if name:
                parameters = parameters_of(_operands(expression))
                definition = Definition(name, definition_text(expression), parameters)
                definitions.setdefault(name, definition)
        elif id(expression) not in seen:
            seen.add(id(expression))
            stack.append((expression, True))
            stack += [(operand, False) for operand in reversed(_operands(expression))]
    return tuple(one for one in definitions.values() if one.text != one.name)


def parameters_of(expressions: Iterable[Expression]) -> tuple[str, ...]:
    """Return the parameters in the formulas of constants. A named constant has a formula of its own."""
    parameters: dict[str, None] = {}
    stack = list(expressions)
    while stack:
        expression = stack.pop()
        if not expression.learned or not expression.static:
            continue
        if expression.operation == "parameter":
            parameters[expression.name] = None
        elif not expression.quantity:
            stack += _operands(expression)
    return tuple(parameters)


def _operands(expression: Expression) -> tuple[Expression, ...]:
    """Return what an expression is computed from, also its weights. Numbers are written as such."""
    if expression.static and not expression.learned:
        return ()
    product = expression.product
    if product is None:
        return expression.arguments
    return (*expression.arguments, product.weight, *(() if product.bias is None else (product.bias,)))

"""Short texts for parameters, constants and functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unrolled.diagram.expressions import Expression
from unrolled.diagram.indices import Index
from unrolled.equations.mathml import GREEK

GLYPHS: Mapping[str, str] = {
    "sigmoid": "σ",
    "relu": "ReLU",
    "silu": "SiLU",
    "gelu": "GELU",
    "logsigmoid": "log σ",
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "group_norm": "GroupNorm",
    "maximum": "max",
    "minimum": "min",
    "sqrt": "√",
    "abs": "|·|",
    "square": "(·)²",
    "bitwise_not": "not",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
    "where": "if",
    "to": "cast",
    "type_as": "cast",
    "float": "cast",
    "double": "cast",
}
RELATIONS = {"eq": "=", "ge": "≥", "gt": ">", "le": "≤", "lt": "<", "ne": "≠"}
_OPERATORS = {"add": " + ", "sub": " − ", "mul": "·", "div": "/"}
_SUM, _NEGATIVE, _PRODUCT, _ATOM = range(4)  # what holds a formula together


def glyph(function: str) -> str:
    """Return the short text for a function of torch."""
    return GLYPHS.get(function, RELATIONS.get(function, function))


def call_glyph(function: str, call: str) -> str:
    """Return the short text for a call, such as ``(·)²`` for a power or ``≥0`` for a comparison."""
    second = call.removeprefix(f"{function}({{}}, ").removesuffix(")")
    if second == call or "{" in second:
        return glyph(function)
    if function == "pow":
        return "(·)²" if second == "2" else f"(·)^{second}"
    return f"{RELATIONS[function]}{second}" if function in RELATIONS else glyph(function)


def call_formula(function: str, call: str, operands: Sequence[str], elementwise: bool) -> str:
    """Return the formula of a call.

    Args:
        function: Name of the function.
        call: The call as Python code, with ``{}`` for each operand.
        operands: The text for each operand.
        elementwise: Whether to show the other arguments. Those of other functions are mostly dimensions.
    """
    text = call_glyph(function, call)
    if function == "where" and len(operands) == 3:
        return "if {} then {} else {}".format(*operands)
    if "(·)" in text or "|·|" in text:
        return text.replace("·", operands[0])
    if len(operands) == 2 and text in RELATIONS.values():
        return f"{operands[0]} {text} {operands[1]}"
    if len(operands) == 1 and text[0] in RELATIONS.values():
        return f"{operands[0]} {text[0]} {text[1:]}"
    elementwise = elementwise and text != "cast"
    arguments = call.partition("(")[2].format(*operands) if elementwise else f"{', '.join(operands)})"
    return f"{text}({arguments}"


def symbol(name: str) -> str:
    """Return a name as formulas write it: ``weight_ih`` is ``W_ih``, ``bias`` is ``b``, ``zeta`` is ζ."""
    base, _, index = name.partition("_")
    base = {"weight": "W", "bias": "b"}.get(base, GREEK.get(base, base))
    return f"{base}_{index}" if index else base


def rows_text(name: str, gate: str, rows: tuple[int, int]) -> str:
    """Return the text for some rows of a parameter.

    Args:
        name: The parameter.
        gate: The name of the gate that uses them, or empty.
        rows: First and last row, exclusive.

    Returns:
        ``W_if`` as in torch.nn's documentation, if the gate has a letter; otherwise ``W_ih[candidate]``.
        Rows of ``h`` are ``W_ih[h]``, because ``W_ih`` is the whole parameter.
    """
    letter = gate.rpartition("_")[2]
    is_letter = len(letter) == 1 and letter.isalpha() and letter != "h"
    if is_letter and name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        return f"{symbol(name)[:-1]}{letter}"
    return f"{symbol(name)}[{gate or f'{rows[0]}:{rows[1]}'}]"


def constant_text(expression: Expression, gate: str = "") -> str:
    """Return a short text for what depends neither on the input nor on a state.

    Args:
        expression: The expression.
        gate: The name of the gate that uses it, for the rows of a parameter.
    """
    return _formula(expression, gate)[0]


def factor_text(expression: Expression, gate: str = "") -> str:
    """Return the text of a constant that comes first in a product, in parentheses if it is a sum."""
    return _in_parentheses(_formula(expression, gate), _NEGATIVE)


def divisor_text(expression: Expression, gate: str = "") -> str:
    """Return the text of a constant that something is divided by."""
    return _in_parentheses(_formula(expression, gate), _ATOM)


def definition_text(expression: Expression) -> str:
    """Return the formula of a named constant, without its own name."""
    return _written_out(expression, "")[0]


def _formula(expression: Expression, gate: str) -> tuple[str, int]:
    """Return the formula of a constant, and what holds it together."""
    if expression.quantity:
        return symbol(expression.quantity), _ATOM
    return _written_out(expression, gate)


def _written_out(expression: Expression, gate: str) -> tuple[str, int]:
    operation, arguments, value = expression.operation, expression.arguments, expression.value
    if operation == "parameter":
        if expression.index is None:
            return symbol(expression.name), _ATOM
        if _is_transpose(expression.index):
            return f"{symbol(expression.name)}ᵀ", _ATOM
        return rows_text(expression.name, gate, (min(expression.index), max(expression.index) + 1)), _ATOM
    if value.numel() and not expression.learned:
        if bool((value == value[0]).all()) or value.numel() == 1:
            text = f"{value[0].item():.4g}".replace("-", "−")
            return text, _NEGATIVE if text.startswith("−") else _ATOM
        return expression.name, _ATOM
    if operation == "constant":
        return expression.name, _ATOM
    if operation == "mul":  # numbers first
        arguments = tuple(sorted(arguments, key=lambda argument: argument.operation != "constant"))
    parts = [_formula(argument, gate) for argument in arguments if argument.value.numel()]
    if operation in ("add", "sub"):
        required = _SUM if operation == "add" else _PRODUCT
        others = [_in_parentheses(part, _PRODUCT if part[1] == _NEGATIVE else required) for part in parts[1:]]
        texts = [parts[0][0], *others]
        return _OPERATORS[operation].join(texts), _SUM
    if operation in ("mul", "div"):
        required = _PRODUCT if operation == "mul" else _ATOM
        first = _in_parentheses(parts[0], _NEGATIVE)
        texts = [first, *(_in_parentheses(part, required) for part in parts[1:])]
        is_elementwise = operation == "mul" and all(argument.value.numel() > 1 for argument in arguments)
        operator = "⊙" if is_elementwise else _OPERATORS[operation]
        return operator.join(texts), _NEGATIVE if first.startswith("−") else _PRODUCT
    if operation == "neg":
        return f"−{_in_parentheses(parts[0], _PRODUCT)}", _NEGATIVE
    if operation == "weighted" and expression.product:
        return f"{factor_text(expression.product.weight)}·{_in_parentheses(parts[0], _ATOM)}", _PRODUCT
    texts = [text for text, _ in parts]
    if expression.call.count("{}") != len(texts):
        return f"{glyph(expression.name or operation)}({', '.join(texts)})", _ATOM
    text = call_formula(expression.name, expression.call, texts, elementwise=not expression.shapes)
    is_atom = expression.name not in RELATIONS and expression.name != "where"
    return text.replace("-", "−"), _ATOM if is_atom else _SUM


def _is_transpose(index: Index) -> bool:
    """Return whether the elements of a matrix are in the order of the transposed one."""
    columns = index[1] if len(index) > 1 else 0
    if isinstance(index, range) or not columns or len(index) % columns:
        return False
    return index == tuple(torch.arange(len(index)).reshape(-1, columns).T.flatten().tolist())


def _in_parentheses(formula: tuple[str, int], required: int) -> str:
    """Return the text of a formula, in parentheses if less than ``required`` holds it together."""
    text, held = formula
    return f"({text})" if held < required else text


def number(expression: Expression) -> float:
    """Return the value of a constant number; 0 for anything else."""
    if not expression.static or expression.value.numel() != 1 or expression.quantity:
        return 0.0
    return 0.0 if expression.learned else float(expression.value.to(torch.float64))


def is_comparison(expression: Expression) -> bool:
    """Return whether an expression compares another one with a number."""
    name, call = expression.name, expression.call
    return name in RELATIONS and len(expression.arguments) == 1 and call.startswith(f"{name}({{}}, ")


def is_number(expression: Expression, value: float) -> bool:
    """Return whether an expression is this constant, such as the 1 in ``1 - z``."""
    values = expression.value
    if not expression.static or expression.learned or not values.numel():
        return False
    return bool((values == value).all())

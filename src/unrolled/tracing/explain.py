"""The arithmetic behind one number of a step, as text.

Every line is right when it is checked by hand: the printed operands give the printed result. For this, the
operands may have more digits than the result, see :func:`digits_for`.

``page/explain.js`` formats the same arithmetic in the browser, with four digits for all numbers. Change both
together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.tracing.call_recorder import INFIX
from unrolled.tracing.provenance import Node
from unrolled.tracing.random_state import cuda_devices

MINUS = "\N{MINUS SIGN}"
DIGITS = 4
"""The default number of decimal places."""

_MORE_DIGITS = 6  # that operands may have in addition to those of the result
_MORE_RESULT_DIGITS = 2
_SUM, _QUOTIENT, _PRODUCT, _ATOM = range(4)  # operator precedence, loosest first
_PRECEDENCE = {  # of the expression, and the minimum of its left and right operands
    "add": (_SUM, _SUM, _SUM),
    "sub": (_SUM, _SUM, _QUOTIENT),
    "mul": (_PRODUCT, _PRODUCT, _PRODUCT),
    "div": (_QUOTIENT, _PRODUCT, _ATOM),
}
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


def format_number(
    value: float | complex, digits: int | None = DIGITS, dtype: torch.dtype | None = None
) -> str:
    """Format a number with some decimal places, or in scientific notation if it is very small or large.

    Args:
        value: The number.
        digits: The number of decimal places. None gives as many as are needed to tell the number from all
            others of its dtype.
        dtype: The dtype of the tensor that the number comes from, for ``digits=None``.
    """
    if isinstance(value, complex):
        imaginary = format_number(value.imag, digits, dtype)
        sign, size = (" - ", imaginary[1:]) if imaginary.startswith("-") else (" + ", imaginary)
        return f"({format_number(value.real, digits, dtype)}{sign}{size}i)"
    if digits is None:
        return _shortest(value, dtype)
    if not math.isfinite(value) or value == 0 or 0.5 * 10.0 ** -min(digits, DIGITS) <= abs(value) < 1e5:
        return f"{value:.{digits}f}"
    return f"{value:.{max(digits - 1, 0)}e}"


def _shortest(value: float, dtype: torch.dtype | None) -> str:
    """Return the shortest text that is read as the same number of a dtype."""
    if dtype is None or not dtype.is_floating_point or not math.isfinite(value):
        return repr(value)
    for precision in range(1, 17):
        text = f"{value:.{precision}g}"
        if torch.tensor(float(text), dtype=dtype).item() == value:
            return text if abs(value) < 1e5 or "e" in text else repr(float(text))
    return repr(value)


def format_operand(value: float | complex, digits: int | None, dtype: torch.dtype | None = None) -> str:
    """Format a number in a line of arithmetic: without zeros at the end if it has no more digits.

    The minus sign is U+2212.
    """
    text = format_number(value, digits, dtype)
    if not isinstance(value, complex) and "." in text and "e" not in text:
        short = text.rstrip("0").rstrip(".")
        if abs(float(short) - value) <= 1e-7 * abs(value):  # up to the rounding of float32
            text = short
    return "0" if text == "-0" else with_minus(text)


def with_minus(text: str) -> str:
    """Replace the hyphens that are minus signs of formatted numbers with U+2212."""
    return text.replace("e-", "e~").replace("-", MINUS).replace("e~", "e-")


@dataclass(frozen=True)
class Arithmetic:
    """Some arithmetic as text, and what it amounts to.

    Attributes:
        text: The text.
        precedence: Its operator precedence.
        value: The result for the operands as they are printed. None if it can't be computed.
    """

    text: str
    precedence: int
    value: Any

    def in_parentheses(self, minimum: int, signed: bool = True) -> str:
        """Return the text, in parentheses if its precedence is too low.

        Args:
            minimum: The lowest precedence without parentheses.
            signed: Whether it may begin with a minus sign.
        """
        is_plain = self.precedence >= minimum and (signed or not self.text.startswith(MINUS))
        return self.text if is_plain else f"({self.text})"


def digits_for(
    evaluate: Callable[[int], Any], value: float | complex, digits: int = DIGITS
) -> tuple[int, int] | None:
    """Find the fewest digits with which a line of arithmetic is right when it is checked by hand.

    If the printed operands don't give the printed result, the operands get more digits, one at a time. If
    this doesn't help either, because the result is close to the middle between two printed numbers, the
    result gets more digits, too.

    Args:
        evaluate: Computes the result from operands that are rounded to a number of digits.
        value: The result.
        digits: The minimum number of digits.

    Returns:
        The digits of the operands and of the result. None if no number of digits will do, since the layer
        computed the result with larger rounding errors.
    """
    for result_digits in range(digits, digits + _MORE_RESULT_DIGITS + 1):
        for operand_digits in range(result_digits, result_digits + _MORE_DIGITS + 1):
            if _agrees(evaluate(operand_digits), value, result_digits):
                return operand_digits, result_digits
    return None


def _agrees(computed: Any, value: float | complex, digits: int) -> bool:
    """Whether a computed number, rounded, is the printed one. Both signs of zero are the same."""
    if computed is None:
        return False
    if isinstance(value, complex) or isinstance(computed, complex):
        return format_number(complex(computed), digits) == format_number(complex(value), digits)
    texts = {format_number(float(number), digits) for number in (computed, value)}
    if len(texts) == 1 or texts == {format_number(0.0, digits), format_number(-0.0, digits)}:
        return True
    (text, other) = texts
    return not ("e" in text or "e" in other) and float(text) == float(other)


def explain(node: Node, index: int, value: float | complex, terms: int | None, digits: int | None) -> str:
    """Format the arithmetic that computed one element of a tensor, and its result.

    The sign before the result is "≈" instead of "=" where no number of digits makes the line right.

    Args:
        node: Node of the tensor in the computation graph.
        index: Flat index of the element.
        value: The element.
        terms: Maximum number of terms of a sum. A longer sum shows its largest terms and the rest's total.
            None shows all of them.
        digits: Minimum number of decimal places. None shows the operands exactly, and the result with as many
            digits as are right.
    """
    source, _ = node.source(index)
    if source.kind == "value" and not source.name:
        return unexplained(value, digits, node.numbers.dtype)

    def evaluate(operand_digits: int) -> Any:
        return arithmetic(node, index, terms, operand_digits).value

    with torch.random.fork_rng(cuda_devices(node.numbers)), torch.no_grad():
        if digits is None:
            exact = arithmetic(node, index, terms, None)
            decimals = (d for d in range(16, 0, -1) if _agrees(exact.value, value, d))
            result_digits = next(decimals, None)
            relation = "=" if result_digits else "≈"
            result = format_number(value, result_digits or DIGITS)
            return f"{exact.text} {relation} {with_minus(result)}"
        found = digits_for(evaluate, value, digits)
        operand_digits, result_digits = found or (digits, digits)
        text = arithmetic(node, index, terms, operand_digits).text
    return f"{text} {'=' if found else '≈'} {with_minus(format_number(value, result_digits))}"


def unexplained(value: float | complex, digits: int | None, dtype: torch.dtype) -> str:
    """Format a number for which there is no arithmetic."""
    text = with_minus(format_number(value, digits, dtype))
    return f"{text} = {text}"


def arithmetic(node: Node, index: int, terms: int | None, digits: int | None) -> Arithmetic:
    """Format the arithmetic that computed one element of a tensor, with a fixed number of digits.

    Args:
        node: Node of the tensor in the computation graph.
        index: Flat index of the element.
        terms: Maximum number of terms of a sum; None for all.
        digits: Number of decimal places; None for all.
    """
    node, index = node.source(index)
    formatter = _Formatter(terms, digits)
    if node.kind == "value" and node.name:  # an element of another quantity
        number = _element(node, index)
        return Arithmetic(node.name + _subscript(node.numbers, index), _ATOM, number)
    return formatter.format(node, index)


@dataclass(frozen=True)
class _Formatter:
    terms: int | None
    digits: int | None

    def format(self, node: Node, index: int) -> Arithmetic:
        """Format one element."""
        match node.kind:
            case "constant":
                return Arithmetic(with_minus(node.name), _ATOM, _constant(node.name))
            case "infix":
                return self._infix(node, index)
            case "negated":
                operand = self._operand(node, 0, index)
                value = None if operand.value is None else -operand.value
                return Arithmetic(MINUS + operand.in_parentheses(_ATOM, signed=False), _PRODUCT, value)
            case "sum":
                return self._weighted_sum(node, index)
            case "moved":
                return self.format(*node.source(index))
            case "call":
                return self._call(node, index)
            case "rows":
                return self._function_of_rows(node, index)
        return self._number(_element(node, index), node.numbers.dtype)

    def _number(self, value: float | complex, dtype: torch.dtype) -> Arithmetic:
        text = format_operand(value, self.digits, dtype)
        return Arithmetic(text, _ATOM, _read(text, value))

    def _operand(self, node: Node, operand: int, index: int) -> Arithmetic:
        return self.format(node.operands[operand], node.operand_index(operand, index))

    def _infix(self, node: Node, index: int) -> Arithmetic:
        precedence, left_minimum, right_minimum = _PRECEDENCE[node.name]
        left, right = self._operand(node, 0, index), self._operand(node, 1, index)
        left_text = left.in_parentheses(left_minimum)
        if node.name == "add":
            text = _join([left_text, right.in_parentheses(right_minimum)])
        else:
            text = (
                left_text + with_minus(INFIX[node.name]) + right.in_parentheses(right_minimum, signed=False)
            )
        return Arithmetic(text, precedence, _compute(_OPERATORS[node.name], left.value, right.value))

    def _weighted_sum(self, node: Node, index: int) -> Arithmetic:
        """Format a weighted sum: each weight times its input, plus the bias."""
        row, unit = divmod(index, node.numbers.shape[-1])
        input_, weight = (part.read().reshape(part.numbers.shape) for part in node.operands[:2])
        inputs: list[Any] = input_.reshape(-1, input_.shape[-1])[row].tolist()
        weights: list[Any] = (weight[:, unit] if node.weight_transposed else weight[unit]).tolist()
        sizes = [abs(w * v) for w, v in zip(weights, inputs, strict=True)]
        sizes = [size if math.isfinite(size) else math.inf for size in sizes]
        largest = sorted(sorted(range(len(sizes)), key=lambda k: -sizes[k])[: self.terms])
        texts, values = [], []
        for k in largest:
            factor, number = self._number(weights[k], weight.dtype), self._number(inputs[k], input_.dtype)
            texts.append(f"{factor.text}·{number.in_parentheses(_ATOM, signed=False)}")
            values.append(factor.value * number.value)
        others = set(range(len(sizes))) - set(largest)
        if others:
            products = [weights[k] * inputs[k] for k in others]
            total = sum(products) if isinstance(products[0], complex) else math.fsum(products)
            rest = self._number(total, torch.float64)
            texts.append(f"({len(others)} more terms: {rest.text})")
            values.append(rest.value)
        if len(node.operands) > 2:
            bias = node.operands[2].read()
            term = self._number(bias[unit].item(), bias.dtype)
            texts.append(term.text)
            values.append(term.value)
        is_real = not any(isinstance(value, complex) for value in values)
        total = math.fsum(values) if is_real and all(map(math.isfinite, values)) else sum(values)
        return Arithmetic(_join(texts), _SUM if len(texts) > 1 else _PRODUCT, total)

    def _call(self, node: Node, index: int) -> Arithmetic:
        operands = [self._operand(node, k, index) for k in range(len(node.operands))]
        dtypes = [None if part.tensor is None else part.numbers.dtype for part in node.operands]
        values = [
            None if operand.value is None else _wide(torch.tensor(operand.value, dtype=dtype))
            for operand, dtype in zip(operands, map(_wide_dtype, dtypes), strict=True)
            if dtype is not None
        ]
        value = _compute(lambda *tensors: _apply(node, tensors).item(), *values)
        return Arithmetic(f"{node.name}({', '.join(part.text for part in operands)})", _ATOM, value)

    def _function_of_rows(self, node: Node, index: int) -> Arithmetic:
        """Format one element of a function of whole rows: the function, its operands and a subscript."""
        result = node.numbers
        rows = result.shape[0] if result.dim() > 1 else None
        row = index * result.shape[0] // result.numel() if result.dim() > 1 else 0
        texts, values = [], []
        for part in node.operands:
            value = part.read().reshape(part.numbers.shape)
            is_row = value.dim() > 1 and value.shape[0] == rows
            shown = [
                self._number(v, value.dtype) for v in (value[row] if is_row else value).flatten().tolist()
            ]
            limit = len(shown) if self.terms is None else self.terms
            listed = [number.text for number in shown[:limit]]
            texts.append(f"[{', '.join([*listed, '…'] if len(shown) > limit else listed)}]")
            value = _wide(value.clone())
            if len(shown) <= limit and value.is_floating_point():
                printed = torch.tensor([number.value for number in shown], dtype=torch.float64)
                (value[row] if is_row else value).copy_(printed.reshape(value.shape[1 if is_row else 0 :]))
            values.append(value)
        computed = _compute(lambda *tensors: _apply(node, tensors).flatten()[index].item(), *values)
        return Arithmetic(f"{node.name}({', '.join(texts)}){_subscript(result, index)}", _ATOM, computed)


def _join(texts: list[str]) -> str:
    """Join the terms of a sum. A minus sign of a term replaces the plus sign before it."""
    pairs = itertools.pairwise(["", *texts])
    parts = [
        f" {MINUS} {text[1:]}" if text.startswith(MINUS) else f" + {text}" for before, text in pairs if before
    ]
    return "".join([texts[0], *parts])


def _compute(function: Callable[..., Any], *values: Any) -> Any:
    """Return a function of some values; None if one of them is None, or it can't be computed."""
    if any(value is None for value in values):
        return None
    try:
        return function(*values)
    except (ArithmeticError, RuntimeError, TypeError, ValueError, IndexError):
        return None


def _apply(node: Node, tensors: tuple[Tensor, ...]) -> Tensor:
    assert node.function is not None
    return node.function(*tensors)


def _wide_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return torch.complex128 if dtype.is_complex else torch.float64


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _constant(text: str) -> Any:
    try:
        return float(text)
    except ValueError:  # a word
        return None


def _read(text: str, value: float | complex) -> Any:
    """Return the number that is printed."""
    plain = text.replace(MINUS, "-")
    if isinstance(value, complex):
        return complex(plain.strip("()").replace(" ", "").replace("i", "j"))
    return type(value)(float(plain)) if isinstance(value, int) else float(plain)


def _element(node: Node, index: int) -> float | complex:
    value: float | complex = node.numbers.flatten()[index].item()
    return value


def _subscript(tensor: Tensor, index: int) -> str:
    """Format the position of an element in its row as ``[3]``; empty if it is the only element."""
    position = [int(axis) for axis in torch.unravel_index(torch.tensor(index), tensor.shape)]
    position = position[1:] if tensor.dim() > 1 and len(tensor) == 1 else position
    return f"[{', '.join(map(str, position))}]" if tensor.numel() > 1 else ""

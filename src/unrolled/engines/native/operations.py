"""The operations that the compiler supports, as expressions of functions on vectors.

Each operation is defined once. The engine generates C++ from it, and the export C, which has no overloaded
functions.
Booleans are 1 or 0 in the dtype of the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from unrolled.engines.compiler.kernel_ir import Apply
from unrolled.engines.compiler.lowering.dtypes import round_to_float32

aten = torch.ops.aten


@dataclass(frozen=True)
class Expression:
    """An expression. Use Python's operators to build larger expressions."""

    def __mul__(self, other: Expression) -> Expression:
        return Infix("*", self, other)

    def __truediv__(self, other: Expression) -> Expression:
        return Infix("/", self, other)

    def __neg__(self) -> Expression:
        return Negative(self)

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The subexpressions."""
        return ()

    @property
    def is_call(self) -> bool:
        """Whether this is a function call, whose operands need no parentheses."""
        simple = all(isinstance(part, (Operand, Zero)) for part in self.parts)
        return isinstance(self, (Call, Truth)) and simple

    def uses(self, position: int) -> int:
        """Return how often an operand appears."""
        return sum(part.uses(position) for part in self.parts)


@dataclass(frozen=True)
class Operand(Expression):
    """An operand of the operation, by its position."""

    position: int

    def uses(self, position: int) -> int:
        """Return how often an operand appears."""
        return int(position == self.position)


@dataclass(frozen=True)
class Zero(Expression):
    """A vector of zeros."""


@dataclass(frozen=True)
class Splat(Expression):
    """A vector whose elements are all one number. The number is the same text in C and C++."""

    number: str


@dataclass(frozen=True)
class Call(Expression):
    """A call of a function on vectors."""

    function: str
    arguments: tuple[Expression, ...]

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The subexpressions."""
        return self.arguments


@dataclass(frozen=True)
class _Pair(Expression):
    """Two expressions with an operator between them."""

    operator: str
    left: Expression
    right: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The subexpressions."""
        return self.left, self.right


@dataclass(frozen=True)
class Infix(_Pair):
    """Arithmetic of two expressions."""


@dataclass(frozen=True)
class Negative(Expression):
    """A negated expression."""

    value: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The subexpressions."""
        return (self.value,)


@dataclass(frozen=True)
class Truth(_Pair):
    """A comparison, as 1 or 0."""


@dataclass(frozen=True)
class Reduction:
    """A reduction of a row.

    Attributes:
        name: Its class in include/scalars.h.
        combine: The function that combines two values, in the export's runtime.
        neutral: Its neutral element.
    """

    name: str
    combine: str
    neutral: Splat


@dataclass(frozen=True)
class Language:
    """The syntax of expressions in a language.

    Attributes:
        function: The name of a function on vectors.
        zero: A vector of zeros.
        number: A number as a literal.
    """

    function: Callable[[str], str]
    zero: str
    number: Callable[[float], str]

    def spell(self, expression: Expression, operands: list[str]) -> str:
        """Return an expression in this language.

        Args:
            expression: The expression.
            operands: The operands in this language.
        """
        match expression:
            case Operand(position):
                return operands[position]
            case Zero():
                return self.zero
            case Splat(number):
                return f"splat({number})"
            case Call(function, arguments):
                parts = [self.spell(argument, operands) for argument in arguments]
                return f"{self.function(function)}({', '.join(parts)})"
            case Infix(operator, left, right):
                return f"({self.spell(left, operands)} {operator} {self.spell(right, operands)})"
            case Negative(value):
                return f"(-{self.spell(value, operands)})"
            case Truth(operator, left, right):
                comparison = f"{self.spell(left, operands)} {operator} {self.spell(right, operands)}"
                return f"{self.function('truth')}({comparison})"
        raise AssertionError(expression)

    def apply(self, instruction: Apply, operands: list[str]) -> str:
        """Return an operation in this language."""
        if instruction.target not in ADDITIVE:
            return self.spell(OPERATIONS[instruction.target], operands)
        left, right = operands
        if instruction.alpha != 1:
            right = f"({right} * splat({self.number(instruction.alpha)}))"
        return f"({left} {ADDITIVE[instruction.target]} {right})"


def expression_of(instruction: Apply) -> Expression:
    """Return the expression of an operation, without the ``alpha`` of an addition."""
    sign = ADDITIVE.get(instruction.target)
    return OPERATIONS[instruction.target] if sign is None else Infix(sign, _A, _B)


def _call(function: str, *arguments: Expression) -> Expression:
    return Call(function, arguments)


_A, _B, _C, _ZERO, _ONE = Operand(0), Operand(1), Operand(2), Zero(), Splat("1")
_A_IS_NAN, _B_IS_NAN = Truth("!=", _A, _A), Truth("!=", _B, _B)


def _ignoring_nan(function: str) -> Expression:
    """Return an operation of two operands that ignores NaN unless both are NaN."""
    return _call("where", _A_IS_NAN, _B, _call("where", _B_IS_NAN, _A, _call(function, _A, _B)))


OPERATIONS: dict[object, Expression] = {
    aten.rsqrt.default: _ONE / _call("sqrt", _A),
    aten.reciprocal.default: _ONE / _A,
    aten.neg.default: -_A,
    aten.abs.default: _call("absolute", _A),
    aten.sgn.default: _call("sign", _A),
    aten.clone.default: _A,
    aten._to_copy.default: _A,  # of a bool, to the dtype of the loop
    round_to_float32: _call("round_to_float", _A),
    aten.expand.default: _A,
    aten.mul.Tensor: _A * _B,
    aten.mul.Scalar: _A * _B,
    aten.div.Tensor: _A / _B,
    aten.div.Scalar: _A / _B,
    aten.pow.Tensor_Scalar: _call("pow", _A, _B),
    aten.pow.Tensor_Tensor: _call("pow", _A, _B),
    aten.pow.Scalar: _call("pow", _A, _B),
    aten.remainder.Scalar: _call("remainder", _A, _B),
    aten.remainder.Tensor: _call("remainder", _A, _B),
    aten.fmod.Scalar: _call("fmod", _A, _B),
    aten.fmod.Tensor: _call("fmod", _A, _B),
    aten.fmax.default: _ignoring_nan("maximum"),
    aten.fmin.default: _ignoring_nan("minimum"),
    aten.copysign.Tensor: _call("sign_of", _call("absolute", _A), _B),
    aten.signbit.default: Truth("<", _call("sign_of", _ONE, _A), _ZERO),
    aten.where.self: _call("where", _A, _B, _C),
    aten.isnan.default: _A_IS_NAN,
    aten.isinf.default: Truth("==", _call("absolute", _A), Splat("INFINITY")),
    aten.logical_not.default: Truth("==", _A, _ZERO),
    aten.bitwise_not.default: Truth("==", _A, _ZERO),
    aten.logical_and.default: _A * _B,
    aten.bitwise_and.Tensor: _A * _B,
    aten.logical_or.default: _call("maximum", _A, _B),
    aten.bitwise_or.Tensor: _call("maximum", _A, _B),
    aten.logical_xor.default: Truth("!=", _A, _B),
    aten.bitwise_xor.Tensor: Truth("!=", _A, _B),
}
for _name in (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sigmoid", "tanh", "relu", "erf", "erfc",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh",
    "sign", "floor", "ceil", "round", "trunc",
):  # fmt: skip
    OPERATIONS[getattr(aten, _name).default] = _call(_name, _A)
for _name in ("maximum", "minimum", "atan2", "hypot"):
    OPERATIONS[getattr(aten, _name).default] = _call(_name, _A, _B)
for _name, _sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items():
    for _kind in ("Scalar", "Tensor"):
        OPERATIONS[getattr(getattr(aten, _name), _kind)] = Truth(_sign, _A, _B)

ADDITIVE: dict[object, str] = {
    aten.add.Tensor: "+",
    aten.sub.Tensor: "-",
    aten.add.Scalar: "+",
    aten.sub.Scalar: "-",
}

REDUCTIONS: dict[object, Reduction] = {
    aten.sum.dim_IntList: Reduction("Sum", "add", Splat("0")),
    aten.prod.dim_int: Reduction("Product", "multiply", Splat("1")),
    aten.amax.default: Reduction("Maximum", "maximum", Splat("-INFINITY")),
    aten.amin.default: Reduction("Minimum", "minimum", Splat("INFINITY")),
}

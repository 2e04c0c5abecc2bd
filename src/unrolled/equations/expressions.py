"""Translation of the expressions of a step to MathML. What has no faithful notation is not translated."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from unrolled.equations import mathml
from unrolled.equations.mathml import FACTORS, SUMS, TERMS, Math, bracketed, matrix_product, mrow, separated
from unrolled.equations.scope import Scope

SPLITTING_FUNCTIONS = ("chunk", "split", "tensor_split", "unbind")  # their results together are the tensor
_FUNCTION_SYMBOLS = {"sigmoid": "σ", "expit": "σ", "relu": "ReLU", "silu": "SiLU", "gelu": "GELU"}
_OPERATORS: dict[str, ast.operator] = {
    **dict.fromkeys(("add",), ast.Add()),
    **dict.fromkeys(("sub", "subtract"), ast.Sub()),
    **dict.fromkeys(("mul", "multiply"), ast.Mult()),
    **dict.fromkeys(("div", "divide", "true_divide"), ast.Div()),
    **dict.fromkeys(("matmul", "mm"), ast.MatMult()),
    **dict.fromkeys(("pow",), ast.Pow()),
}
_RELATIONS = {ast.Gt: "&gt;", ast.Lt: "&lt;", ast.GtE: "≥", ast.LtE: "≤", ast.Eq: "=", ast.NotEq: "≠"}
_UNREADABLE = (ast.Lambda, ast.NamedExpr, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
               ast.Starred, ast.Await, ast.Yield, ast.YieldFrom)  # fmt: skip


class NoFormulaError(Exception):
    """An expression has no faithful notation. Its whole statement is shown as code instead."""


class ExpressionWriter:
    """Translates expressions to MathML.

    Args:
        scope: What the names of the step refer to.
        source: The source code, to write numbers with the same digits.
        quantity: Returns the current symbol of a local variable. Raises ``NoFormulaError`` if the variable
            has no value yet.
        is_unambiguous: Whether a name has one meaning in the whole step. Only such names may appear in code
            within a formula.
        is_batched: Whether a variable has a row for each row of the batch.
        names: All names of the code.
    """

    def __init__(
        self,
        scope: Scope,
        source: str,
        quantity: Callable[[str], Math],
        is_unambiguous: Callable[[str], bool],
        is_batched: Callable[[str], bool],
        names: set[str],
    ) -> None:
        self._scope = scope
        self._source = source
        self._quantity = quantity
        self._is_unambiguous = is_unambiguous
        self._is_batched = is_batched
        self._names = names

    def write(self, node: ast.expr) -> Math:
        """Translate an expression to MathML.

        Raises:
            NoFormulaError: If no notation says all that the expression says.
        """
        match node:
            case ast.Name(id=name):
                if name in self._scope.local_names:
                    return self._quantity(name)
                if name == self._scope.self_name or name in dir(self._scope.cell):
                    raise NoFormulaError  # its symbol would be that of the cell's attribute
                return Math(self._symbol(name))
            case ast.Constant(value=bool() | None | str() | bytes()):
                return mathml.code(ast.unparse(node), "atom")
            case ast.Constant():
                return mathml.number(ast.get_source_segment(self._source, node) or ast.unparse(node))
            case ast.Attribute(value=ast.Name(id=self._scope.self_name), attr=name):
                return self._cell_attribute(node, name)
            case ast.Attribute(value=value, attr="T" | "mT") if self._uses_step_values(value):
                return mathml.power(self.write(value), "<mo>⊤</mo>")
            case ast.Tuple(elts=[only]):
                return Math(bracketed(f"{self.write(only).text}<mo>,</mo>"))
            case ast.Tuple(elts=parts) | ast.List(elts=parts) if parts:
                return Math(bracketed(separated([self.write(part).text for part in parts])))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._negative(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.write(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, left, op, right)
            case ast.Compare(left=left, ops=ops, comparators=others) if {*map(type, ops)} <= {*_RELATIONS}:
                sides = [self.write(part).as_operand(SUMS, first=True) for part in (left, *others)]
                signs = ("", *(f"<mo>{_RELATIONS[type(op)]}</mo>" for op in ops))
                text = "".join(sign + side for sign, side in zip(signs, sides, strict=True))
                return Math(text, "code" if any(isinstance(op, ast.Eq) for op in ops) else "relation")
            case ast.Call():
                return self._call(node)
        return self._code(node)

    def depends_on_batch(self, node: ast.AST) -> bool:
        """Return whether a node uses the input or a state, and so has a row for each row of the batch."""
        return any(isinstance(part, ast.Name) and self._is_batched(part.id) for part in ast.walk(node))

    def resolve_call(self, node: ast.Call) -> tuple[str, bool, list[ast.expr]] | None:
        """Resolve the function of a call.

        Returns:
            The name of the function, whether it is torch's, and its positional arguments. The tensor of a
            method comes first. None if the function is unknown.
        """
        if isinstance(node.func, ast.Attribute) and self._scope.is_tensor_method(node.func):
            return node.func.attr, True, [node.func.value, *node.args]
        function = self._scope.resolve_function(node.func)
        return (*function, list(node.args)) if function else None

    def _uses_step_values(self, node: ast.expr) -> bool:
        step_names = {*self._scope.local_names, self._scope.self_name}
        return any(isinstance(part, ast.Name) and part.id in step_names for part in ast.walk(node))

    def _code(self, node: ast.expr) -> Math:
        """Write an expression as code within a formula, if each of its names has one meaning."""
        for part in ast.walk(node):
            if isinstance(part, _UNREADABLE) or (
                isinstance(part, ast.Name) and not self._is_unambiguous(part.id)
            ):
                raise NoFormulaError
        return mathml.code(
            ast.unparse(node), "atom" if isinstance(node, (ast.Subscript, ast.Attribute)) else "code"
        )

    def _symbol(self, name: str) -> str:
        for word, letter in (("weight", "W"), ("bias", "b")):
            letter_in_use = any(other.partition("_")[0] == letter for other in self._names)
            if name.partition("_")[0] == word and not letter_in_use:
                return mathml.symbol(letter + name.removeprefix(word))
        return mathml.symbol(name)

    def _cell_attribute(self, node: ast.expr, name: str) -> Math:
        """Write an attribute of the cell: the symbol of a parameter, or the value of an option."""
        value = self._constant_number(node)
        if value is None and self._scope.evaluate(node) is None:  # a parameter that this cell doesn't have
            return mathml.code("None", "atom")
        if value is None:
            return Math(self._symbol(name))
        if isinstance(value, int):
            return mathml.number(str(value))
        short = f"{value:g}"
        return mathml.number(short if float(short) == value or value != value else repr(value))

    def _constant_number(self, node: ast.expr) -> float | int | None:
        """Return the value of an expression that is the same number for every input, or None."""
        value = self._scope.evaluate(node)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if isinstance(value, float) else int(value)

    def _negative(self, operand: ast.expr) -> Math:
        inner = self.write(operand)
        keeps_kind = inner.kind in ("matrix", "linear") and not inner.leading_minus
        return Math(f"<mo>−</mo>{inner.as_operand(TERMS)}", inner.kind if keeps_kind else "product", True)

    def _binary(self, node: ast.expr, left: ast.expr, op: ast.operator, right: ast.expr) -> Math:
        if not isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow)):
            return self._code(node)
        a, b = self.write(left), self.write(right)
        match op:
            case ast.Div():
                return Math(f"<mfrac>{mrow(a.text)}{mrow(b.text)}</mfrac>", "fraction")
            case ast.Pow():
                return mathml.power(a, b.text)
            case ast.MatMult():
                transposed = isinstance(right, ast.Attribute) and right.attr in ("T", "mT")
                if self.depends_on_batch(right) and not self.depends_on_batch(left) and not transposed:
                    raise NoFormulaError  # W x is linear(x, W), the product with each row of x
                kinds = FACTORS | {"matrix"}
                text = matrix_product(a.as_operand(kinds, first=True), b.as_operand(kinds))
                return Math(text, "matrix", _starts_with_minus(a, kinds))
            case ast.Mult():
                has_scalar = any(self._constant_number(part) is not None for part in (left, right))
                kinds = FACTORS | {"product"}
                sign = "·" if has_scalar else "⊙"
                text = f"{a.as_operand(kinds, first=True)}<mo>{sign}</mo>{b.as_operand(kinds)}"
                return Math(text, "product", _starts_with_minus(a, kinds))
            case ast.Add():
                text = f"{a.as_operand(SUMS, first=True)}<mo>+</mo>{b.as_operand(SUMS)}"
                return Math(text, "sum", _starts_with_minus(a, SUMS))
        text = f"{a.as_operand(SUMS, first=True)}<mo>−</mo>{b.as_operand(TERMS)}"
        return Math(text, "sum", _starts_with_minus(a, SUMS))

    def _call(self, node: ast.Call) -> Math:
        call = self.resolve_call(node)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if call is None or len(keywords) < len(node.keywords) or {"out", "inplace"} & {*keywords}:
            raise NoFormulaError
        name, is_torch, arguments = call
        if name.endswith("_") or any(isinstance(part, ast.Starred) for part in arguments):
            raise NoFormulaError
        if is_torch and (math := self._special_notation(name, arguments, keywords)):
            return math
        texts = [*map(self._argument, arguments), *self._keyword_arguments(keywords)]
        symbol = _FUNCTION_SYMBOLS.get(name, name) if is_torch else name
        if symbol == "σ" and "sigma" in self._names:
            symbol = "sigmoid"
        return self._function(symbol, texts)

    def _argument(self, node: ast.expr) -> str:
        return self.write(node).as_operand(SUMS | {"relation"}, first=True)

    def _keyword_arguments(self, keywords: dict[str, ast.expr]) -> list[str]:
        return [f"{mathml.upright(key)}<mo>=</mo>{self._argument(value)}" for key, value in keywords.items()]

    def _special_notation(
        self, name: str, arguments: list[ast.expr], keywords: dict[str, ast.expr]
    ) -> Math | None:
        """Write a call of a torch function that has its own notation, or return None.

        Arguments that have no influence on the value are left out, such as the axis of a softmax over the
        features.
        """
        if name in _OPERATORS and len(arguments) == 2 and not keywords:
            left, right = arguments
            operation = ast.fix_missing_locations(ast.BinOp(left, _OPERATORS[name], right))
            return self._binary(operation, left, _OPERATORS[name], right)
        if name in ("neg", "negative") and len(arguments) == 1 and not keywords:
            return self._negative(arguments[0])
        if name == "exp" and len(arguments) == 1 and not keywords and "e" not in self._names:
            return Math(f"<msup><mi>e</mi>{mrow(self.write(arguments[0]).text)}</msup>", "power")
        if name in ("contiguous", "clone") and len(arguments) == 1 and not keywords:
            return self.write(arguments[0])
        match name, _bind_arguments(name, arguments, keywords):
            case "linear", {"input": x, "weight": weight, **more} if set(more) <= {"bias"}:
                return self._linear(x, weight, more.get("bias"))
            case "cat" | "concat" | "concatenate", {"tensors": tensors, "dim": dim} if self._is_feature_dim(
                dim
            ):
                if isinstance(tensors, (ast.Tuple, ast.List)) and all(
                    map(self.depends_on_batch, tensors.elts)
                ):
                    parts = [self.write(part).text for part in tensors.elts]
                    return Math(bracketed(separated(parts, ";"), "[", "]"))
            case "softmax" | "log_softmax", {"input": x, "dim": dim, **more} if (
                not more and self._is_feature_dim(dim)
            ):
                return self._function(name, [self._argument(x)])
            case "layer_norm", {"input": x, "normalized_shape": _, **more}:
                return self._function(name, [self._argument(x), *self._keyword_arguments(more)])
        return None

    def _function(self, name: str, arguments: list[str]) -> Math:
        return Math(f"{mathml.upright(name)}<mo>&#x2061;</mo>{bracketed(separated(arguments))}", "call")

    def _linear(self, x: ast.expr, weight: ast.expr, bias: ast.expr | None) -> Math:
        if self.depends_on_batch(weight):
            raise NoFormulaError
        inner = self.write(x).as_operand(frozenset(("atom", "call", "fraction")))
        product = matrix_product(self.write(weight).as_operand(FACTORS), inner)
        if bias is None or self._scope.evaluate(bias) is None:
            return Math(product, "linear")
        return Math(f"{product}<mo>+</mo>{self.write(bias).as_operand(SUMS)}", "sum")

    def _is_feature_dim(self, dim: ast.expr) -> bool:
        value = self._scope.evaluate(dim)
        return isinstance(value, int) and value in (-1, 1)


def _starts_with_minus(first: Math, kinds: frozenset[str]) -> bool:
    """Return whether an operation starts with a minus sign, given its first operand."""
    return first.leading_minus and first.kind in kinds


_PARAMETERS: dict[str, Sequence[str]] = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(("cat", "concat", "concatenate"), ("tensors", "dim")),
    **dict.fromkeys(("softmax", "log_softmax"), ("input", "dim")),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
}


def _bind_arguments(name: str, arguments: list[ast.expr], keywords: dict[str, ast.expr]) -> dict[str, Any]:
    """Return the arguments of a function in ``_PARAMETERS`` by name, or nothing if they don't fit."""
    names = _PARAMETERS.get(name, ())
    if len(arguments) > len(names):
        return {}
    return {**dict(zip(names, arguments, strict=False)), **keywords}

"""Expressions of a step in mathematical form: right, or not written at all."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from unrolled.equations import mathml
from unrolled.equations.mathml import FACTORS, SUMS, TERMS, Math, beside, bracketed, listed, row
from unrolled.equations.scope import Scope

PARTS = ("chunk", "split", "tensor_split", "unbind")  # whose parts are a list of all of a tensor
_FUNCTIONS = {"sigmoid": "σ", "expit": "σ", "relu": "ReLU", "silu": "SiLU", "gelu": "GELU"}
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
    """An expression that is shown as code, with all of its statement."""


class Writer:
    """Writes expressions.

    Args:
        scope: what names stand for.
        source: the code, for its numbers as they are written there.
        quantity: the name of a local variable as it is written now; raises where it has no value yet.
        plain: whether a name may stand in code within a formula: it has one meaning in the whole step.
        rows: whether a name stands for something with a row for each row of the input.
        names: every name of the code.
    """

    def __init__(
        self,
        scope: Scope,
        source: str,
        quantity: Callable[[str], Math],
        plain: Callable[[str], bool],
        rows: Callable[[str], bool],
        names: set[str],
    ) -> None:
        self._scope = scope
        self._source = source
        self._quantity = quantity
        self._plain = plain
        self._rows = rows
        self._names = names

    def write(self, node: ast.expr) -> Math:
        """An expression as MathML.

        Raises:
            NoFormulaError: it has none that would say all of it.
        """
        match node:
            case ast.Name(id=name):
                if name in self._scope.local:
                    return self._quantity(name)
                if name == self._scope.own or name in dir(self._scope.cell):
                    raise NoFormulaError  # another thing than the cell's of this name
                return Math(self._symbol(name))
            case ast.Constant(value=bool() | None | str() | bytes()):
                return mathml.code(ast.unparse(node), "atom")
            case ast.Constant():
                return mathml.number(ast.get_source_segment(self._source, node) or ast.unparse(node))
            case ast.Attribute(value=ast.Name(id=self._scope.own), attr=name):
                return self._own(node, name)
            case ast.Attribute(value=value, attr="T" | "mT") if self._of_step(value):
                return mathml.raised(self.write(value), "<mo>⊤</mo>")
            case ast.Tuple(elts=[only]):
                return Math(bracketed(f"{self.write(only).text}<mo>,</mo>"))
            case ast.Tuple(elts=parts) | ast.List(elts=parts) if parts:
                return Math(bracketed(listed([self.write(part).text for part in parts])))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._negative(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.write(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, left, op, right)
            case ast.Compare(left=left, ops=ops, comparators=others) if {*map(type, ops)} <= {*_RELATIONS}:
                sides = [self.write(part).held(SUMS, first=True) for part in (left, *others)]
                signs = ("", *(f"<mo>{_RELATIONS[type(op)]}</mo>" for op in ops))
                text = "".join(sign + side for sign, side in zip(signs, sides, strict=True))
                return Math(text, "code" if any(isinstance(op, ast.Eq) for op in ops) else "relation")
            case ast.Call():
                return self._call(node)
        return self._code(node)

    def of_rows(self, node: ast.AST) -> bool:
        """Whether the value of an expression is of the input or a state."""
        return any(isinstance(part, ast.Name) and self._rows(part.id) for part in ast.walk(node))

    def _of_step(self, node: ast.expr) -> bool:
        known = {*self._scope.local, self._scope.own}
        return any(isinstance(part, ast.Name) and part.id in known for part in ast.walk(node))

    def _code(self, node: ast.expr) -> Math:
        """Code within a formula, where each of its names has one meaning."""
        for part in ast.walk(node):
            if isinstance(part, _UNREADABLE) or (isinstance(part, ast.Name) and not self._plain(part.id)):
                raise NoFormulaError
        return mathml.code(
            ast.unparse(node), "atom" if isinstance(node, (ast.Subscript, ast.Attribute)) else "code"
        )

    def _symbol(self, name: str) -> str:
        for long, short in (("weight", "W"), ("bias", "b")):
            taken = any(one.partition("_")[0] == short for one in self._names)
            if name.partition("_")[0] == long and not taken:
                return mathml.symbol(short + name.removeprefix(long))
        return mathml.symbol(name)

    def _own(self, node: ast.expr, name: str) -> Math:
        """An attribute of the cell: a parameter, or the value of an option."""
        value = self._number(node)
        if value is None and self._scope.value(node) is None:  # a parameter that the cell is without
            return mathml.code("None", "atom")
        if value is None:
            return Math(self._symbol(name))
        if isinstance(value, int):
            return mathml.number(str(value))
        short = f"{value:g}"
        return mathml.number(short if float(short) == value or value != value else repr(value))

    def _number(self, node: ast.expr) -> float | int | None:
        """The value of an expression that is a number whatever the input is."""
        found = self._scope.value(node)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return None
        return float(found) if isinstance(found, float) else int(found)

    def _negative(self, operand: ast.expr) -> Math:
        inner = self.write(operand)
        kind = inner.kind if inner.kind in ("matrix", "linear") and not inner.signed else "product"
        return Math(f"<mo>−</mo>{inner.held(TERMS)}", kind, True)

    def _binary(self, node: ast.expr, left: ast.expr, op: ast.operator, right: ast.expr) -> Math:
        if not isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow)):
            return self._code(node)
        a, b = self.write(left), self.write(right)
        match op:
            case ast.Div():
                return Math(f"<mfrac>{row(a.text)}{row(b.text)}</mfrac>", "fraction")
            case ast.Pow():
                return mathml.raised(a, b.text)
            case ast.MatMult():
                turned = isinstance(right, ast.Attribute) and right.attr in ("T", "mT")
                if self.of_rows(right) and not self.of_rows(left) and not turned:
                    raise NoFormulaError  # W x is linear(x, W), each row of x for itself
                kinds = FACTORS | {"matrix"}
                return Math(beside(a.held(kinds, first=True), b.held(kinds)), "matrix", _signed(a, kinds))
            case ast.Mult():
                scalar = any(self._number(part) is not None for part in (left, right))
                kinds = FACTORS | {"product"}
                text = f"{a.held(kinds, first=True)}<mo>{'·' if scalar else '⊙'}</mo>{b.held(kinds)}"
                return Math(text, "product", _signed(a, kinds))
            case ast.Add():
                return Math(f"{a.held(SUMS, first=True)}<mo>+</mo>{b.held(SUMS)}", "sum", _signed(a, SUMS))
        return Math(f"{a.held(SUMS, first=True)}<mo>−</mo>{b.held(TERMS)}", "sum", _signed(a, SUMS))

    def _call(self, node: ast.Call) -> Math:
        named = self.called(node)
        keywords = {one.arg: one.value for one in node.keywords if one.arg}
        if named is None or len(keywords) < len(node.keywords) or {"out", "inplace"} & {*keywords}:
            raise NoFormulaError
        name, torchs, arguments = named
        if name.endswith("_") or any(isinstance(part, ast.Starred) for part in arguments):
            raise NoFormulaError
        if torchs and (found := self._known(name, arguments, keywords)):
            return found
        written = [self._argument(part) for part in arguments]
        written += [
            f"{mathml.upright(key)}<mo>=</mo>{self._argument(part)}" for key, part in keywords.items()
        ]
        shown = _FUNCTIONS.get(name, name) if torchs else name
        if shown == "σ" and "sigma" in self._names:
            shown = "sigmoid"
        return Math(f"{mathml.upright(shown)}<mo>&#x2061;</mo>{bracketed(listed(written))}", "call")

    def called(self, node: ast.Call) -> tuple[str, bool, list[ast.expr]] | None:
        """The name of a function, whether it is torch's, and its arguments; of a method its tensor first."""
        if isinstance(node.func, ast.Attribute) and self._scope.method(node.func):
            return node.func.attr, True, [node.func.value, *node.args]
        found = self._scope.named(node.func)
        return (*found, list(node.args)) if found else None

    def _argument(self, node: ast.expr) -> str:
        return self.write(node).held(SUMS | {"relation"}, first=True)

    def _known(self, name: str, arguments: list[ast.expr], keywords: dict[str, ast.expr]) -> Math | None:
        """A function that has a notation of its own, or an argument that says nothing about the value."""
        if name in _OPERATORS and len(arguments) == 2 and not keywords:
            left, right = arguments
            whole = ast.fix_missing_locations(ast.BinOp(left, _OPERATORS[name], right))
            return self._binary(whole, left, _OPERATORS[name], right)
        if name in ("neg", "negative") and len(arguments) == 1 and not keywords:
            return self._negative(arguments[0])
        if name == "exp" and len(arguments) == 1 and not keywords and "e" not in self._names:
            return Math(f"<msup><mi>e</mi>{row(self.write(arguments[0]).text)}</msup>", "power")
        if name in ("contiguous", "clone") and len(arguments) == 1 and not keywords:
            return self.write(arguments[0])
        match name, _bound(name, arguments, keywords):
            case "linear", {"input": given, "weight": weight, **more} if set(more) <= {"bias"}:
                return self._linear(given, weight, more.get("bias"))
            case "cat" | "concat" | "concatenate", {"tensors": tensors, "dim": axis} if self._last(axis):
                if isinstance(tensors, (ast.Tuple, ast.List)) and all(map(self.of_rows, tensors.elts)):
                    parts = [self.write(part).text for part in tensors.elts]
                    return Math(bracketed(listed(parts, ";"), "[", "]"))
            case "softmax" | "log_softmax", {"input": given, "dim": axis, **more} if not more and self._last(
                axis
            ):
                return self._function(name, [self._argument(given)])
            case "layer_norm", {"input": given, "normalized_shape": _, **more}:
                named = [
                    f"{mathml.upright(key)}<mo>=</mo>{self._argument(part)}" for key, part in more.items()
                ]
                return self._function(name, [self._argument(given), *named])
        return None

    def _function(self, name: str, written: list[str]) -> Math:
        return Math(f"{mathml.upright(name)}<mo>&#x2061;</mo>{bracketed(listed(written))}", "call")

    def _linear(self, given: ast.expr, weight: ast.expr, bias: ast.expr | None) -> Math:
        if self.of_rows(weight):
            raise NoFormulaError
        inner = self.write(given).held(frozenset(("atom", "call", "fraction")))
        math = beside(self.write(weight).held(FACTORS), inner)
        if bias is None or self._scope.value(bias) is None:
            return Math(math, "linear")
        return Math(f"{math}<mo>+</mo>{self.write(bias).held(SUMS)}", "sum")

    def _last(self, axis: ast.expr) -> bool:
        """Whether this is the axis of the features."""
        found = self._scope.value(axis)
        return isinstance(found, int) and found in (-1, 1)


def _signed(first: Math, kinds: frozenset[str]) -> bool:
    """Whether what begins with this operand begins with its minus."""
    return first.signed and first.kind in kinds


_PARAMETERS: dict[str, Sequence[str]] = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(("cat", "concat", "concatenate"), ("tensors", "dim")),
    **dict.fromkeys(("softmax", "log_softmax"), ("input", "dim")),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
}


def _bound(name: str, arguments: list[ast.expr], keywords: dict[str, ast.expr]) -> dict[str, Any]:
    """Arguments by name, of the functions above; none where they don't fit."""
    names = _PARAMETERS.get(name, ())
    if len(arguments) > len(names):
        return {}
    return {**dict(zip(names, arguments, strict=False)), **keywords}

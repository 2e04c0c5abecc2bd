"""A cell's step in mathematical form, as MathML made of its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from unrolled.cell import Cell

_GREEK = {unicodedata.name(letter).split()[-1].lower(): letter for letter in map(chr, range(0x3B1, 0x3CA))}
_GREEK["lambda"] = "λ"  # which Unicode spells otherwise
_FUNCTIONS = {"sigmoid": "σ", "relu": "ReLU", "silu": "SiLU", "gelu": "GELU", "softmax": "softmax"}
_MODULES = ("torch", "F", "functional", "nn", "math", "np", "numpy")
_PARTS = ("chunk", "split", "tensor_split", "unbind", "contiguous", "clone")  # nothing is computed
_SUM, _PRODUCT, _ATOM = range(3)  # how tightly a formula holds together


@dataclass(frozen=True)
class Equation:
    """One equation of a step.

    Attributes:
        names: the quantities that it gives.
        line: which line of the step's code, from 0, as :func:`unrolled.describe.equations` shows it.
        last: the last line of it.
        math: the equation as a ``<math>`` element; the code itself where it is no formula.
    """

    names: tuple[str, ...]
    line: int
    last: int
    math: str


def formulas(cell: Cell) -> list[Equation]:
    """The equations of a cell's step, in the order of the code; none where there is no source.

    ``h`` of the previous step is ``h`` with the index t − 1. A name that is given a value twice has a
    tilde until the last time. What depends on an option of the cell is there as the option is.

    Args:
        cell: the cell, with its options.
    """
    try:
        source = textwrap.dedent(inspect.getsource(cell.innermost.equations()))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return []
    if not isinstance(function, ast.FunctionDef):
        return []
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return _Reader(cell.innermost, _taken(cell.innermost, body)).equations(body[0].lineno) if body else []


def _taken(cell: Cell, body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """The statements that run, where conditions speak of the cell's own options."""
    found: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If) and (chosen := _condition(cell, statement.test)) is not None:
            found += _taken(cell, statement.body if chosen else statement.orelse)
        else:
            found.append(statement)
    return found


def _condition(cell: Cell, test: ast.expr) -> bool | None:
    """Whether a condition on attributes of the cell holds; None for any other condition."""
    known = {name.id for name in ast.walk(test) if isinstance(name, ast.Name)}
    if known != {"self"} or any(isinstance(node, ast.Call) for node in ast.walk(test)):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "step", "eval"), {"__builtins__": {}}, {"self": cell}))
    except Exception:  # the user's own attributes may raise anything
        return None


class _Reader:
    """Reads statements one after another, and knows which names have been given a value by then."""

    def __init__(self, cell: Cell, body: list[ast.stmt]) -> None:
        self._cell = cell
        self._body = body
        stored = [
            node.id
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        self._left = Counter(stored)  # how often each name will still be given a value
        self._given: set[str] = set()
        self._functions: dict[str, str] = {}  # local names of functions

    def equations(self, first: int) -> list[Equation]:
        found: list[Equation] = []
        for statement in self._body:
            lines = statement.lineno - first, (statement.end_lineno or statement.lineno) - first
            for names, math in self._statement(statement):
                found.append(Equation(names, *lines, f"<math>{math}</math>"))
        return found

    def _statement(self, statement: ast.stmt) -> list[tuple[tuple[str, ...], str]]:
        match statement:
            case ast.Assign(targets=[target], value=value):
                return self._assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                return self._assign(target, value)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                return self._assign(target, ast.BinOp(ast.Name(name, ast.Load()), op, value))
            case ast.Return(value=ast.expr() as value):
                values = value.elts if isinstance(value, ast.Tuple) else [value]
                pairs = zip(self._cell.state, values, strict=False)
                new = [(state, v) for state, v in pairs if not (isinstance(v, ast.Name) and v.id == state)]
                made = [(state, self._write(v)) for state, v in new]
                return [((state,), _equal(_indexed(state, "t"), math)) for state, math in made]
        stored = {
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for name in stored:
            self._store(name)
        return [(tuple(sorted(stored)), f"<mtext>{escape(ast.unparse(statement))}</mtext>")]

    def _assign(self, target: ast.expr, value: ast.expr) -> list[tuple[tuple[str, ...], str]]:
        value = self._decided(value)
        match target, value:  # a function under a name of its own
            case ast.Name(id=name), ast.Name(id=function) if not self._known(function):
                self._functions[name] = function
                return []
        targets = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        if not all(isinstance(part, ast.Name) for part in targets):
            code = f"{ast.unparse(target)} = {ast.unparse(value)}"
            return [((), f"<mtext>{escape(code)}</mtext>")]
        names = [part.id for part in targets if isinstance(part, ast.Name)]
        several = isinstance(value, ast.Tuple) and targets != [target] and len(value.elts) == len(names)
        values = value.elts if several and isinstance(value, ast.Tuple) else [value]
        right = [self._write(part) for part in values]  # all of them before any name gets its value
        left = [self._store(name) for name in names]
        if several:
            return [((n,), _equal(a, b)) for n, a, b in zip(names, left, right, strict=True)]
        given = left[0] if len(left) == 1 else _bracketed(_listed(left), "[", "]")
        return [(tuple(names), _equal(given, right[0]))]

    def _decided(self, value: ast.expr) -> ast.expr:
        """What an expression is, where conditions speak of the cell's own options."""
        while isinstance(value, ast.IfExp) and (chosen := _condition(self._cell, value.test)) is not None:
            value = value.body if chosen else value.orelse
        return value

    def _known(self, name: str) -> bool:
        """Whether this is the name of a quantity of the step."""
        return name in self._given or name in self._cell.state or name == "x"

    def _store(self, name: str) -> str:
        self._left[name] -= 1
        self._given.add(name)
        return self._name(name)

    def _name(self, name: str) -> str:
        if name in self._given:
            return _indexed(name, "t", tilde=self._left[name] > 0)
        if name in self._cell.state:
            return _indexed(name, "t−1")
        return _indexed(name, "t") if name == "x" else _symbol(name)

    def _held(self, node: ast.expr, strength: int) -> str:
        return _bracketed(self._write(node)) if _strength(node) < strength else self._write(node)

    def _write(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return self._name(name)
            case ast.Constant(value=value):
                return f"<mn>{escape(f'{value:g}' if isinstance(value, float) else str(value))}</mn>"
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return self._own(name)
            case ast.Attribute(value=value, attr="T" | "mT"):
                return f"<msup>{_row(self._held(value, _ATOM))}<mo>⊤</mo></msup>"
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return _bracketed(_listed([self._write(part) for part in parts]))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"<mo>−</mo>{self._held(operand, _PRODUCT)}"
            case ast.BinOp():
                return self._binary(node)
            case ast.Call():
                return self._call(node)
        return f"<mtext>{escape(ast.unparse(node))}</mtext>"

    def _own(self, name: str) -> str:
        """An attribute of the cell: a parameter, or the value of an option."""
        value = getattr(self._cell, name, None) if name not in self._cell.params() else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f"<mn>{value:g}</mn>"
        return _symbol(name)

    def _binary(self, node: ast.BinOp) -> str:
        left, right = node.left, node.right
        begin = self._write(left) if isinstance(left, ast.UnaryOp) else self._held(left, _PRODUCT)
        match node.op:
            case ast.Div():
                return f"<mfrac>{_row(self._write(left))}{_row(self._write(right))}</mfrac>"
            case ast.Pow():
                return f"<msup>{_row(self._held(left, _ATOM))}{_row(self._write(right))}</msup>"
            case ast.MatMult():
                return _beside(self._held(left, _PRODUCT), self._held(right, _PRODUCT))
            case ast.Mult():
                scalar = any(isinstance(part, (ast.Constant, ast.UnaryOp)) for part in (left, right))
                sign = "·" if scalar else "⊙"
                return f"{begin}<mo>{sign}</mo>{self._held(right, _PRODUCT)}"
            case ast.Add():
                end = self._held(right, _PRODUCT) if isinstance(right, ast.UnaryOp) else self._write(right)
                return f"{self._write(left)}<mo>+</mo>{end}"
            case ast.Sub():
                return f"{self._write(left)}<mo>−</mo>{self._held(right, _PRODUCT)}"
        return f"<mtext>{escape(ast.unparse(node))}</mtext>"

    def _call(self, node: ast.Call) -> str:
        name, arguments = _called(node)
        name = self._functions.get(name, name)
        if name == "linear" and len(arguments) >= 2:
            math = _beside(self._held(arguments[1], _ATOM), self._held(arguments[0], _ATOM))
            biased = len(arguments) > 2 and not self._none(arguments[2])
            return f"{math}<mo>+</mo>{self._write(arguments[2])}" if biased else math
        if name in _PARTS and arguments:
            return self._write(arguments[0])
        if name in ("cat", "concat", "hstack", "stack") and isinstance(arguments[0], (ast.List, ast.Tuple)):
            return _bracketed(_listed([self._write(part) for part in arguments[0].elts], ";"), "[", "]")
        if name in ("matmul", "mm") and len(arguments) == 2:
            return self._binary(ast.BinOp(arguments[0], ast.MatMult(), arguments[1]))
        if name == "exp" and len(arguments) == 1:
            return f"<msup><mi>e</mi>{_row(self._write(arguments[0]))}</msup>"
        settings = (ast.Constant, ast.UnaryOp, ast.Tuple)  # such as an axis or a shape
        tensors = [part for k, part in enumerate(arguments) if k == 0 or not isinstance(part, settings)]
        written = _bracketed(_listed([self._write(part) for part in tensors]))
        return f"{_upright(_FUNCTIONS.get(name, name))}<mo>&#x2061;</mo>{written}"

    def _none(self, node: ast.expr) -> bool:
        """Whether this is a parameter that the cell is without, such as a bias."""
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return name in self._cell.params() and name not in self._cell.shapes()
        return isinstance(node, ast.Constant) and node.value is None


def _called(node: ast.Call) -> tuple[str, list[ast.expr]]:
    """The name of a function or method, and what it is given; of a method its tensor first."""
    arguments = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "bias")]
    match node.func:
        case ast.Name(id=name):
            return name, arguments
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in _MODULES:
            return name, arguments
        case ast.Attribute(value=ast.Attribute(attr=module), attr=name) if module in _MODULES:
            return name, arguments
        case ast.Attribute(value=value, attr=name):
            return name, [value, *arguments]
    return ast.unparse(node.func), arguments


def _strength(node: ast.expr) -> int:
    """How tightly the formula of an expression holds together."""
    match node:
        case ast.BinOp(op=ast.Add() | ast.Sub()) | ast.UnaryOp():
            return _SUM
        case ast.BinOp(op=ast.Mult() | ast.MatMult()):
            return _PRODUCT
        case ast.Call():
            name, arguments = _called(node)
            if name == "linear":
                return _SUM
            return _strength(arguments[0]) if name in _PARTS and arguments else _ATOM
    return _ATOM


def _symbol(name: str) -> str:
    """A name of the code as the symbol that it stands for: ``weight_ih`` is W with the index ih."""
    base, _, index = name.partition("_")
    base = {"weight": "W", "bias": "b"}.get(base, base)
    return f"<msub>{_letter(base)}{_upright(index)}</msub>" if index else _letter(base)


def _indexed(name: str, step: str, tilde: bool = False) -> str:
    """A quantity of a time step."""
    base, _, index = name.partition("_")
    letter = _letter(base)
    if tilde:
        letter = f"<mover accent='true'>{letter}<mo>~</mo></mover>"
    time = f"<mi>t</mi><mo>{step[1]}</mo><mn>1</mn>" if step != "t" else "<mi>t</mi>"
    below = f"{_upright(index)}<mo>,</mo>{time}" if index else time
    return f"<msub>{letter}{_row(below)}</msub>"


def _letter(base: str) -> str:
    shown = _GREEK.get(base, base)
    return f"<mi>{escape(shown)}</mi>" if len(shown) == 1 else _upright(shown)


def _upright(text: str) -> str:
    return f"<mi mathvariant='normal'>{escape(text.replace('_', ' '))}</mi>"


def _beside(left: str, right: str) -> str:
    return f"{left}<mspace width='0.2em'/>{right}"


def _row(math: str) -> str:
    return f"<mrow>{math}</mrow>"


def _bracketed(math: str, opening: str = "(", closing: str = ")") -> str:
    return f"<mrow><mo>{opening}</mo>{math}<mo>{closing}</mo></mrow>"


def _listed(parts: Sequence[str], sign: str = ",") -> str:
    return f"<mo>{sign}</mo>".join(map(_row, parts))


def _equal(left: str, right: str) -> str:
    return f"{left}<mo>=</mo>{right}"

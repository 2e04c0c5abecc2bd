"""A cell's step in mathematical form, as MathML made of its source."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from unrolled.cells.base import Cell
from unrolled.equations import mathml
from unrolled.equations.expressions import PARTS, NoFormulaError, Writer
from unrolled.equations.mathml import SUMS, Math
from unrolled.equations.scope import Scope, assigned, given, shared
from unrolled.equations.source import statements


@dataclass(frozen=True)
class Equation:
    """One equation of a step.

    Attributes:
        names: the quantities that it gives.
        line: which line of the step's code, from 0, as :func:`unrolled.equations.source.equations` shows it.
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
    tilde until the last time; where there are more, or the input is given a value, numbers in brackets.
    What depends on an option of the cell is there as the option is. A statement is there as code where a
    formula would not say all of it.

    Args:
        cell: the cell, with its options.
    """
    cell = cell.innermost
    step = cell.equations()
    try:
        source = textwrap.dedent(inspect.getsource(step))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return []
    if type(cell).step is not step or not isinstance(function, ast.FunctionDef):
        return []  # what runs is not, or not only, this function
    arguments = [one.arg for one in function.args.args]
    body = statements(function)
    if (
        len(arguments) != 2 + len(cell.state)
        or arguments != list(inspect.signature(step).parameters)
        or not body
    ):
        return []
    return _Reader(Scope(cell, step, arguments, body), source, body).equations()


@dataclass(frozen=True)
class _Line:
    """A statement that runs: as it is written, as the options decide it, and the values known before it."""

    written: ast.stmt
    decided: ast.stmt
    values: Mapping[str, Any]


def _taken(scope: Scope, body: Sequence[ast.stmt]) -> list[_Line]:
    """The statements that run, where conditions speak of the cell's own options."""
    found: list[_Line] = []
    for statement in body:
        if isinstance(statement, ast.If) and (chosen := scope.condition(statement.test)) is not None:
            found += _taken(scope, statement.body if chosen else statement.orelse)
        else:
            decided = _Decided(scope).visit(copy.deepcopy(statement))
            found.append(_Line(statement, decided, scope.values))
            scope.learn(decided)
        if found and isinstance(found[-1].written, (ast.Return, ast.Raise)):
            break
    return found


class _Decided(ast.NodeTransformer):
    """Puts in the place of a choice what is chosen, where its condition speaks of options."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        chosen = self._scope.condition(node.test)
        if chosen is None:
            return self.generic_visit(node)
        taken: ast.AST = self.visit(node.body if chosen else node.orelse)
        return taken


class _Reader:
    """Reads statements one after another, and knows which names have been given a value by then."""

    def __init__(self, scope: Scope, source: str, body: list[ast.stmt]) -> None:
        self._scope = scope
        self._states = tuple(scope.cell.state)
        self._first = body[0].lineno
        self._lines = _taken(scope, body)
        self._total: Counter[str] = Counter()  # how often each name is given a value
        self._count: Counter[str] = Counter()  # how often it has been by now
        self._rows = {scope.input, *self._states}  # names of what has a row for each row of the input
        nodes = [node for statement in body for node in ast.walk(statement)]
        names = {
            n.id if isinstance(n, ast.Name) else n.attr
            for n in nodes
            if isinstance(n, (ast.Name, ast.Attribute))
        }
        self._writer = Writer(scope, source, self._name, self._plain, self._rows.__contains__, names)
        unclear = (ast.Global, ast.Nonlocal)
        self._sure = not shared([line.decided for line in self._lines]) and not any(
            isinstance(node, unclear) for node in nodes
        )
        for line in self._lines:
            self._total.update(self._gives(line, set(self._total)))

    def equations(self) -> list[Equation]:
        """An equation for each quantity, or the code, in the order of the statements."""
        return [equation for line in self._lines for equation in self._equations(line)]

    def _equations(self, line: _Line) -> Iterator[Equation]:
        self._scope.values = line.values
        start = line.written.lineno - self._first
        end = (line.written.end_lineno or line.written.lineno) - self._first
        names = self._gives(line, set(self._count))
        before = self._count.copy()
        try:
            made = self._read(line.decided, names)
        except NoFormulaError:
            self._count = before
            self._give(names)
            self._rows |= set(names) if self._writer.of_rows(line.decided) else set()
            text = mathml.code(ast.unparse(line.written)).text
            made = [(tuple(sorted(names)), text)]
        if not isinstance(line.written, ast.Return) and any(
            isinstance(node, ast.Return) for node in ast.walk(line.written)
        ):
            self._sure = False  # what follows may not run
        for given_names, math in made:
            yield Equation(given_names, start, end, f"<math>{math}</math>")

    def _gives(self, line: _Line, before: set[str]) -> list[str]:
        """The names that a statement gives a value; a return gives states that are returned as others."""
        if not isinstance(line.decided, ast.Return):
            return [name for name in dict.fromkeys(given(line.decided)) if name in self._scope.local]
        pairs = self._returned(line.decided)
        unchanged = {n for n, v in pairs if isinstance(v, ast.Name) and v.id == n and n in before}
        return [name for name in self._states if name not in unchanged] + [
            name for name in given(line.decided) if name in self._scope.local - {*self._states}
        ]

    def _returned(self, statement: ast.Return) -> list[tuple[str, ast.expr]]:
        """The states with what is returned for each; none where this can't be told."""
        value = statement.value
        values = value.elts if isinstance(value, ast.Tuple) else [value] if value else []
        matching = len(values) == len(self._states) and not any(isinstance(v, ast.Starred) for v in values)
        return list(zip(self._states, values, strict=True)) if matching else []

    def _read(self, statement: ast.stmt, names: list[str]) -> list[tuple[tuple[str, ...], str]]:
        """The equations of a statement.

        Raises:
            NoFormulaError: it is to be shown as code.
        """
        if isinstance(statement, (ast.Pass, ast.AnnAssign)) and not names:
            return []
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return []
        if isinstance(statement, ast.Return):
            pairs = self._returned(statement)
            if pairs and not names:
                return []
            if not pairs:
                raise NoFormulaError
            return self._simultaneous([(name, value) for name, value in pairs if name in names], names)
        match statement:
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                whole = ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), op, value), statement)
                return self._simultaneous([(name, ast.fix_missing_locations(whole))], names)
            case ast.Assign(
                targets=[ast.Tuple(elts=targets) | ast.List(elts=targets)], value=ast.Call() as call
            ):
                return [self._parts(targets, call, names)]
            case ast.Assign(targets=[_]) | ast.AnnAssign():
                return self._simultaneous(self._pairs(statement), names)
        raise NoFormulaError

    def _pairs(self, statement: ast.stmt) -> list[tuple[str, ast.expr]]:
        """The names that an assignment gives a value, with their values; no functions."""
        found = []
        for target, value in assigned(statement):
            if not isinstance(target, ast.Name):
                raise NoFormulaError
            known = self._scope.value(value)
            if callable(known) and self._scope.named(value) is None:
                raise NoFormulaError
            if not callable(known) and not isinstance(known, ModuleType):
                found.append((target.id, value))
        return found

    def _simultaneous(
        self, pairs: list[tuple[str, ast.expr]], names: list[str]
    ) -> list[tuple[tuple[str, ...], str]]:
        """Equations whose right sides all have the values from before."""
        if not self._sure or len({name for name, _ in pairs}) < len(pairs):
            raise NoFormulaError
        right = [self._writer.write(value) for _, value in pairs]
        rows = {name: self._writer.of_rows(value) for name, value in pairs}
        self._give(names)
        self._rows -= {name for name in names if not rows.get(name, False)}
        self._rows |= {name for name, of in rows.items() if of}
        return [
            ((n,), f"{self._name(n).text}<mo>=</mo>{_side(m)}")
            for (n, _), m in zip(pairs, right, strict=True)
        ]

    def _parts(
        self, targets: list[ast.expr], call: ast.Call, names: list[str]
    ) -> tuple[tuple[str, ...], str]:
        """An equation of several names: the parts of a tensor."""
        named = self._writer.called(call)
        parts = [part.id for part in targets if isinstance(part, ast.Name)]
        starred = any(isinstance(part, ast.Starred) for part in call.args)
        if not self._sure or named is None or len({*parts}) < len(targets) or {*parts} != {*names} or starred:
            raise NoFormulaError
        name, torchs, arguments = named
        if name not in PARTS or not torchs or not arguments:
            raise NoFormulaError
        right, rows = self._writer.write(arguments[0]), self._writer.of_rows(arguments[0])
        axes = [word.value for word in call.keywords if word.arg == "dim"]
        axes += arguments[1 if name == "unbind" else 2 :]
        axis = self._scope.value(axes[0]) if axes else 0
        if len(axes) > 1 or axis not in ((-1, 1) if rows else (0,)):  # features, or rows of a matrix
            raise NoFormulaError
        self._give(names)
        self._rows = self._rows | set(names) if rows else self._rows - set(names)
        left = mathml.bracketed(mathml.listed([self._name(part).text for part in parts]), "[", "]")
        return tuple(parts), f"{left}<mo>=</mo>{_side(right)}"

    def _give(self, names: Sequence[str]) -> None:
        self._count.update(names)

    def _name(self, name: str) -> Math:
        """A local variable as it is now."""
        count, total = self._count[name], self._total[name]
        if callable(self._scope.values.get(name)):
            raise NoFormulaError
        if count == 0:
            if name in self._states:
                return mathml.indexed(name, "t−1")
            if name != self._scope.input:
                raise NoFormulaError
            return mathml.indexed(name, "t")
        if name == self._scope.input or (total > 2 and count < total):
            return mathml.indexed(name, "t", version=count)
        return mathml.indexed(name, "t", tilde=count < total)

    def _plain(self, name: str) -> bool:
        """Whether a name has one meaning in the whole step."""
        if name == self._scope.input:
            return not self._total[name]
        return name not in self._scope.local or (name not in self._states and self._total[name] == 1)


def _side(math: Math) -> str:
    """The right side of an equation; a comparison is bracketed, so that it is no second equation."""
    return math.held(SUMS | {"code"} if math.text.startswith("<mtext>") else SUMS, first=True)

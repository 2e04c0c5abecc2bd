"""The step of a cell as formulas in MathML, generated from its source code."""

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
from unrolled.equations.expressions import SPLITTING_FUNCTIONS, ExpressionWriter, NoFormulaError
from unrolled.equations.mathml import SUMS, Math
from unrolled.equations.scope import Scope, assigned_names, assignments, mutates_shared_memory
from unrolled.equations.source import statements


@dataclass(frozen=True)
class Equation:
    """One equation of a step.

    Attributes:
        names: The quantities that the equation defines.
        first_line: Its first line in :func:`unrolled.equations.source.step_source`, from 0.
        last_line: Its last line.
        math: The equation as a ``<math>`` element. It contains the code if there is no formula for it.
    """

    names: tuple[str, ...]
    first_line: int
    last_line: int
    math: str


def formulas(cell: Cell) -> list[Equation]:
    """Return the equations of a cell's step, in the order of the code.

    A state of the previous step, such as ``h``, has the index t − 1. If a name is assigned twice, its first
    value has a tilde. If it is assigned more often, or if it is the input, the values have version numbers
    in brackets. Conditions on options of the cell are resolved. A statement that no formula represents
    completely is shown as code.

    Args:
        cell: The cell with its options.

    Returns:
        The equations. The list is empty if there is no source code.
    """
    cell = cell.innermost
    step = cell.equations()
    try:
        source = textwrap.dedent(inspect.getsource(step))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return []
    if type(cell).step is not step or not isinstance(function, ast.FunctionDef):
        return []  # another function runs, such as a decorator around this one
    arguments = [argument.arg for argument in function.args.args]
    body = statements(function)
    if (
        len(arguments) != 2 + len(cell.state)
        or arguments != list(inspect.signature(step).parameters)
        or not body
    ):
        return []
    return _FormulaBuilder(Scope(cell, step, arguments, body), source, body).equations()


@dataclass(frozen=True)
class _Statement:
    """A statement that runs.

    Attributes:
        source: The statement as written.
        resolved: The statement with its conditions on options resolved.
        known_values: The values of local variables that are known before it.
    """

    source: ast.stmt
    resolved: ast.stmt
    known_values: Mapping[str, Any]


def _executed_statements(scope: Scope, body: Sequence[ast.stmt]) -> list[_Statement]:
    """Return the statements that run, with ``if`` statements on options of the cell resolved."""
    executed: list[_Statement] = []
    for statement in body:
        if isinstance(statement, ast.If) and (is_true := scope.condition(statement.test)) is not None:
            executed += _executed_statements(scope, statement.body if is_true else statement.orelse)
        else:
            resolved = _ConditionResolver(scope).visit(copy.deepcopy(statement))
            executed.append(_Statement(statement, resolved, scope.known_values))
            scope.record_assignments(resolved)
        if executed and isinstance(executed[-1].source, (ast.Return, ast.Raise)):
            break
    return executed


class _ConditionResolver(ast.NodeTransformer):
    """Replaces conditional expressions on options of the cell by the branch that is taken."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        is_true = self._scope.condition(node.test)
        if is_true is None:
            return self.generic_visit(node)
        branch: ast.AST = self.visit(node.body if is_true else node.orelse)
        return branch


class _FormulaBuilder:
    """Translates the statements of a step in order, and counts how often each name has been assigned."""

    def __init__(self, scope: Scope, source: str, body: list[ast.stmt]) -> None:
        self._scope = scope
        self._states = tuple(scope.cell.state)
        self._first_line = body[0].lineno
        self._statements = _executed_statements(scope, body)
        self._total_assignments: Counter[str] = Counter()
        self._assignments_so_far: Counter[str] = Counter()
        self._batched_names = {scope.input_name, *self._states}
        nodes = [node for statement in body for node in ast.walk(statement)]
        names = {
            n.id if isinstance(n, ast.Name) else n.attr
            for n in nodes
            if isinstance(n, (ast.Name, ast.Attribute))
        }
        self._writer = ExpressionWriter(
            scope, source, self._quantity, self._is_unambiguous, self._batched_names.__contains__, names
        )
        has_outer_assignment = any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in nodes)
        self._values_are_certain = not has_outer_assignment and not mutates_shared_memory(
            [statement.resolved for statement in self._statements]
        )
        for statement in self._statements:
            self._total_assignments.update(self._defined_names(statement, set(self._total_assignments)))

    def equations(self) -> list[Equation]:
        """Return the equations, or the code, of every statement in order."""
        return [equation for statement in self._statements for equation in self._equations(statement)]

    def _equations(self, statement: _Statement) -> Iterator[Equation]:
        self._scope.known_values = statement.known_values
        source, resolved = statement.source, statement.resolved
        first_line = source.lineno - self._first_line
        last_line = (source.end_lineno or source.lineno) - self._first_line
        names = self._defined_names(statement, set(self._assignments_so_far))
        assignments_before = self._assignments_so_far.copy()
        try:
            equations = self._translate(resolved, names)
        except NoFormulaError:
            self._assignments_so_far = assignments_before
            self._assignments_so_far.update(names)
            self._batched_names |= set(names) if self._writer.depends_on_batch(resolved) else set()
            equations = [(tuple(sorted(names)), mathml.code(ast.unparse(source)).text)]
        if not isinstance(source, ast.Return) and any(isinstance(n, ast.Return) for n in ast.walk(source)):
            self._values_are_certain = False  # the following statements may not run
        for defined_names, math in equations:
            yield Equation(defined_names, first_line, last_line, f"<math>{math}</math>")

    def _defined_names(self, statement: _Statement, assigned_before: set[str]) -> list[str]:
        """Return the names that a statement assigns.

        A return statement assigns the states, except those that it returns unchanged.
        """
        resolved, local_names = statement.resolved, self._scope.local_names
        if not isinstance(resolved, ast.Return):
            return [name for name in dict.fromkeys(assigned_names(resolved)) if name in local_names]
        pairs = self._returned_states(resolved)
        unchanged = {n for n, v in pairs if isinstance(v, ast.Name) and v.id == n and n in assigned_before}
        return [name for name in self._states if name not in unchanged] + [
            name for name in assigned_names(resolved) if name in local_names - {*self._states}
        ]

    def _returned_states(self, statement: ast.Return) -> list[tuple[str, ast.expr]]:
        """Return the states with the expression returned for each, or nothing if these can't be matched."""
        value = statement.value
        values = value.elts if isinstance(value, ast.Tuple) else [value] if value else []
        matching = len(values) == len(self._states) and not any(isinstance(v, ast.Starred) for v in values)
        return list(zip(self._states, values, strict=True)) if matching else []

    def _translate(self, statement: ast.stmt, names: list[str]) -> list[tuple[tuple[str, ...], str]]:
        """Return the equations of a statement, each with the names that it defines.

        Raises:
            NoFormulaError: If the statement has to be shown as code.
        """
        if isinstance(statement, (ast.Pass, ast.AnnAssign)) and not names:
            return []
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return []
        if isinstance(statement, ast.Return):
            pairs = self._returned_states(statement)
            if pairs and not names:
                return []
            if not pairs:
                raise NoFormulaError
            return self._simultaneous_equations([(n, value) for n, value in pairs if n in names], names)
        match statement:
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                operation = ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), op, value), statement)
                return self._simultaneous_equations([(name, ast.fix_missing_locations(operation))], names)
            case ast.Assign(
                targets=[ast.Tuple(elts=targets) | ast.List(elts=targets)], value=ast.Call() as call
            ):
                return [self._split_equation(targets, call, names)]
            case ast.Assign(targets=[_]) | ast.AnnAssign():
                return self._simultaneous_equations(self._assigned_tensors(statement), names)
        raise NoFormulaError

    def _assigned_tensors(self, statement: ast.stmt) -> list[tuple[str, ast.expr]]:
        """Return the names that an assignment defines with their values, without functions and modules."""
        pairs = []
        for target, value in assignments(statement):
            if not isinstance(target, ast.Name):
                raise NoFormulaError
            known_value = self._scope.evaluate(value)
            if callable(known_value) and self._scope.resolve_function(value) is None:
                raise NoFormulaError
            if not callable(known_value) and not isinstance(known_value, ModuleType):
                pairs.append((target.id, value))
        return pairs

    def _simultaneous_equations(
        self, pairs: list[tuple[str, ast.expr]], names: list[str]
    ) -> list[tuple[tuple[str, ...], str]]:
        """Return equations whose right-hand sides all use the values from before the statement."""
        if not self._values_are_certain or len({name for name, _ in pairs}) < len(pairs):
            raise NoFormulaError
        right_sides = [self._writer.write(value) for _, value in pairs]
        is_batched = {name: self._writer.depends_on_batch(value) for name, value in pairs}
        self._assignments_so_far.update(names)
        self._batched_names -= {name for name in names if not is_batched.get(name, False)}
        self._batched_names |= {name for name, batched in is_batched.items() if batched}
        return [
            ((name,), f"{self._quantity(name).text}<mo>=</mo>{_right_side(math)}")
            for (name, _), math in zip(pairs, right_sides, strict=True)
        ]

    def _split_equation(
        self, targets: list[ast.expr], call: ast.Call, names: list[str]
    ) -> tuple[tuple[str, ...], str]:
        """Return the equation of an assignment that splits a tensor into several names."""
        function = self._writer.resolve_call(call)
        parts = [part.id for part in targets if isinstance(part, ast.Name)]
        if (
            not self._values_are_certain
            or function is None
            or len({*parts}) < len(targets)
            or {*parts} != {*names}
            or any(isinstance(part, ast.Starred) for part in call.args)
        ):
            raise NoFormulaError
        name, is_torch, arguments = function
        if name not in SPLITTING_FUNCTIONS or not is_torch or not arguments:
            raise NoFormulaError
        right_side = self._writer.write(arguments[0])
        is_batched = self._writer.depends_on_batch(arguments[0])
        dims = [keyword.value for keyword in call.keywords if keyword.arg == "dim"]
        dims += arguments[1 if name == "unbind" else 2 :]
        dim = self._scope.evaluate(dims[0]) if dims else 0
        if len(dims) > 1 or dim not in ((-1, 1) if is_batched else (0,)):  # features, or rows of a matrix
            raise NoFormulaError
        self._assignments_so_far.update(names)
        self._batched_names = (
            self._batched_names | set(names) if is_batched else self._batched_names - set(names)
        )
        part_list = mathml.separated([self._quantity(part).text for part in parts])
        return tuple(parts), f"{mathml.bracketed(part_list, '[', ']')}<mo>=</mo>{_right_side(right_side)}"

    def _quantity(self, name: str) -> Math:
        """Return the current symbol of a local variable."""
        count, total = self._assignments_so_far[name], self._total_assignments[name]
        if callable(self._scope.known_values.get(name)):
            raise NoFormulaError
        if count == 0:
            if name in self._states:
                return mathml.indexed(name, "t−1")
            if name != self._scope.input_name:
                raise NoFormulaError
            return mathml.indexed(name, "t")
        if name == self._scope.input_name or (total > 2 and count < total):
            return mathml.indexed(name, "t", version=count)
        return mathml.indexed(name, "t", tilde=count < total)

    def _is_unambiguous(self, name: str) -> bool:
        """Return whether a name has one meaning in the whole step."""
        if name == self._scope.input_name:
            return not self._total_assignments[name]
        return name not in self._scope.local_names or (
            name not in self._states and self._total_assignments[name] == 1
        )


def _right_side(math: Math) -> str:
    """Return the right-hand side of an equation. A comparison gets brackets to set it off."""
    return math.as_operand(SUMS | {"code"} if math.text.startswith("<mtext>") else SUMS, first=True)

"""What the names in a cell's step refer to, as far as this is known without running it."""

from __future__ import annotations

import ast
import builtins
import math
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unrolled.cells.base import Cell

UNKNOWN = object()
_STATIC_NODES = (
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.Tuple, ast.List, ast.Set),
    *(ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.IfExp),
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_MODULES = (torch.linalg, torch.special, functional, torch)
_FUNCTION_NAMES: dict[int, str] = {
    **{id(value): name for name, value in vars(math).items() if callable(value)},
    **{id(v): name for module in _MODULES for name, v in vars(module).items() if callable(v)},
    id(abs): "abs",
    id(pow): "pow",
}
# Functions and methods whose result may share memory with their argument.
_VIEWS = """
    alpha_dropout as_strided atleast_1d atleast_2d atleast_3d bfloat16 broadcast_tensors broadcast_to chunk
    contiguous detach diagonal double dropout expand expand_as flatten float half hsplit imag movedim
    moveaxis narrow permute positive ravel real reshape reshape_as select split squeeze swapaxes swapdims
    t tensor_split to transpose type type_as unbind unflatten unfold unsqueeze view view_as vsplit
"""


class Scope:
    """The names of a step.

    Args:
        cell: The cell.
        function: Its step.
        arguments: The names of the step's arguments.
        body: The statements of the step.

    Attributes:
        cell: The cell.
        self_name: The name of the cell itself within the step, usually ``self``.
        input_name: The name of the input.
        local_names: The names of all local variables.
        known_values: The values of the local variables that are known so far.
    """

    def __init__(
        self, cell: Cell, function: Callable[..., Any], arguments: list[str], body: list[ast.stmt]
    ) -> None:
        self.cell = cell
        self.self_name, self.input_name = arguments[:2]
        variables = function.__code__
        reassigned = {name for statement in body for name in assigned_names(statement)}
        self._options_are_constant = self.self_name not in reassigned
        nodes = [node for statement in body for node in ast.walk(statement)]
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local_names = {*variables.co_varnames, *variables.co_cellvars, *stored} - {self.self_name}
        self.known_values: Mapping[str, Any] = {}
        definitions = (ast.alias, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        self._defined_names = {
            name for node in nodes if isinstance(node, definitions) for name in assigned_names(node)
        }
        self._bound_cell = cell.bind(
            {name: torch.empty(shape, device="meta") for name, shape in cell.shapes().items()}
        )
        self._outer_values = {**vars(builtins), **function.__globals__}
        for name, content in zip(variables.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._outer_values[name] = content.cell_contents
            except ValueError:  # not assigned yet
                self.local_names.add(name)

    def evaluate(self, node: ast.expr) -> Any:
        """Return the value of an expression of options and outer names, or ``UNKNOWN`` for any other."""
        if not self._options_are_constant:
            return UNKNOWN
        for part in ast.walk(node):
            match part:
                case ast.Name(id=name) if name in self.local_names and name not in self.known_values:
                    return UNKNOWN
                # the training mode is not an option: it can change between calls
                case ast.Attribute(value=ast.Name(id=self.self_name), attr="training"):
                    return UNKNOWN
            if not isinstance(part, _STATIC_NODES):
                return UNKNOWN
        variables = {**self._outer_values, self.self_name: self._bound_cell, **self.known_values}
        try:
            return eval(compile(ast.Expression(node), "step", "eval"), {"__builtins__": {}}, variables)
        except Exception:  # the user's own attributes may raise anything
            return UNKNOWN

    def condition(self, test: ast.expr) -> bool | None:
        """Return whether a condition on options is true, or None for any other condition."""
        value = self.evaluate(test)
        try:
            return None if value is UNKNOWN else bool(value)
        except Exception:  # such as a parameter, which is a meta tensor here
            return None

    def record_assignments(self, statement: ast.stmt) -> None:
        """Update the known values of the local variables that a statement assigns."""
        assigned: dict[str, Any] = {}
        for target, value in assignments(statement):
            if isinstance(target, ast.Name):
                assigned[target.id] = self.evaluate(value)
        outdated = set(assigned_names(statement))
        unchanged = {name: value for name, value in self.known_values.items() if name not in outdated}
        self.known_values = unchanged | {n: value for n, value in assigned.items() if value is not UNKNOWN}

    def is_tensor_method(self, function: ast.expr) -> bool:
        """Return whether the called function is a method of a tensor."""
        if not (isinstance(function, ast.Attribute) and hasattr(Tensor, function.attr)):
            return False
        root: ast.expr = function
        while isinstance(root, ast.Attribute):
            attribute, root = root, root.value
        if not isinstance(root, ast.Name):
            return True
        if root.id == self.self_name:
            return attribute is not function and attribute.attr in self.cell.params()
        may_be_tensor = root.id not in self._defined_names and not isinstance(
            self.known_values.get(root.id), ModuleType
        )
        return root.id in self.local_names and may_be_tensor

    def resolve_function(self, function: ast.expr) -> tuple[str, bool] | None:
        """Return the name of a called function and whether it is torch's, or None if this is unknown."""
        if isinstance(function, ast.Attribute) and _root_name(function) in {
            *self.local_names,
            self.self_name,
        }:
            root = self.known_values.get(_root_name(function))
            if not isinstance(root, ModuleType):
                return None
        value = self.evaluate(function)
        if id(value) in _FUNCTION_NAMES:
            return _FUNCTION_NAMES[id(value)], True
        name = getattr(value, "__name__", "") if isinstance(value, (FunctionType, type)) else ""
        if not name.isidentifier() or hasattr(Tensor, name) or hasattr(torch, name):
            return None  # another function whose name would be read as torch's
        return None if hasattr(functional, name) else (name, False)


def assignments(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield the targets of an assignment with their values.

    ``a, b = x, y`` gives two pairs. ``a, b = x`` gives one pair, whose target is the tuple.
    """
    match statement:
        case ast.Assign(
            targets=[ast.Tuple(elts=targets) | ast.List(elts=targets)], value=ast.Tuple(elts=values)
        ):
            if len(targets) == len(values) and not any(isinstance(p, ast.Starred) for p in targets + values):
                yield from zip(targets, values, strict=True)
                return
    match statement:
        case ast.Assign(targets=targets, value=value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield target, value


def assigned_names(node: ast.AST) -> list[str]:
    """Return the local variables that a statement assigns or changes in place."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Lambda() | ast.AnnAssign(value=None):
            return []
        case ast.comprehension(iter=iterable, ifs=conditions):
            return [name for part in (iterable, *conditions) for name in assigned_names(part)]
        case ast.alias(name=name, asname=alias):
            return [alias or name.split(".")[0]]
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
    own_names = [node.name] if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) else []
    own_names += [node.rest] if isinstance(node, ast.MatchMapping) else []
    child_names = [name for part in ast.iter_child_nodes(node) for name in assigned_names(part)]
    return [*(name for name in own_names if name), *child_names, *_mutated_names(node)]


def mutates_shared_memory(statements: list[ast.stmt]) -> bool:
    """Return whether a tensor may be changed in place while another name refers to the same memory."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    mutated = {name for node in nodes for name in _mutated_names(node)}
    mutated |= {n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    for targets, value in (pair for node in nodes for pair in _possible_aliases(node)):
        parts = [part for target in targets for part in ast.walk(target)]
        names = _names_sharing_memory(value) | {part.id for part in parts if isinstance(part, ast.Name)}
        if names & mutated and (_names_sharing_memory(value) or len(targets) > 1):
            return True
    return False


def _possible_aliases(node: ast.AST) -> Iterator[tuple[list[ast.expr], ast.expr]]:
    """Yield targets that may share memory after a node, with the value that is assigned to them."""
    match node:
        case ast.Assign(targets=[_]) | ast.AnnAssign():
            yield from (([target], value) for target, value in assignments(node))
        case ast.Assign(targets=targets, value=value):
            yield targets, value
        case ast.NamedExpr(target=target, value=value):
            yield [target], value
        case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
            yield [target], value
        case ast.withitem(optional_vars=ast.expr() as target, context_expr=value):
            yield [target], value


def _mutated_names(node: ast.AST) -> list[str]:
    """Return the names whose tensors a node changes in place, without assigning the name."""
    mutated: list[ast.expr] = []
    match node:
        case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
            mutated = [value]
        case ast.Attribute(value=value, ctx=ast.Store() | ast.Del()):
            mutated = [value]
        case ast.Call(func=function, args=arguments, keywords=keywords):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name.endswith("_") or any(keyword.arg == "inplace" for keyword in keywords):
                mutated = [function, *arguments[:1]]
            mutated += [keyword.value for keyword in keywords if keyword.arg == "out"]
    return [name for part in mutated if (name := _root_name(part))]


def _names_sharing_memory(value: ast.expr) -> set[str]:
    """Return the names whose memory the value of an expression may share."""
    match value:
        case ast.BinOp() | ast.UnaryOp() | ast.Constant() | ast.Compare():
            return set()
        case ast.Call(func=function):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            is_torch = hasattr(torch, name) or hasattr(functional, name) or hasattr(Tensor, name)
            if is_torch and name not in _VIEWS.split():
                return set()
    return {part.id for part in ast.walk(value) if isinstance(part, ast.Name)}


def _root_name(node: ast.expr) -> str:
    """Return the name that an expression starts with, or an empty string if it starts with something else."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""

"""What the names in a cell's step stand for, as far as it can be known without running it."""

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
_STATIC = (
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.Tuple, ast.List, ast.Set),
    *(ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.IfExp),
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_MODULES = (torch.linalg, torch.special, functional, torch)
_NAMED: dict[int, str] = {
    **{id(value): name for name, value in vars(math).items() if callable(value)},
    **{id(v): name for module in _MODULES for name, v in vars(module).items() if callable(v)},
    id(abs): "abs",
    id(pow): "pow",
}
_VIEWS = """
    alpha_dropout as_strided atleast_1d atleast_2d atleast_3d bfloat16 broadcast_tensors broadcast_to chunk
    contiguous detach diagonal double dropout expand expand_as flatten float half hsplit imag movedim
    moveaxis narrow permute positive ravel real reshape reshape_as select split squeeze swapaxes swapdims
    t tensor_split to transpose type type_as unbind unflatten unfold unsqueeze view view_as vsplit
"""  # functions and methods whose result may be the memory of what they are given


class Scope:
    """The names of a step.

    Args:
        cell: whose step.
        function: the step.
        arguments: the names of its arguments.
        body: its statements.

    Attributes:
        own: the name of the cell itself, ``self``.
        input: the name of the input.
        local: the names of every local variable.
        values: what is known of local variables by now.
    """

    def __init__(
        self, cell: Cell, function: Callable[..., Any], arguments: list[str], body: list[ast.stmt]
    ) -> None:
        self.cell = cell
        self.own, self.input = arguments[:2]
        variables = function.__code__
        changed = {name for statement in body for name in given(statement)}
        self._settled = self.own not in changed  # else the step changes its own options
        nodes = [node for statement in body for node in ast.walk(statement)]
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local = {*variables.co_varnames, *variables.co_cellvars, *stored} - {self.own}
        self.values: Mapping[str, Any] = {}
        definitions = (ast.alias, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        self._defined = {name for node in nodes if isinstance(node, definitions) for name in given(node)}
        self._bound = cell.bind({name: torch.empty(s, device="meta") for name, s in cell.shapes().items()})
        self._outer = {**vars(builtins), **function.__globals__}
        for name, content in zip(variables.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._outer[name] = content.cell_contents
            except ValueError:  # not yet given a value
                self.local.add(name)

    def value(self, node: ast.expr) -> Any:
        """What an expression is, made of options and of names outside the step; else UNKNOWN."""
        if not self._settled:
            return UNKNOWN
        for part in ast.walk(node):
            match part:
                case ast.Name(id=name) if name in self.local and name not in self.values:
                    return UNKNOWN
                case ast.Attribute(value=ast.Name(id=self.own), attr="training"):  # no option: the mode
                    return UNKNOWN
            if not isinstance(part, _STATIC):
                return UNKNOWN
        known = {**self._outer, self.own: self._bound, **self.values}
        try:
            return eval(compile(ast.Expression(node), "step", "eval"), {"__builtins__": {}}, known)
        except Exception:  # the user's own attributes may raise anything
            return UNKNOWN

    def condition(self, test: ast.expr) -> bool | None:
        """Whether a condition on options holds; None for any other condition."""
        found = self.value(test)
        try:
            return None if found is UNKNOWN else bool(found)
        except Exception:  # such as a parameter's, which has no numbers here
            return None

    def learn(self, statement: ast.stmt) -> None:
        """Keep what a statement says of local variables."""
        found = {}
        for target, value in assigned(statement):
            if isinstance(target, ast.Name):
                found[target.id] = self.value(value)
        kept = {name: value for name, value in self.values.items() if name not in set(given(statement))}
        self.values = kept | {name: value for name, value in found.items() if value is not UNKNOWN}

    def method(self, function: ast.expr) -> bool:
        """Whether a call is of a tensor's method."""
        if not (isinstance(function, ast.Attribute) and hasattr(Tensor, function.attr)):
            return False
        root: ast.expr = function
        while isinstance(root, ast.Attribute):
            path, root = root, root.value
        if not isinstance(root, ast.Name):
            return True
        if root.id == self.own:
            return path is not function and path.attr in self.cell.params()
        thing = root.id not in self._defined and not isinstance(self.values.get(root.id), ModuleType)
        return root.id in self.local and thing

    def named(self, function: ast.expr) -> tuple[str, bool] | None:
        """The name of a function that is called, and whether it is torch's; None where it can't be known."""
        if isinstance(function, ast.Attribute) and _root(function) in {*self.local, self.own}:
            first = self.values.get(_root(function))
            if not isinstance(first, ModuleType):
                return None
        found = self.value(function)
        if id(found) in _NAMED:
            return _NAMED[id(found)], True
        name = getattr(found, "__name__", "") if isinstance(found, (FunctionType, type)) else ""
        if not name.isidentifier() or hasattr(Tensor, name) or hasattr(torch, name):
            return None  # one of another's, with a name that would be read as torch's
        return None if hasattr(functional, name) else (name, False)


def assigned(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment, each with what it gets; a list with all of a value is one target."""
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


def given(node: ast.AST) -> list[str]:
    """The local variables that a statement gives a value, or whose value it changes in place."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Lambda() | ast.AnnAssign(value=None):
            return []
        case ast.comprehension(iter=over, ifs=conditions):
            return [name for part in (over, *conditions) for name in given(part)]
        case ast.alias(name=name, asname=other):
            return [other or name.split(".")[0]]
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
    own = [node.name] if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) else []
    own += [node.rest] if isinstance(node, ast.MatchMapping) else []
    inside = [name for part in ast.iter_child_nodes(node) for name in given(part)]
    return [*(name for name in own if name), *inside, *_changed(node)]


def shared(statements: list[ast.stmt]) -> bool:
    """Whether a tensor may be changed in place while another name stands for its memory too."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    changed = {name for node in nodes for name in _changed(node)}
    changed |= {n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    for targets, value in (pair for node in nodes for pair in _alike(node)):
        parts = [part for target in targets for part in ast.walk(target)]
        names = _sources(value) | {part.id for part in parts if isinstance(part, ast.Name)}
        if names & changed and (_sources(value) or len(targets) > 1):
            return True
    return False


def _alike(node: ast.AST) -> Iterator[tuple[list[ast.expr], ast.expr]]:
    """What may stand for the same memory after a node: targets, and the value that they get."""
    match node:
        case ast.Assign(targets=[_]) | ast.AnnAssign():
            yield from (([target], value) for target, value in assigned(node))
        case ast.Assign(targets=targets, value=value):
            yield targets, value
        case ast.NamedExpr(target=target, value=value):
            yield [target], value
        case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
            yield [target], value
        case ast.withitem(optional_vars=ast.expr() as target, context_expr=value):
            yield [target], value


def _changed(node: ast.AST) -> list[str]:
    """The names whose tensors a node changes in place, without a new value for the name."""
    found: list[ast.expr] = []
    match node:
        case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
            found = [value]
        case ast.Attribute(value=value, ctx=ast.Store() | ast.Del()):
            found = [value]
        case ast.Call(func=function, args=arguments, keywords=keywords):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name.endswith("_") or any(one.arg == "inplace" for one in keywords):
                found = [function, *arguments[:1]]
            found += [one.value for one in keywords if one.arg == "out"]
    return [name for part in found if (name := _root(part))]


def _sources(value: ast.expr) -> set[str]:
    """The names with whose memory the value of an expression may be shared."""
    match value:
        case ast.BinOp() | ast.UnaryOp() | ast.Constant() | ast.Compare():
            return set()
        case ast.Call(func=function):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            known = hasattr(torch, name) or hasattr(functional, name) or hasattr(Tensor, name)
            if known and name not in _VIEWS.split():
                return set()
    return {part.id for part in ast.walk(value) if isinstance(part, ast.Name)}


def _root(node: ast.expr) -> str:
    """The name that an expression begins with; empty where it begins with none."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""

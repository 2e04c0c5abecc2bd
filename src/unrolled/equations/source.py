"""The source of a cell: the code of its step."""

from __future__ import annotations

import ast
import inspect
import textwrap

from unrolled.cells.base import Cell


def step_source(cell: type[Cell]) -> str:
    """Return the body of the cell's step as its author wrote it, or an empty string if there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cell.step)))
    except (OSError, TypeError):
        return ""
    try:
        function = ast.parse(source).body[0]
    except SyntaxError:  # a lambda in the middle of a line
        return source.strip()
    if not isinstance(function, ast.FunctionDef):
        return source.strip()
    body = statements(function)
    return textwrap.dedent("\n".join(source.splitlines()[body[0].lineno - 1 :])) if body else ""


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """Return the statements of a function without its docstring and other constant expressions."""
    return [
        node
        for node in function.body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]

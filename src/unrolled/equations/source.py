"""What a cell's source and docstring say: its equations, and words for its quantities."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

from unrolled.cells.base import Cell


def equations(cell: type[Cell]) -> str:
    """The body of the cell's step, as its author wrote it; empty where there is no source."""
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


def meanings(cell: type[Cell]) -> dict[str, str]:
    """What the docstring of a cell says of its quantities, in its section ``Quantities:``."""
    section = re.search(r"^Quantities:\n((?:[ ]+.*\n?)+)", inspect.getdoc(cell) or "", re.MULTILINE)
    lines = section[1].splitlines() if section else []
    pairs = (line.strip().partition(": ") for line in lines)
    return {name: words for name, _, words in pairs}


def prose(cell: type[Cell]) -> list[str]:
    """The paragraphs of a cell's docstring, without the section on its quantities."""
    text = (inspect.getdoc(cell) or "") if cell.__doc__ else ""
    paragraphs = text.split("\n\nQuantities:")[0].replace("``", "").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph]


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function, without its docstring and any other constant that stands alone."""
    return [
        node
        for node in function.body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]

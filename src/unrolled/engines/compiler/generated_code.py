"""What code generators of all backends share: which nodes they support, and the text of expressions."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from unrolled.engines.compiler.ir import is_batched, is_number
from unrolled.engines.compiler.source_location import location_of, unsupported

aten = torch.ops.aten


def check_supported(
    node: fx.Node, operations: Container[object], reductions: Container[object], where: str, missing: str
) -> None:
    """Check that a code generator supports a node of the loop.

    Args:
        node: The node.
        operations: The elementwise operations that it supports.
        reductions: The reductions over columns.
        where: Where the node is not supported, such as ``"on a GPU"``.
        missing: What an elementwise operation needs, such as ``"gpu/triton_ops.py has no Triton"``.

    Raises:
        UnsupportedError: If it doesn't. The message names the operation and its line in the step.
    """
    target = node.target
    if target in operations or is_number(node):
        return
    if target in (aten.slice.Tensor, aten.cat.default) and node.args[1] in (1, -1):
        return
    if target in reductions and node.args[1] in (1, [1]):
        return
    if target is aten.mm.default:
        row, matrix = node.args
        if is_batched(row) and not is_batched(matrix):  # type: ignore[arg-type]
            return
    is_elementwise = torch.Tag.pointwise in getattr(target, "tags", ())
    missing = missing if is_elementwise else "compiler/lowering/ has no rule"
    raise unsupported(f"{target} is not supported {where}: {missing} for it", location_of(node))


def without_parentheses(text: str) -> str:
    """Return an expression without parentheses around all of it."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:-1] if position == len(text) - 1 and text.startswith("(") else text
    return text

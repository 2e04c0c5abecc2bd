"""A function of tensors as one graph of torch's small operations, none of which changes a tensor in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from unrolled.engines.compiler.source_location import Marked, place_of, refused

aten = torch.ops.aten
_WHOLE = [
    aten.native_layer_norm, aten.native_group_norm, aten._fused_rms_norm, aten._softmax, aten._log_softmax,
    aten.logsumexp, aten.mean, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.linalg_vector_norm,
    aten.gelu, aten.silu, aten.mish, aten.elu, aten.celu, aten.selu, aten.leaky_relu, aten.prelu,
    aten.softplus, aten.hardswish, aten.hardsigmoid, aten.softshrink, aten.hardshrink,
    aten.log_sigmoid_forward, aten.logit, aten.baddbmm, aten.dot, aten.mv, aten.unbind,
    aten.split,
]  # fmt: skip


def traced(function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.GraphModule:
    """Trace a function with torch's decompositions.

    Args:
        function: of tensors, in lists and tuples.
        arguments: fake tensors for it.

    Raises:
        UnsupportedError: it draws random numbers, or uses tensors that are not among its arguments.
    """
    table = _decompositions()
    module: fx.GraphModule = make_fx(function, decomposition_table=table)(*arguments)
    if any(map(_in_place, module.graph.nodes)):
        module = make_fx(torch.func.functionalize(function), decomposition_table=table)(*arguments)
    if any(map(_in_place, module.graph.nodes)):  # a decomposition is itself written in place
        again = torch.func.functionalize(Marked(module).run)
        module = make_fx(again, decomposition_table=table)(*tree_leaves(arguments))
    module.graph.eliminate_dead_code()
    _refuse(module.graph)
    return module


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own, and of the layers and functions that it leaves whole; bounds and sums stay as they are."""
    table = {**core_aten_decompositions(), **get_decompositions(_WHOLE), aten._trilinear.default: _trilinear}
    table[torch.ops.prims.copy_strided.default] = lambda value, stride: value.clone()  # lerp's
    for kept in (aten.clamp.default, aten.addmm.default, aten.hardtanh.default, aten.stack.default):
        table.pop(kept, None)
    return table


def _trilinear(
    first: Tensor,
    second: Tensor,
    third: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Tensor:
    """The product that ``bilinear`` and its backward are made of, as products of two."""
    rank = first.dim() + len(expand1)
    letters = "abcdefgh"[:rank]
    given = [
        "".join(letter for d, letter in enumerate(letters) if d not in expand)
        for expand in (expand1, expand2, expand3)
    ]
    result = "".join(letter for d, letter in enumerate(letters) if d not in sumdim)
    return torch.einsum(f"{','.join(given)}->{result}", first, second, third)


def _refuse(graph: fx.Graph) -> None:
    """Raise what can't be compiled and would be hard to name later."""
    for node in graph.nodes:
        if node.op == "get_attr" and any(
            user.target is not aten.lift_fresh_copy.default for user in node.users
        ):
            raise refused("it uses a tensor from outside", place_of(next(iter(node.users))))
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise refused(f"it draws random numbers: {node.target}", place_of(node))
        if _in_place(node):
            raise refused(f"it changes a tensor in place: {node.target}", place_of(node))

"""Trace a function of tensors to a graph of small torch operations without in-place changes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.engines._torch_private import (
    FakeTensor,
    OpOverload,
    core_aten_decompositions,
    get_decompositions,
    make_fx,
    tree_leaves,
)
from unrolled.engines.compiler.cse import eliminate_unused
from unrolled.engines.compiler.ir import is_quantized
from unrolled.engines.compiler.lowering.padding import PADDING_RULES
from unrolled.engines.compiler.source_location import (
    LocationInterpreter,
    location_of,
    unsupported,
    unsupported_draw,
)

aten = torch.ops.aten
_EXTRA_DECOMPOSITIONS = [  # operations that core ATen leaves whole
    aten.native_layer_norm, aten.native_group_norm, aten._fused_rms_norm, aten._softmax, aten._log_softmax,
    aten.logsumexp, aten.mean, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.linalg_vector_norm,
    aten.gelu, aten.silu, aten.mish, aten.elu, aten.celu, aten.selu, aten.leaky_relu, aten.prelu,
    aten.softplus, aten.hardswish, aten.hardsigmoid, aten.softshrink, aten.hardshrink,
    aten.log_sigmoid_forward, aten.logit, aten.baddbmm, aten.dot, aten.mv, aten.unbind,
    aten.split, aten.native_batch_norm, aten.native_batch_norm_backward, aten.ldexp, aten.addmv,
]  # fmt: skip
_NOT_DECOMPOSED = (
    aten.clamp.default, aten.addmm.default, aten.hardtanh.default, aten.stack.default,
    aten.linspace.default, aten.logspace.default, *PADDING_RULES,
)  # fmt: skip


def trace_decomposed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.GraphModule:
    """Trace a function with decompositions.

    Args:
        function: A function of tensors, in lists and tuples.
        arguments: Fake tensors to call it with.

    Raises:
        UnsupportedError: If the function draws random numbers.
    """
    table = _decompositions()
    module: fx.GraphModule = make_fx(function, decomposition_table=table)(*arguments)
    # A mode inside of the function, which puts quantized products into it, wouldn't see its own tensors.
    if any(map(_is_in_place, module.graph.nodes)) and not any(map(is_quantized, module.graph.nodes)):
        # An autograd.Function can't be functionalized, nor can the backward of some operations, like irfft.
        with contextlib.suppress(RuntimeError):
            module = make_fx(torch.func.functionalize(function), decomposition_table=table)(*arguments)
    if any(map(_is_in_place, module.graph.nodes)):  # some decompositions use in-place operations themselves
        functional = torch.func.functionalize(LocationInterpreter(module).run)
        module = make_fx(functional, decomposition_table=table)(*tree_leaves(arguments))
    eliminate_unused(module.graph)
    _check_graph(module)
    return module


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decomposition table: core ATen, plus larger operations, minus bounds and sums."""
    table = {
        **core_aten_decompositions(),
        **get_decompositions(_EXTRA_DECOMPOSITIONS),
        aten._trilinear.default: _trilinear,
        torch.ops.prims.broadcast_in_dim.default: _broadcast_in_dim,
        # The decomposition of lerp uses it.
        torch.ops.prims.copy_strided.default: lambda value, stride: value.clone(),
    }
    for operation in _NOT_DECOMPOSED:
        table.pop(operation, None)
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
    """Compute ``aten._trilinear``, which ``bilinear`` and its backward use, as an einsum."""
    rank = first.dim() + len(expand1)
    letters = "abcdefgh"[:rank]
    operands = [
        "".join(letter for d, letter in enumerate(letters) if d not in expand)
        for expand in (expand1, expand2, expand3)
    ]
    result = "".join(letter for d, letter in enumerate(letters) if d not in sumdim)
    return torch.einsum(f"{','.join(operands)}->{result}", first, second, third)


def _broadcast_in_dim(x: Tensor, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> Tensor:
    """Compute ``prims.broadcast_in_dim``, which can't be functionalized, as a view."""
    sizes = [1] * len(shape)
    for size, dim in zip(x.shape, broadcast_dimensions, strict=True):
        sizes[dim] = size
    return x.view(sizes).expand(*shape)


def _check_graph(module: fx.GraphModule) -> None:
    """Raise an error for operations and tensors that can't be compiled, before a later stage fails on them.

    Raises:
        UnsupportedError: If the graph draws random numbers, works in place, or has tensors that aren't
            strided or whose values aren't known.
    """
    for node in module.graph.nodes:
        value = getattr(module, node.target, None) if node.op == "get_attr" else node.meta.get("val")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise unsupported(f"it uses a tensor with the layout {value.layout}", location_of(node))
        if node.op == "get_attr" and isinstance(value, FakeTensor):
            location = next((location_of(user) for user in node.users), None)
            raise unsupported("it creates a tensor that can't be captured, such as an nn.Parameter", location)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise unsupported_draw(node.target, location_of(node))
        if _is_in_place(node):
            raise unsupported(f"it changes a tensor in place: {node.target}", location_of(node))

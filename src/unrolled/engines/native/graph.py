"""Capture a step and its backward as one graph of torch's small operations, and split it around the loop.

The graph is torch's own: ``make_fx`` under fake tensors with core-ATen decompositions, and the backward
from ``torch.func.vjp``. No derivative is written here. A node of the graph is computed

* *before the loop* where it is a product that depends on no state: for all time steps at once;
* *after the loop* where it is a product or a sum over the batch that no state depends on: again at once;
* *in the loop* otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unrolled.cell import Cell
from unrolled.engines import reference
from unrolled.engines.native.lower import lower
from unrolled.engines.native.program import ROWS, UnsupportedError, per_row


@dataclass(frozen=True)
class Captured:
    """One graph of a step: forward, and backward for given gradients of its states.

    Attributes:
        graph: placeholders are those below; every other node is an operation.
        params, x, states: the placeholders of the step.
        carries: for each state, the gradient that arrives from the time step after this one.
        grad_output: the gradient of the output of this time step.
        new_states: what the step returns.
        grad_params, grad_x, grad_states: the gradients of its inputs, None where there is none.
        constants: the tensors that the step itself makes.
    """

    graph: fx.Graph
    params: list[fx.Node]
    x: fx.Node
    states: list[fx.Node]
    carries: list[fx.Node]
    grad_output: fx.Node
    new_states: list[fx.Node]
    grad_params: list[fx.Node | None]
    grad_x: fx.Node | None
    grad_states: list[fx.Node | None]
    constants: dict[fx.Node, Tensor]


def capture(cell: Cell, dtype: torch.dtype, training: bool = True) -> Captured:
    """Capture the step of a cell and its backward.

    Args:
        cell: with its options; its parameters need not be bound.
        dtype: of parameters, input and states.
        training: whether to capture the backward too; without it every gradient is None.

    Raises:
        UnsupportedError: the step can't be captured: it branches on values, changes its inputs in place
            or draws random numbers.
    """
    names = list(cell.shapes())
    sizes = list(cell.state_sizes().values())

    def step(params: list[Tensor], x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        new = cell.bind(dict(zip(names, params, strict=True))).step(x, *states)
        return new if isinstance(new, tuple) else (new,)

    def both(
        params: list[Tensor], x: Tensor, states: list[Tensor], carries: list[Tensor], grad_output: Tensor
    ) -> Any:
        if not training:
            return step(params, x, states), [None] * (len(params) + 1 + len(states))
        result: Any = torch.func.vjp(step, params, x, states)
        new, vjp = result
        return new, vjp((carries[0] + grad_output, *carries[1:]))

    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = [torch.empty(ROWS, size, dtype=dtype) for size in sizes]
        arguments: tuple[Any, ...] = (
            [torch.empty(shape, dtype=dtype) for shape in cell.shapes().values()],
            torch.empty(ROWS, cell.input, dtype=dtype),
            rows,
            [torch.empty_like(row) for row in rows],
            torch.empty_like(rows[0]),
        )
        try:
            reference.check_step(cell, step(arguments[0], arguments[1], rows), tuple(rows))
            module = make_fx(torch.func.functionalize(both), decomposition_table=_decompositions())(
                *arguments
            )
        except Exception as error:  # a step may hold any Python
            raise UnsupportedError(f"its step can't be captured ({_first_line(error)})") from error
        module.graph.eliminate_dead_code()
        _refuse(module.graph)
        flat: list[Tensor] = torch.utils._pytree.tree_leaves(arguments)
        count = len(names) + 1
        moving = [count <= k < len(flat) - 1 for k in range(len(flat))]
        lowered = lower(module, flat, moving)
    return _roles(lowered, len(names), len(sizes))


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own, and of the layers and functions that it leaves whole; bounds and sums stay as they are."""
    table = {**core_aten_decompositions(), **get_decompositions(_WHOLE)}
    for kept in (aten.clamp.default, aten.addmm.default, aten.hardtanh.default):
        table.pop(kept, None)
    return table


def _refuse(graph: fx.Graph) -> None:
    """Raise what can't be compiled and would be hard to name later."""
    for node in graph.nodes:
        if node.op == "get_attr" and any(
            user.target is not aten.lift_fresh_copy.default for user in node.users
        ):
            raise UnsupportedError(f"it uses a tensor of its own ({node.target}), which no parameter holds")
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        ):
            raise UnsupportedError(f"it draws random numbers ({node.target})")
        if node.op == "call_function" and _name(node).endswith("_"):
            raise UnsupportedError(f"it changes a tensor in place ({node.target})")


def _roles(module: fx.GraphModule, params: int, states: int) -> Captured:
    graph = module.graph
    constants = {n: getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    for node, value in constants.items():
        node.meta["val"] = value
    given = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    returned: list[Any] = list(output.args[0])
    needed = _ancestors(returned[:states])
    s = states
    return Captured(
        graph,
        params=given[:params],
        x=given[params],
        states=given[params + 1 : params + 1 + s],
        carries=given[params + 1 + s : params + 1 + 2 * s],
        grad_output=given[params + 1 + 2 * s],
        new_states=returned[:s],
        grad_params=[
            grad if param in needed else None  # as torch has it where a parameter is not used
            for grad, param in zip(returned[s : s + params], given, strict=False)
        ],
        grad_x=returned[s + params],
        grad_states=returned[s + params + 1 :],
        constants=constants,
    )


@dataclass(frozen=True)
class Split:
    """A graph around its loop, forward or backward.

    Attributes:
        before: nodes to compute for all time steps at once, first; those of parameters alone too.
        loop: nodes to compute in the loop, in order.
        after: nodes to compute for all time steps at once, last.
        reads: nodes that the loop takes from outside: of every time step, or parameters.
        keeps: nodes of the loop whose value of every time step is needed outside.
        old, new: the states before and after a step of the loop.
    """

    before: list[fx.Node]
    loop: list[fx.Node]
    after: list[fx.Node]
    reads: list[fx.Node]
    keeps: list[fx.Node]
    old: list[fx.Node]
    new: list[fx.Node]


def split(captured: Captured) -> tuple[Split, Split]:
    """Split the forward and the backward of a step around their loops."""
    order = {node: k for k, node in enumerate(captured.graph.nodes)}
    gradients = [node for node in (*captured.grad_params, captured.grad_x) if node is not None]
    back_new = [node for node in captured.grad_states if node is not None]

    from_gradients = _dependents([*captured.carries, captured.grad_output], order)
    from_carries = _dependents(captured.carries, order)
    from_states = _dependents(captured.states, order)

    def in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(set(nodes), key=order.__getitem__)

    # the backward: its loop computes the carries of the time step before, and computes anew what
    # follows from the values that the forward keeps
    wanted = _ancestors([*gradients, *back_new])
    forward_loop = _ancestors(captured.new_states) & from_states
    anew = {n for n in wanted & from_states - from_gradients if n not in forward_loop}
    carried = _ancestors(back_new)
    loop = {n for n in carried & (from_carries | anew) if n.op == "call_function"}
    rest = {n for n in wanted & (from_carries | from_gradients | anew) if n.op == "call_function"} - loop
    early = {n for n in rest & _ancestors(loop) if n not in from_carries and n not in anew}
    before = rest & _ancestors(n for n in early if _at_once(n)) & early
    after: set[fx.Node] = set()
    for node in in_order(rest - before):
        if _at_once(node) or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
        else:
            loop.add(node)
    outside = {n for node in after for n in node.all_input_nodes} | set(gradients)
    backward = Split(
        before=in_order(before),
        loop=in_order(loop),
        after=in_order(after),
        reads=in_order(_inputs(loop) - loop - set(captured.carries)),
        keeps=in_order(outside & loop),
        old=captured.carries,
        new=back_new,
    )

    # the forward: what its states need, and what the backward reads of it
    read_back = {n for n in _inputs([*loop, *after, *before]) if n not in from_gradients and n not in anew}
    nodes = [n for n in in_order(_ancestors([*captured.new_states, *read_back])) if n.op == "call_function"]
    hoisted = _ancestors(n for n in nodes if n not in forward_loop and _at_once(n))
    inside = {n for n in nodes if n in forward_loop or (per_row(n) and n not in hoisted)}
    forward = Split(
        before=[n for n in nodes if n not in inside],
        loop=in_order(inside),
        after=[],
        reads=in_order(_inputs(inside) - inside - set(captured.states)),
        keeps=in_order(read_back & inside),
        old=captured.states,
        new=captured.new_states,
    )
    return forward, backward


def _at_once(node: fx.Node) -> bool:
    """Whether a node is better computed for all time steps at once: products, and sums over the batch."""
    value = node.meta["val"]
    return node.target is aten.mm.default or not (per_row(node) and value.shape[0] == ROWS)


def needed_before(before: list[fx.Node], reads: Iterable[fx.Node]) -> list[fx.Node]:
    """Of the nodes before a loop, those that the loop's own reads follow from."""
    wanted = _ancestors(reads)
    return [node for node in before if node in wanted]


def _dependents(seeds: Iterable[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    found = set(seeds)
    for node in order:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    waiting = list(nodes)
    found = set(waiting)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {found for node in nodes for found in node.all_input_nodes}


def _name(node: fx.Node) -> str:
    target: Callable[..., Any] | str = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


aten = torch.ops.aten
_WHOLE = [
    aten.native_layer_norm, aten.native_group_norm, aten._fused_rms_norm, aten._softmax, aten._log_softmax,
    aten.logsumexp, aten.mean, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.linalg_vector_norm,
    aten.gelu, aten.silu, aten.mish, aten.elu, aten.celu, aten.selu, aten.leaky_relu, aten.prelu,
    aten.softplus, aten.hardswish, aten.hardsigmoid, aten.softshrink, aten.hardshrink,
    aten.log_sigmoid_forward, aten.logit, aten.baddbmm, aten.dot, aten.mv, aten.stack, aten.unbind,
    aten.split,
]  # fmt: skip

"""Capture a step and its backward as one graph of torch's small operations, and split it around the loop.

The graph is torch's own: ``make_fx`` under fake tensors with core-ATen decompositions, and the backward
from ``torch.func.vjp``. No derivative is written here. A node of the graph is computed

* *before the loop* where it depends on no state: for all time steps at once, by torch;
* *in the loop* where a state depends on it and it depends on a state;
* *after the loop* where it depends on a state and no state on it: again for all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unrolled.cell import Cell
from unrolled.engines import reference

ROWS = 1_000_003  # the batch while capturing: no other size is likely to equal this prime


class UnsupportedError(Exception):
    """A step that the compiler can't take, and why."""


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


def capture(cell: Cell, dtype: torch.dtype) -> Captured:
    """Capture the step of a cell and its backward.

    Args:
        cell: with its options; its parameters need not be bound.
        dtype: of parameters, input and states.

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
            module = make_fx(both, decomposition_table=dict(core_aten_decompositions()))(*arguments)
        except Exception as error:  # a step may hold any Python
            raise UnsupportedError(f"its step can't be captured ({_first_line(error)})") from error
    graph = module.graph
    graph.eliminate_dead_code()
    return _roles(graph, len(names), len(sizes))


def _roles(graph: fx.Graph, params: int, states: int) -> Captured:
    given = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    returned: list[Any] = list(output.args[0])
    for node in graph.nodes:
        if node.op not in ("placeholder", "output", "call_function"):
            raise UnsupportedError(f"it uses a tensor of its own ({node.target}), which no parameter holds")
        if node.op == "call_function" and node.target in _RANDOM:
            raise UnsupportedError(f"it draws random numbers ({node.target})")
        if node.op == "call_function" and _name(node).endswith("_"):
            raise UnsupportedError(f"it changes a tensor in place ({node.target})")
    s = states
    return Captured(
        graph,
        params=given[:params],
        x=given[params],
        states=given[params + 1 : params + 1 + s],
        carries=given[params + 1 + s : params + 1 + 2 * s],
        grad_output=given[params + 1 + 2 * s],
        new_states=returned[:s],
        grad_params=returned[s : s + params],
        grad_x=returned[s + params],
        grad_states=returned[s + params + 1 :],
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
    loop = {n for n in (carried & from_carries) | (carried & anew) if n.op == "call_function"}
    after = {n for n in (wanted & (from_carries | from_gradients | anew)) - loop if n.op == "call_function"}
    before = {n for n in after if n not in from_carries and n not in anew and n in _ancestors(loop)}
    after -= before
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
    inside = {n for n in nodes if n in forward_loop}
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


def run_rows(nodes: Iterable[fx.Node], values: dict[fx.Node, Any], rows: int) -> None:
    """Compute nodes with torch for ``rows`` rows at once; ``values`` has their inputs and gets them.

    A node that reduces over the batch so reduces over all time steps as well.
    """

    def concrete(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        return rows if isinstance(argument, int) and argument == ROWS else argument

    for node in nodes:
        assert callable(node.target)
        arguments = fx.map_arg(node.args, values.__getitem__)
        arguments = torch.utils._pytree.tree_map(concrete, arguments)
        values[node] = node.target(*arguments, **node.kwargs)


def needed_before(before: list[fx.Node], reads: list[fx.Node]) -> list[fx.Node]:
    """Of the nodes before a loop, those that the loop's own reads follow from."""
    wanted = _ancestors(reads)
    return [node for node in before if node in wanted]


def per_row(node: fx.Node) -> bool:
    """Whether a node has a row for each row of the batch (else it is made of parameters alone)."""
    shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else node.meta["val"][0].shape
    return ROWS in shape


def _dependents(seeds: Iterable[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    found = set(seeds)
    for node in order:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, waiting = set(nodes), list(nodes)
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


_RANDOM = {
    torch.ops.aten.bernoulli.default,
    torch.ops.aten.bernoulli.p,
    torch.ops.aten.native_dropout.default,
    torch.ops.aten.rand.default,
    torch.ops.aten.randn.default,
    torch.ops.aten.rand_like.default,
    torch.ops.aten.randn_like.default,
}

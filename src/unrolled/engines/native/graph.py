"""Capture a step and its backward as one graph of torch's small operations, and split it around the loop.

The graph is torch's own: ``make_fx`` under fake tensors with core-ATen decompositions, and the backward
from ``torch.func.vjp``. No derivative is written here. A node of the graph is computed

* *before the loop* where it is a product that depends on no state: for all time steps at once;
* *after the loop* where it is a product or a sum over the batch that no state depends on: again at once;
* *in the loop* otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from unrolled.cell import Cell
from unrolled.engines import reference
from unrolled.engines.native.decompose import traced
from unrolled.engines.native.lower import lower
from unrolled.engines.native.program import ROWS, per_row
from unrolled.engines.native.sharing import share
from unrolled.engines.native.trial import (
    BackwardPlaces,
    Places,
    Run,
    captured_error,
    examine,
    own_tensors,
    without_its_log,
)

aten = torch.ops.aten

_CHEAP = {
    aten.neg.default, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """One graph of a step: forward, and backward for given gradients of its states.

    Attributes:
        graph: placeholders are those below; every other node is an operation.
        params, x, states: the placeholders of the step. After the parameters come the columns beside x that
            variants read, where there are some.
        own: the placeholders of other tensors of the cell that the step uses, by name.
        carries: for each state, the gradient that arrives from the time step after this one.
        grad_output: the gradient of the output of this time step.
        new_states: what the step returns.
        grad_params, grad_x, grad_states: the gradients of its inputs, None where there is none.
        constants: the tensors that the step itself makes; and what those of the cell were.
        any_mode: whether the step does the same in training and outside.
    """

    graph: fx.Graph
    params: list[fx.Node]
    own: dict[str, fx.Node]
    x: fx.Node
    states: list[fx.Node]
    carries: list[fx.Node]
    grad_output: fx.Node
    new_states: list[fx.Node]
    grad_params: list[fx.Node | None]
    grad_x: fx.Node | None
    grad_states: list[fx.Node | None]
    constants: dict[fx.Node, Tensor]
    any_mode: bool


def capture(cell: Cell, dtype: torch.dtype, training: bool = True) -> Captured:
    """Capture the step of a cell and its backward.

    Args:
        cell: with its options; its parameters need not be bound.
        dtype: of parameters, input and states.
        training: whether to capture the backward too; without it every gradient is None.

    Raises:
        UnsupportedError: the step can't be captured: it branches on values, changes its inputs in place
            or draws random numbers; the operation, and its line.
    """
    own = own_tensors(cell)
    beside = cell.features - cell.input
    sizes = list(cell.state_sizes().values())
    places = Places(cell)

    count = len(cell.shapes())

    def bound(params: list[Tensor], own_params: list[Tensor], mode: bool) -> Cell:
        tensors = zip([*cell.shapes(), *own], [*params, *own_params], strict=True)
        made = cell.bind(dict(tensors))
        made.training = mode
        return made

    def step(of: Cell, x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        with places:
            new = of.step(x, *states)
        return new if isinstance(new, tuple) else (new,)

    def both(
        params: list[Tensor],
        own_params: list[Tensor],
        x: Tensor,
        states: list[Tensor],
        carries: list[Tensor],
        grad_output: Tensor,
    ) -> Any:
        params, columns = params[:count], params[count:]

        def function(params: list[Tensor], x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
            x = torch.cat((x, *columns), -1) if columns else x
            return step(bound(params, own_params, cell.training), x, states)

        if not training:
            return function(params, x, states), [None] * (count + 1 + len(states))
        result: Any = torch.func.vjp(function, params, x, states)
        new, vjp = result
        places.now = None  # what fails now is no line's, but torch's backward of the step
        with BackwardPlaces():  # type: ignore[no-untyped-call]
            return new, vjp((carries[0] + grad_output, *carries[1:]))

    def parameters() -> tuple[list[Tensor], list[Tensor]]:
        params = [torch.empty(shape, dtype=dtype) for shape in cell.shapes().values()]
        return params, [torch.empty_like(tensor) for tensor in own.values()]

    def rows_of(rows: int) -> tuple[Tensor, list[Tensor]]:
        x = torch.empty(rows, cell.features, dtype=dtype)
        return x, [torch.empty(rows, size, dtype=dtype) for size in sizes]

    def trial(mode: bool) -> Run:
        params, own_params = parameters()
        made = bound(params, own_params, mode)
        names = [*cell.shapes(), *own, "x", *cell.state]

        def run(rows: int) -> tuple[dict[str, Tensor], Callable[[], Any]]:
            x, states = rows_of(rows)
            named = dict(zip(names, [*params, *own_params, x, *states], strict=True))
            return named, lambda: reference.check_step(cell, step(made, x, states), tuple(states))

        return run

    with FakeTensorMode(allow_non_fake_inputs=True), without_its_log():
        (params, own_params), (x, states) = parameters(), rows_of(ROWS)
        if beside:
            x = torch.empty(ROWS, cell.input, dtype=dtype)
            params.append(torch.empty(ROWS, beside, dtype=dtype))
        carries = [torch.empty_like(row) for row in states]
        arguments = (params, own_params, x, states, carries, torch.empty_like(states[0]))
        try:
            any_mode = examine(trial, cell.training, places)
            module = traced(both, arguments)
        except Exception as error:  # a step may hold any Python
            raise captured_error(error, places) from error
        flat: list[Tensor] = tree_leaves(arguments)
        still = len(params) + len(own) + 1
        moving = [still <= k < len(flat) - 1 for k in range(len(flat))]
        lowered = lower(module, flat, moving, dtype)
    needed = _used(module.graph, len(sizes))
    return _roles(lowered, count, bool(beside), own, len(sizes), any_mode, needed)


def _used(graph: fx.Graph, states: int) -> list[bool]:
    """Which placeholders the new states follow from."""
    output = next(node for node in graph.nodes if node.op == "output")
    found = ancestors(tree_leaves(output.args[0])[:states])
    return [node in found for node in graph.nodes if node.op == "placeholder"]


def _roles(
    module: fx.GraphModule,
    params: int,
    beside: bool,
    own: dict[str, Tensor],
    states: int,
    any_mode: bool,
    needed: list[bool],
) -> Captured:
    graph = module.graph
    constants = {n: getattr(module, str(n.target)).contiguous() for n in graph.nodes if n.op == "get_attr"}
    for node, value in constants.items():
        node.meta["val"] = value
    given = iter([node for node in graph.nodes if node.op == "placeholder"])
    counts = {
        "params": params + beside,
        "own": len(own),
        "x": 1,
        "states": states,
        "carries": states,
        "grad": 1,
    }
    taken = {role: list(itertools.islice(given, count)) for role, count in counts.items()}
    output = next(node for node in graph.nodes if node.op == "output")
    returned: list[Any] = tree_leaves(output.args[0])
    carried = [*returned[:states], *returned[states + params + 1 :]]
    share(graph, ancestors(node for node in carried if isinstance(node, fx.Node)))
    returned = tree_leaves(output.args[0])
    order = {node: k for k, node in enumerate(graph.nodes)}
    new_states, grad_states = (
        _in_the_loop(graph, output, part, _dependents(old, order))
        for part, old in (
            (returned[:states], taken["states"]),
            (returned[states + params + 1 :], taken["carries"]),
        )
    )
    read = {name: node for name, node in zip(own, taken["own"], strict=True) if node.users}
    constants |= {node: own[name].detach().clone().contiguous() for name, node in read.items()}
    [x] = taken["x"]
    gradients = [  # as torch has it where a parameter is not used
        grad if used else None
        for grad, used in zip(
            returned[states : states + params + 1],
            [*needed[:params], needed[params + beside + len(own)]],
            strict=True,
        )
    ]
    return Captured(
        graph,
        params=taken["params"],
        own=read,
        x=x,
        states=taken["states"],
        carries=taken["carries"],
        grad_output=taken["grad"][0],
        new_states=new_states,
        grad_params=gradients[:-1],
        grad_x=gradients[-1],
        grad_states=grad_states,
        constants=constants,
        any_mode=any_mode,
    )


def _in_the_loop(graph: fx.Graph, output: fx.Node, values: list[Any], inside: set[fx.Node]) -> list[Any]:
    """What a loop hands on to its next step, each computed in it: a copy where it is not."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, fx.Node) and (value.op != "call_function" or value not in inside):
            # columns side by side are stored part by part, never read as one
            same = value.target is aten.cat.default
            with graph.inserting_before(output):
                if same:
                    copied = graph.call_function(aten.cat.default, value.args)
                else:
                    copied = graph.call_function(aten.clone.default, (value,))
            copied.meta["val"] = value.meta["val"]
            value = copied
        found.append(value)
    return found


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

    def alone(self) -> Split:
        """The loop as it is where nothing but its states is wanted."""
        wanted = ancestors(self.new)
        loop = [node for node in self.loop if node in wanted]
        read = _inputs(loop)
        return replace(self, loop=loop, reads=[node for node in self.reads if node in read], keeps=[])


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
    wanted = ancestors([*gradients, *back_new])
    forward_loop = ancestors(captured.new_states) & from_states
    anew = {n for n in wanted & from_states - from_gradients if n not in forward_loop}
    carried = ancestors(back_new)
    loop = {n for n in carried & (from_carries | anew) if n.op == "call_function"} | set(back_new)
    rest = {n for n in wanted & (from_carries | from_gradients | anew) if n.op == "call_function"} - loop
    early = {n for n in rest & ancestors(loop) if n not in from_carries and n not in anew}
    before = rest & ancestors(n for n in early if _at_once(n)) & early
    after: set[fx.Node] = set()
    for node in in_order(rest - before):
        if _at_once(node) or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
        else:
            loop.add(node)
    columns = {n for n in captured.x.users if n.target is aten.slice.Tensor}
    twice = _twice(in_order((forward_loop | columns) - set(captured.new_states)), loop, before | after)
    loop |= twice
    anew |= twice
    made = loop | before | after
    for node in in_order(ancestors(n for n in gradients if n not in made)):  # they are constants
        if node.op == "call_function" and node not in made and node not in from_states:
            after.add(node)
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
    nodes = [n for n in in_order(ancestors([*captured.new_states, *read_back])) if n.op == "call_function"]
    hoisted = ancestors(n for n in nodes if n not in forward_loop and _at_once(n))
    inside = {n for n in nodes if n in forward_loop or (per_row(n) and n not in hoisted)}
    forward = Split(
        before=[n for n in nodes if n not in inside],
        loop=in_order(inside),
        after=[],
        reads=in_order(_inputs(inside) - inside - set(captured.states)),
        keeps=in_order(read_back & inside - set(captured.new_states)),  # those are stored anyway
        old=captured.states,
        new=captured.new_states,
    )
    return forward, backward


def _twice(nodes: list[fx.Node], loop: set[fx.Node], around: set[fx.Node]) -> set[fx.Node]:
    """Of the nodes of the forward loop, those that the backward loop had better compute again than read.

    That is one operation on values that it reads anyway, or on what is the same in every row; or none, where
    they are columns of the input.
    """
    read = _inputs(loop)
    found: set[fx.Node] = set()
    for node in nodes:
        given = node.all_input_nodes
        known = all((n in read and n not in found) or not per_row(n) for n in given)
        columns = node.target is aten.slice.Tensor and given[0].op == "placeholder"
        cheap = columns or (node.target in _CHEAP and known)
        if cheap and node in read and around.isdisjoint(node.users):
            found.add(node)
    return found


def _at_once(node: fx.Node) -> bool:
    """Whether a node is better computed for all time steps at once: products, and sums over the batch."""
    value = node.meta["val"]
    return node.target is aten.mm.default or not (per_row(node) and value.shape[0] == ROWS)


def _dependents(seeds: Iterable[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node]:
    found = set(seeds)
    for node in order:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that they follow from."""
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

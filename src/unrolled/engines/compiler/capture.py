"""Capture a step and its backward as one graph of torch's small operations, and split it around the loop.

The graph is torch's own: ``make_fx`` under fake tensors with core-ATen decompositions, and the backward
from ``torch.func.vjp``. No derivative is written here. A node of the graph is computed

* *before the loop* where it is a product that depends on no state: for all time steps at once;
* *after the loop* where it is a product or a sum over the batch that no state depends on: again at once;
* *in the loop* otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.engines.compiler.checks import Run, captured_error, examine, own_tensors, without_its_log
from unrolled.engines.compiler.decompositions import traced
from unrolled.engines.compiler.ir import BATCH_SYMBOL, ancestors, dependents
from unrolled.engines.compiler.lowering.lower import lower
from unrolled.engines.compiler.merge_gradients import share
from unrolled.engines.compiler.source_location import BackwardPlaces, Places

aten = torch.ops.aten


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
        (params, own_params), (x, states) = parameters(), rows_of(BATCH_SYMBOL)
        if beside:
            x = torch.empty(BATCH_SYMBOL, cell.input, dtype=dtype)
            params.append(torch.empty(BATCH_SYMBOL, beside, dtype=dtype))
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
        _in_the_loop(graph, output, part, dependents(old, order))
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

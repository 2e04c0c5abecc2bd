"""Capture a step and its backward as one graph of small torch operations.

The graph comes from torch: ``make_fx`` under fake tensors with core-ATen decompositions, and the backward
from ``torch.func.vjp``. No derivative is written here. Afterwards ``partition.py`` splits the graph. A node
is computed

* *before the loop* if it is a product that depends on no state: for all time steps at once;
* *after the loop* if it is a product, or a sum over the batch, that no state depends on: again at once;
* *in the loop* otherwise.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines._torch_private import (
    FakeTensorMode,
    tree_leaves,
    use_lazy_graph_module,
)
from unrolled.engines.compiler.checks import (
    capture_error,
    check_capturable,
    silence_fake_tensor_log,
    tensor_attributes,
)
from unrolled.engines.compiler.gradient_paths import GradientPaths
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError, ancestors, dependents
from unrolled.engines.compiler.lowering.dtypes import INTEGER_DTYPES, NeedsFloat64Error
from unrolled.engines.compiler.lowering.lower import lower
from unrolled.engines.compiler.merge_gradients import merge_gradient_columns
from unrolled.engines.compiler.traceable_step import TraceableStep, plain_autograd

aten = torch.ops.aten

INDEX_DTYPES = (torch.bool, *INTEGER_DTYPES)
_MAX_CACHED_RESULTS = 4096  # of operations on fake tensors; torch itself has no limit


@dataclass(frozen=True)
class CapturedStep:
    """One graph of a step: the forward, and the backward for given gradients of its states.

    Attributes:
        graph: The graph. Its placeholders are listed below; every other node is an operation.
        params: Placeholders of the parameters, and last that of the wrappers' extra inputs, if there are any.
        tensor_attributes: Placeholders of the cell's other tensors that the step uses, by name.
        x: Placeholder of the input.
        states: Placeholders of the states.
        carries: Placeholders of the states' gradients that arrive from the following time step.
        grad_output: Placeholder of the gradient of this step's output.
        new_states: The states that the step returns.
        grad_params: Gradients of the parameters; None for a parameter that autograd doesn't reach.
        grad_x: Gradient of the input; None if autograd doesn't reach it.
        grad_states: Gradients of the states before the step, which the preceding time step gets as carries.
        constants: Values of the tensors that the step itself creates, and of the cell's tensor attributes
            at the time of the capture.
        mode_independent: Whether the step does the same in training and in evaluation mode.
        paths: Which inputs autograd reaches from each new state. None without a backward.
        dtype: Dtype that the loops compute in. It is float64 for a float32 step that needs more digits.
        constant_attributes: Tensor attributes whose values are constants of the graph, such as indices.
    """

    graph: fx.Graph
    params: list[fx.Node]
    tensor_attributes: dict[str, fx.Node]
    x: fx.Node
    states: list[fx.Node]
    carries: list[fx.Node]
    grad_output: fx.Node
    new_states: list[fx.Node]
    grad_params: list[fx.Node | None]
    grad_x: fx.Node | None
    grad_states: list[fx.Node | None]
    constants: dict[fx.Node, Tensor]
    mode_independent: bool
    paths: GradientPaths | None
    dtype: torch.dtype = torch.float32
    constant_attributes: dict[str, Tensor] = field(default_factory=dict)


def capture(cell: Cell, dtype: torch.dtype, training: bool = True) -> CapturedStep:
    """Capture the step of a cell and its backward; see :func:`_capture`.

    If that fails and the cell has tensor attributes of whole numbers or booleans, their values may be needed:
    then they become constants of the graph.
    """
    for size in {n for shape in cell.shapes().values() for n in shape} | {*cell.state_sizes().values()}:
        if size and size % BATCH_SYMBOL == 0:  # indistinguishable from the batch size
            raise UnsupportedError(f"its size {size} is a multiple of {BATCH_SYMBOL}; use another size")
    try:
        return _capture(cell, dtype, training, {})
    except UnsupportedError as error:
        attributes = tensor_attributes(cell).items()
        constant = {name: v.detach().clone() for name, v in attributes if v.dtype in INDEX_DTYPES}
        if not constant:
            raise
        try:
            return _capture(cell, dtype, training, constant)
        except UnsupportedError:
            raise error from None


def _capture(
    cell: Cell, dtype: torch.dtype, training: bool, constant_attributes: dict[str, Tensor]
) -> CapturedStep:
    """Capture the step of a cell and its backward.

    Args:
        cell: The cell, with its options. Its parameters need not be bound.
        dtype: Dtype of the parameters, the input and the states.
        training: Whether to capture the backward too. Without it, every gradient is None.
        constant_attributes: Tensor attributes whose values become constants.

    Raises:
        UnsupportedError: If the step can't be captured, for example because it branches on values, changes
            its inputs in place or draws random numbers that aren't extra inputs. The message names the
            operation and its line.
    """
    step = TraceableStep(cell, dtype, training, constant_attributes)
    loop_dtype = dtype
    # Compiling the Python code of the graphs would take time, and torch would keep the code forever.
    no_code = use_lazy_graph_module(True)
    with plain_autograd(), FakeTensorMode(allow_non_fake_inputs=True), silence_fake_tensor_log(), no_code:
        arguments = step.arguments()
        try:
            mode_independent = check_capturable(step.run, cell.training, step.tracker)
            module = step.trace(arguments)
            paths = step.paths() if training else None
        except Exception as error:  # a step is arbitrary Python code and may raise anything
            raise capture_error(error, step.tracker) from error
        try:
            lowered = lower(module, arguments.flat, arguments.recurrent, dtype)
        except NeedsFloat64Error:
            loop_dtype = torch.float64
            lowered = lower(module, arguments.in_float64(), arguments.recurrent, loop_dtype)
    if len(FakeTensorMode.cache) > _MAX_CACHED_RESULTS:
        FakeTensorMode.cache_clear()
    captured = _assign_roles(lowered, step, mode_independent, paths)
    return replace(captured, dtype=loop_dtype, constant_attributes=constant_attributes)


def _assign_roles(
    module: fx.GraphModule, step: TraceableStep, mode_independent: bool, paths: GradientPaths | None
) -> CapturedStep:
    """Sort the placeholders and outputs of a lowered graph into the fields of a :class:`CapturedStep`.

    Args:
        module: The lowered graph.
        step: The step.
        mode_independent: See :class:`CapturedStep`.
        paths: See :class:`CapturedStep`.
    """
    graph, attributes = module.graph, step.attributes
    params, states = len(step.cell.shapes()), len(step.state_sizes)
    constants = {n: getattr(module, str(n.target)).contiguous() for n in graph.nodes if n.op == "get_attr"}
    for node, value in constants.items():
        node.meta["val"] = value
    inputs = _inputs_by_role(graph, step)
    output = next(node for node in graph.nodes if node.op == "output")
    outputs: list[Any] = tree_leaves(output.args[0])
    carried = [*outputs[:states], *outputs[states + params + 1 :]]
    merge_gradient_columns(graph, ancestors(node for node in carried if isinstance(node, fx.Node)))
    outputs = tree_leaves(output.args[0])
    order = {node: k for k, node in enumerate(graph.nodes)}
    new_states, grad_states = (
        _copy_into_loop(graph, output, values, dependents(old_states, order))
        for values, old_states in (
            (outputs[:states], inputs["states"]),
            (outputs[states + params + 1 :], inputs["carries"]),
        )
    )
    used_attributes = {
        name: node for name, node in zip(attributes, inputs["attributes"], strict=True) if node.users
    }
    constants |= {
        node: attributes[name].detach().clone().contiguous() for name, node in used_attributes.items()
    }
    [x] = inputs["x"]
    gradients = outputs[states : states + params + 1]
    if paths is not None:
        x_is_reached, *params_are_reached = paths.of_x_and_params()
        reached = [*params_are_reached, x_is_reached]
        gradients = [grad if flag else None for grad, flag in zip(gradients, reached, strict=True)]
    return CapturedStep(
        graph,
        params=inputs["params"],
        tensor_attributes=used_attributes,
        x=x,
        states=inputs["states"],
        carries=inputs["carries"],
        grad_output=inputs["grad_output"][0],
        new_states=new_states,
        grad_params=gradients[:-1],
        grad_x=gradients[-1],
        grad_states=grad_states,
        constants=constants,
        mode_independent=mode_independent,
        paths=paths,
    )


def _inputs_by_role(graph: fx.Graph, step: TraceableStep) -> dict[str, list[fx.Node]]:
    """Return the placeholders of a graph by the fields of :class:`CapturedStep`."""
    placeholders = iter([node for node in graph.nodes if node.op == "placeholder"])
    counts = {
        "params": len(step.cell.shapes()) + (step.extra_width > 0),
        "attributes": len(step.attributes),
        "x": 1,
        "states": len(step.state_sizes),
        "carries": len(step.state_sizes),
        "grad_output": 1,
    }
    return {role: list(itertools.islice(placeholders, count)) for role, count in counts.items()}


def _copy_into_loop(graph: fx.Graph, output: fx.Node, values: list[Any], loop: set[fx.Node]) -> list[Any]:
    """Add a copy of each carried value that no node of the loop computes, and return the carried values.

    Args:
        graph: The graph; it is changed.
        output: Its output node.
        values: Values that the loop passes to its next step. None stays None.
        loop: Nodes that depend on the values of the previous step.
    """
    carried: list[Any] = []
    for value in values:
        if isinstance(value, fx.Node) and (value.op != "call_function" or value not in loop):
            with graph.inserting_before(output):
                if value.target is aten.cat.default:  # the loop stores the parts of a cat one by one
                    copy = graph.call_function(aten.cat.default, value.args)
                else:
                    copy = graph.call_function(aten.clone.default, (value,))
            copy.meta["val"] = value.meta["val"]
            value = copy
        carried.append(value)
    return carried

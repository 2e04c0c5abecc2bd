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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from unrolled.cells.base import Cell
from unrolled.engines import reference
from unrolled.engines._torch_private import (
    FakeTensorMode,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    top_saved_tensors_hooks,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    use_lazy_graph_module,
)
from unrolled.engines.compiler.checks import (
    Run,
    capture_error,
    check_capturable,
    silence_fake_tensor_log,
    tensor_attributes,
)
from unrolled.engines.compiler.decompositions import trace_decomposed
from unrolled.engines.compiler.gradient_paths import GradientPaths, gradient_paths
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError, ancestors, dependents
from unrolled.engines.compiler.lowering.dtypes import INTEGER_DTYPES, NeedsFloat64Error
from unrolled.engines.compiler.lowering.lower import lower
from unrolled.engines.compiler.merge_gradients import merge_gradient_columns
from unrolled.engines.compiler.source_location import (
    BackwardLocationMode,
    LocationTracker,
    unsupported,
)

aten = torch.ops.aten

_INDEX_DTYPES = (torch.bool, *INTEGER_DTYPES)
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
    try:
        return _capture(cell, dtype, training, {})
    except UnsupportedError as error:
        attributes = tensor_attributes(cell).items()
        constant = {name: v.detach().clone() for name, v in attributes if v.dtype in _INDEX_DTYPES}
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
    attributes = {n: value for n, value in tensor_attributes(cell).items() if n not in constant_attributes}
    extra_width = cell.features - cell.input
    state_sizes = list(cell.state_sizes().values())
    tracker = LocationTracker(cell)

    param_count = len(cell.shapes())

    def bind(params: list[Tensor], attribute_values: list[Tensor], mode: bool) -> Cell:
        tensors = zip([*cell.shapes(), *attributes], [*params, *attribute_values], strict=True)
        bound = cell.bind(dict(tensors))
        bound.training = mode
        return bound

    def step(bound: Cell, x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        with tracker:
            new_states = bound.step(x, *states)
        return new_states if isinstance(new_states, tuple) else (new_states,)

    def forward_and_backward(
        params: list[Tensor],
        attribute_values: list[Tensor],
        x: Tensor,
        states: list[Tensor],
        carries: list[Tensor],
        grad_output: Tensor,
    ) -> Any:
        params, extra_inputs = params[:param_count], params[param_count:]

        def forward(params: list[Tensor], x: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
            x = torch.cat((x, *extra_inputs), -1) if extra_inputs else x
            return step(bind(params, attribute_values, cell.training), x, states)

        if not training:
            return forward(params, x, states), [None] * (param_count + 1 + len(states))
        new_states: Any
        new_states, vjp = differentiate(forward, params, x, states)
        tracker.current = None  # an error from here on is in torch's backward, not in a line of the step
        with BackwardLocationMode():  # type: ignore[no-untyped-call]
            return new_states, vjp((carries[0] + grad_output, *carries[1:]))

    def fake_parameters() -> tuple[list[Tensor], list[Tensor]]:
        params = [torch.empty(shape, dtype=dtype) for shape in cell.shapes().values()]
        return params, [torch.empty_like(tensor) for tensor in attributes.values()]

    def fake_inputs(batch: int) -> tuple[Tensor, list[Tensor]]:
        x = torch.empty(batch, cell.features, dtype=dtype)
        return x, [torch.empty(batch, size, dtype=dtype) for size in state_sizes]

    def make_run(mode: bool) -> Run:
        params, attribute_values = fake_parameters()
        bound = bind(params, attribute_values, mode)
        names = [*cell.shapes(), *attributes, "x", *cell.state]

        def run(batch: int) -> tuple[dict[str, Tensor], Callable[[], Any]]:
            x, states = fake_inputs(batch)
            inputs = dict(zip(names, [*params, *attribute_values, x, *states], strict=True))
            return inputs, lambda: _check_states(cell, step(bound, x, states), tuple(states), tracker)

        return run

    # Compiling the Python code of the graphs would take time, and torch would keep the code forever.
    no_code = use_lazy_graph_module(True)
    with (
        _plain_autograd(),
        FakeTensorMode(allow_non_fake_inputs=True),
        silence_fake_tensor_log(),
        no_code,
    ):
        (params, attribute_values), (x, states) = fake_parameters(), fake_inputs(BATCH_SYMBOL)
        if extra_width:
            x = torch.empty(BATCH_SYMBOL, cell.input, dtype=dtype)
            params.append(torch.empty(BATCH_SYMBOL, extra_width, dtype=dtype))
        carries = [torch.empty_like(state) for state in states]
        arguments = (params, attribute_values, x, states, carries, torch.empty_like(states[0]))
        differentiate: Any = torch.func.vjp
        try:
            mode_independent = check_capturable(make_run, cell.training, tracker)
            try:
                module = trace_decomposed(forward_and_backward, arguments)
            except RuntimeError as error:
                if "setup_context" not in str(error):
                    raise
                differentiate = _vjp  # torch.func needs an autograd.Function with setup_context
                module = trace_decomposed(forward_and_backward, arguments)
            paths = None
            if training:
                (shared, attribute_values), (full_x, _) = fake_parameters(), fake_inputs(BATCH_SYMBOL)
                paths = gradient_paths(
                    lambda x, states, params: step(bind(params, attribute_values, cell.training), x, states),
                    full_x,
                    states,
                    shared,
                )
        except Exception as error:  # a step is arbitrary Python code and may raise anything
            raise capture_error(error, tracker) from error
        flat: list[Tensor] = tree_leaves(arguments)
        first_state = len(params) + len(attributes) + 1
        recurrent = [first_state <= k < len(flat) - 1 for k in range(len(flat))]  # states and carries
        loop_dtype = dtype
        try:
            lowered = lower(module, flat, recurrent, dtype)
        except NeedsFloat64Error:
            loop_dtype = torch.float64
            first_attribute = len(params)
            is_attribute = [first_attribute <= k < first_state - 1 for k in range(len(flat))]
            flat = [v if own else v.double() for v, own in zip(flat, is_attribute, strict=True)]
            lowered = lower(module, flat, recurrent, loop_dtype)
    if len(FakeTensorMode.cache) > _MAX_CACHED_RESULTS:
        FakeTensorMode.cache_clear()
    captured = _assign_roles(
        lowered, param_count, bool(extra_width), attributes, len(state_sizes), mode_independent, paths
    )
    return replace(captured, dtype=loop_dtype, constant_attributes=constant_attributes)


@contextmanager
def _plain_autograd() -> Iterator[None]:
    """Suspend what torch.func doesn't support: hooks for saved tensors, anomaly detection, inference mode."""
    hooks = []
    while (top := top_saved_tensors_hooks(False)) is not None:
        pop_saved_tensors_hooks()
        hooks.append(top)
    try:
        with torch.autograd.set_detect_anomaly(False), torch.inference_mode(False):
            yield
    finally:
        for pack, unpack in reversed(hooks):
            push_saved_tensors_hooks(pack, unpack)


def _vjp(function: Callable[..., tuple[Tensor, ...]], *primals: Any) -> tuple[tuple[Tensor, ...], Any]:
    """Return what ``torch.func.vjp`` returns, computed by torch.autograd."""
    with torch.enable_grad():
        primals = tree_map(lambda primal: primal.detach().requires_grad_(), primals)
        outputs = function(*primals)

    def backward(gradients: tuple[Tensor, ...]) -> Any:
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        inputs, structure = tree_flatten(primals)
        results: Any = [None] * len(inputs)
        if pairs:
            used, used_gradients = zip(*pairs, strict=True)
            results = torch.autograd.grad(used, inputs, used_gradients, allow_unused=True)
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(results, inputs, strict=True)]
        return tree_unflatten(filled, structure)

    return outputs, backward


def _check_states(
    cell: Cell, new: tuple[Tensor, ...], old: tuple[Tensor, ...], tracker: LocationTracker
) -> None:
    """Check that a step returns its states with their shapes and dtypes.

    Raises:
        UnsupportedError: If a state has another dtype. The next step would then compute in that dtype.
    """
    reference.check_step(cell, new, old)
    for name, after, before in zip(cell.state, new, old, strict=True):
        if after.dtype is not before.dtype:
            kinds = f"its step returns {name} as {after.dtype} instead of {before.dtype}"
            raise unsupported(f"{kinds}; write .to(x.dtype)", tracker.step)


def _assign_roles(
    module: fx.GraphModule,
    params: int,
    extra_inputs: bool,
    attributes: dict[str, Tensor],
    states: int,
    mode_independent: bool,
    paths: GradientPaths | None,
) -> CapturedStep:
    """Sort the placeholders and outputs of a lowered graph into the fields of a :class:`CapturedStep`.

    Args:
        module: The lowered graph.
        params: Number of parameters.
        extra_inputs: Whether a placeholder of extra inputs follows the parameters.
        attributes: The cell's tensors that are no parameters, by name.
        states: Number of states.
        mode_independent: See :class:`CapturedStep`.
        paths: See :class:`CapturedStep`.
    """
    graph = module.graph
    constants = {n: getattr(module, str(n.target)).contiguous() for n in graph.nodes if n.op == "get_attr"}
    for node, value in constants.items():
        node.meta["val"] = value
    placeholders = iter([node for node in graph.nodes if node.op == "placeholder"])
    counts = {
        "params": params + extra_inputs,
        "attributes": len(attributes),
        "x": 1,
        "states": states,
        "carries": states,
        "grad_output": 1,
    }
    inputs = {role: list(itertools.islice(placeholders, count)) for role, count in counts.items()}
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

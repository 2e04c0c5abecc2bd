"""Compiled loops as one differentiable torch function, for one direction of a layer or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.engines import reference
from unrolled.engines._torch_private import (
    TreeSpec,
    functorch_interpreter,
    keep_graph,
    top_saved_tensors_hooks,
    tree_flatten,
    tree_unflatten,
)
from unrolled.engines.compiler.batch_layout import Layout, ShiftedState
from unrolled.engines.compiler.bulk_ops import Values
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import is_batched
from unrolled.engines.compiler.step_values import BY_REFERENCE, check_same_values
from unrolled.engines.directions import (
    DirectionSpec,
    group_by_direction,
    split_by_direction,
    threads_per_direction,
)
from unrolled.engines.memory import all_readable, check_not_freed, materialize
from unrolled.engines.missing_gradients import (
    constant_results,
    existing_gradients,
    unused_states_spread,
)


class Recurrence(torch.autograd.Function):
    """All directions of a layer as one function of x, the initial states and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, specs: tuple[DirectionSpec, ...], sizes: list[int] | None, x: Tensor, *tensors: Tensor
    ) -> Any:
        """Return the output and the final states of each direction in one flat tuple."""
        layout = Layout.of(x, sizes)
        ctx.set_materialize_grads(False)  # gradients of unused states stay None
        results: list[Tensor] = []
        versions = []
        saved = []
        for step_states, final, values in forward(specs, layout, x, tensors):
            output = step_states[0]
            results += (output, *final)
            versions.append(output._version)
            # The output refers to this node, so saving it undetached would make a reference cycle.
            saved.append(([output.detach(), *step_states[1:]], values))
        flat: list[Any] = []
        structure = None
        if top_saved_tensors_hooks(True) is not None:
            # Saved-tensor hooks see only tensors given to save_for_backward: offloading, checkpointing.
            flat, structure = tree_flatten(saved)
        ctx.mark_non_differentiable(
            *constant_results(specs, len(x), sizes, ctx.needs_input_grad[2:], results)
        )
        ctx.save_for_backward(x, *tensors, *flat)
        ctx.saved = (specs, sizes, layout, len(tensors), structure or saved, versions)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of x and of the tensors."""
        x, *tensors = ctx.saved_tensors  # first, because it raises torch's error at a second backward pass
        specs, sizes, layout, count, saved, versions = ctx.saved
        tensors, flat = tensors[:count], tensors[count:]
        if isinstance(saved, TreeSpec):
            saved = tree_unflatten(flat, saved)
            versions = [step_states[0]._version for step_states, _ in saved]  # torch has checked them
        if not keep_graph():
            ctx.saved = None  # free the memory even if the user keeps the loss
        grads = materialize_gradients(grads, [x, *tensors, *(states[0] for states, _ in saved)])
        if by_reference(grads):
            return None, None, *reference_gradients(specs, sizes, x, tensors, grads)
        if any(states[0]._version != version for (states, _), version in zip(saved, versions, strict=True)):
            # The output was changed in place: compute it again.
            saved = [(step_states, values) for step_states, _, values in forward(specs, layout, x, tensors)]
        results = gradients(specs, layout, x, tensors, saved, grads, ctx.needs_input_grad[2:])
        if unused_states_spread(specs, grads, results):
            return None, None, *reference_gradients(specs, sizes, x, tensors, grads)
        return None, None, *existing_gradients(specs, len(x), sizes, grads, results)


def materialize_gradients(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return incoming gradients with their values in memory; autograd also passes lazy zeros and negations.

    Raises:
        RuntimeError: If the memory of a gradient or of a saved tensor was freed.
    """
    if functorch_interpreter() is not None:
        return tuple(grads)
    given = [grad for grad in grads if type(grad) is Tensor]
    if all_readable([*saved, *given]) and not any(grad.is_neg() for grad in given):
        return tuple(grads)
    check_not_freed((*saved, *given))
    return tuple([None if grad is None else materialize(grad) for grad in grads])


def by_reference(grads: Sequence[Tensor | None]) -> bool:
    """Return whether the reference engine must run the backward pass.

    The compiled backward can't be differentiated again, and takes one set of gradients at a time.
    """
    if torch.is_grad_enabled() or functorch_interpreter() is not None:
        return True
    given = [grad for grad in grads if grad is not None]
    # With is_grads_batched=True, gradients are wrapped by vmap.
    return not (all(type(grad) is Tensor for grad in given) and all_readable(given))


def forward(
    specs: Sequence[DirectionSpec], layout: Layout, x: Tensor, tensors: Sequence[Tensor]
) -> list[Any]:
    """Run the forward pass and keep what the backward pass reads.

    Returns:
        For each direction the states after every time step, the final states, and the saved values.
    """
    calls, results, threads = [], [], threads_per_direction(specs)
    for spec, (states, params) in zip(specs, split_by_direction(specs, tensors), strict=True):
        states = None if states is None else tuple(part.contiguous() for part in states)
        call, step_states, final, values = spec.compiled.forward_call(
            params, x, states, layout, spec.reverse, threads, save_for_backward=True
        )
        calls.append(call)
        results.append((step_states, final, spec.compiled.select_saved(values)))
    if layout.rows:
        specs[0].compiled.backend.launch(calls)
    return results


def gradients(
    specs: Sequence[DirectionSpec],
    layout: Layout,
    x: Tensor,
    tensors: Sequence[Tensor],
    saved: Sequence[tuple[list[Tensor | None], Values]],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool] | None = None,
    groups: int = 1,
) -> list[Tensor | None]:
    """Run the backward pass and return the gradients of x and of the tensors.

    Args:
        specs: The directions.
        layout: Memory layout of the rows of x.
        x: The input.
        tensors: Initial states, parameters and extra inputs of each direction.
        saved: For each direction the states after every time step, and the values saved for the backward.
        grads: Gradients of the output and of the final states of each direction. Zeros if None.
        needed: Whether the gradients of x and of each of the tensors are needed; others may be None. None:
            all are needed.
        groups: If above 1, split the batch into this many groups, and return the gradients of parameters for
            each group, along a new first axis.
    """
    calls, results_by_direction = [], []
    threads = threads_per_direction(specs)
    for spec, (states, params), (step_states, values), (grad_output, grad_final) in zip(
        specs, split_by_direction(specs, tensors), saved, group_by_direction(grads, specs), strict=True
    ):
        states = None if states is None else tuple(part.contiguous() for part in states)
        if grad_output is None:
            grad_output = x.new_zeros(*x.shape[:-1], spec.compiled.widths[0])
        grad_final = tuple([None if part is None else part.contiguous() for part in grad_final])
        call, grad_initial, backward_values = spec.compiled.backward_call(
            values, params, x, states, step_states, grad_output, grad_final, layout, spec.reverse, threads
        )
        calls.append(call)
        results_by_direction.append((grad_initial, backward_values))
    if layout.rows:
        specs[0].compiled.backend.launch(calls)
    calls.clear()  # frees tensors that the rest doesn't read
    total_grad_x: Tensor | None = None
    results: list[Tensor | None] = []
    needed_by_direction = needed_gradients(specs, needed)
    for spec, (grad_initial, backward_values), flags in zip(
        specs, results_by_direction, needed_by_direction, strict=True
    ):
        if groups == 1:
            grad_params, grad_x = spec.compiled.gradients(backward_values, layout.rows, flags)
        else:
            grad_params, grad_x = _gradients_by_group(spec.compiled, backward_values, layout, groups, flags)
        results += (*(grad_initial if spec.stateful else ()), *grad_params, *[None] * spec.extra_input_count)
        if grad_x is not None:
            total_grad_x = grad_x if total_grad_x is None else total_grad_x.add_(grad_x)
    return [None if total_grad_x is None else total_grad_x.view(x.shape), *results]


def needed_gradients(specs: Sequence[DirectionSpec], needed: Sequence[bool] | None) -> list[tuple[bool, ...]]:
    """Return for each direction which gradients are needed: of its parameters, and of x.

    Args:
        specs: The directions.
        needed: The same for x and the tensors of all directions, see :func:`gradients`.
    """
    if needed is None:
        return [(True,) * (len(spec.compiled.captured.grad_params) + 1) for spec in specs]
    by_direction, offset = [], 1
    for spec in specs:
        count = len(spec.compiled.captured.grad_params)
        first = offset + (spec.state_count if spec.stateful else 0)
        by_direction.append((*needed[first : first + count], needed[0]))
        offset += spec.tensor_count
    return by_direction


def _gradients_by_group(
    compiled: CompiledCell, values: Values, layout: Layout, groups: int, needed: tuple[bool, ...]
) -> tuple[list[Tensor | None], Tensor | None]:
    """As :meth:`CompiledCell.gradients`, with the gradients of parameters for each group of the batch."""
    size = layout.batch // groups
    params_by_group: list[list[Tensor | None]] = []
    grad_x_parts: list[Tensor] = []
    for k in range(groups):
        rows = slice(k * size, (k + 1) * size)
        group_values = {
            node: _select_rows(value, layout, rows) if is_batched(node) else value
            for node, value in values.items()
        }
        grad_params, grad_x = compiled.gradients(group_values, layout.steps * size, needed)
        params_by_group.append(grad_params)
        if grad_x is not None:
            grad_x_parts.append(grad_x.view(layout.steps, size, -1))
    groups_by_param = [
        [grad for grad in grads if grad is not None] for grads in zip(*params_by_group, strict=True)
    ]
    stacked = [torch.stack(grads) if grads else None for grads in groups_by_param]
    return stacked, torch.cat(grad_x_parts, 1) if grad_x_parts else None


def _select_rows(value: Any, layout: Layout, rows: slice) -> Any:
    """Return some rows of the batch of a value that has all rows of all time steps."""
    if isinstance(value, ShiftedState):
        initial = None if value.initial is None else value.initial[rows].contiguous()
        states = _select_rows(value.state, layout, rows)
        return ShiftedState(states, initial, rows.stop - rows.start, value.reverse)
    steps = value.view(layout.steps, layout.batch, value.shape[-1])[:, rows]
    return (steps if value.dim() == 3 else steps.flatten(0, 1)).contiguous()


def reference_gradients(
    specs: Sequence[DirectionSpec],
    sizes: list[int] | None,
    x: Tensor,
    tensors: list[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of x and of the tensors, from the reference engine. They are differentiable."""
    with torch.enable_grad():
        # Views, because one tensor may depend on another: x on an initial state, or extra inputs on both.
        # Their gradients must not contain each other.
        x, *tensors = (tensor.view_as(tensor) for tensor in (x, *tensors))
        outputs: list[Tensor] = []
        for spec, (states, params) in zip(specs, split_by_direction(specs, tensors), strict=True):
            check_same_values(spec.cell, spec.compiled.digest, BY_REFERENCE)
            bound = spec.cell.bind(dict(zip(spec.cell.shapes(), params, strict=False)))
            features = torch.cat((x, params[-1]), -1) if spec.extra_input_count else x
            output, final = reference.run(bound, features, states, sizes, spec.reverse)
            outputs += (output, *final)
    return gradients_of_graph(outputs, [x, *tensors], grads)


def gradients_of_graph(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Return the gradients of inputs, None for those that no gradient reaches.

    Args:
        outputs: Tensors with a graph.
        inputs: Tensors of the graph, and others that require no gradient.
        grads: The gradients of the outputs. None: no gradient.
        retain_graph: Whether to keep the graph. None: if the gradients will be differentiable.
    """
    used = [(o, grad) for o, grad in zip(outputs, grads, strict=True) if grad is not None and o.requires_grad]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not used or not wanted:
        return [None] * len(inputs)
    used_outputs, used_grads = zip(*used, strict=True)
    results = iter(
        torch.autograd.grad(
            used_outputs,
            wanted,
            used_grads,
            retain_graph=retain_graph,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(results) if tensor.requires_grad else None for tensor in inputs]

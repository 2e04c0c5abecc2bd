"""Compiled loops as torch operators, for use inside compile, export, vmap and torch.func.

``unrolled::recurrence`` returns the output and the final states of one or two directions of a layer. It is
differentiable to any order (``torch_ops/autograd.py``). ``recurrence_kept`` also returns what the backward
pass reads, and ``recurrence_back`` returns the gradients. A graph stores the directions and their cells as
JSON text (``torch_ops/cell_text.py``). Calls outside of a transform don't use these operators, because
torch's dispatcher takes longer than a short loop.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec, wrap
from unrolled.engines import autograd, registry, run_compiled
from unrolled.engines._torch_private import (
    add_dynamo_guard,
    constant_for_dynamo,
    in_onnx_export,
    renew_dynamo_lock,
)
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.compiled_cell import CompiledCell
from unrolled.engines.compiler.ir import BATCH_SYMBOL, UnsupportedError
from unrolled.engines.directions import DirectionSpec
from unrolled.engines.errors import UnavailableError
from unrolled.engines.fork_safety import renew_after_fork
from unrolled.engines.torch_ops import argument_checks, cell_text
from unrolled.engines.torch_ops.cell_text import GraphCell
from unrolled.engines.torch_ops.outside_transforms import run_outside_transforms
from unrolled.engines.torch_ops.unused_states import exclude_unused_states

# Exported programs store these schemas, so the argument names never change.
_INPUTS = "Tensor x, Tensor[] tensors, Tensor? sizes, str lanes"
library: Any = torch.library.Library("unrolled", "DEF")  # type: ignore[no-untyped-call]
library.define(f"recurrence({_INPUTS}) -> Tensor[]")
library.define(f"recurrence_kept({_INPUTS}) -> Tensor[]")
library.define(f"recurrence_back(Tensor[] grads, Tensor[] made, {_INPUTS}, int groups=1) -> Tensor[]")


@constant_for_dynamo
def serialize_direction(
    cell: Cell,
    wrapper_spec: WrapperSpec,
    training: bool,
    dtype: torch.dtype,
    device: torch.device,
    stateful: bool,
    reverse: bool,
) -> tuple[str, tuple[str, ...], int, str]:
    """Serialize one direction as JSON text, after compiling its inference kernel.

    Args:
        cell: The cell, without its tensors.
        wrapper_spec: Wrappers to apply to it.
        training: Whether the layer is in training mode.
        dtype: The dtype to compute in.
        device: The device to compute on.
        stateful: Whether initial states are given.
        reverse: Whether it runs from the last time step to the first.

    Returns:
        The text, the names of the cell's tensor attributes that are not parameters, the number of its states,
        and an empty string. If the cell can't be compiled, the last item is the reason.
    """
    cell = wrap(cell, wrapper_spec)
    try:
        text = cell_text.serialize_cell(cell, training)
        graph_cell = cell_text.deserialize_cell(text)
        add_dynamo_guard(graph_cell.values.unchanged, "the values that the step of a cell reads are the same")

        def compile_cell() -> CompiledCell:
            compiled = registry.compiled(graph_cell.cell, dtype, device, graph_cell.values)
            if not in_onnx_export():  # where the operator is replaced
                compiled.inference  # noqa: B018  # without a compiler, fall back before there is a graph
            return compiled

        captured = run_outside_transforms(compile_cell).captured
        cell_text.check_constants(cell, captured.constant_attributes)
        tensor_attributes = tuple(captured.tensor_attributes)
    except (UnsupportedError, UnavailableError) as error:
        return "", (), 0, str(error)
    direction = json.dumps({"cell": text, "stateful": stateful, "back": reverse, "own": tensor_attributes})
    return direction, tensor_attributes, len(cell.state), ""


renew_after_fork(renew_dynamo_lock)  # torch.compile holds it while it traces a layer, which is then compiled


@dataclass(frozen=True)
class SerializedDirection:
    """One direction, read from its text, with its tensors.

    Attributes:
        graph_cell: The cell, without tensors, and the values that its step reads.
        stateful: Whether initial states are given. If not, they are zeros.
        reverse: Whether it runs from the last time step to the first.
        tensor_attributes: Names of the cell's tensor attributes that are not parameters.
        tensors: Initial states, parameters and tensor attributes. One list may also hold anything else that
            there is for each of these tensors.
    """

    graph_cell: GraphCell
    stateful: bool
    reverse: bool
    tensor_attributes: tuple[str, ...]
    tensors: Sequence[Any]

    @property
    def cell(self) -> Cell:
        """The cell, without tensors."""
        return self.graph_cell.cell

    @property
    def states(self) -> Sequence[Any]:
        """The initial states. Empty if they are zeros."""
        return self.tensors[: len(self.cell.state) if self.stateful else 0]

    @property
    def differentiable(self) -> Sequence[Any]:
        """The tensors that have gradients: initial states and parameters."""
        return self.tensors[: len(self.tensors) - len(self.tensor_attributes)]

    @property
    def widths(self) -> list[int]:
        """The number of features of each state."""
        return list(self.cell.state_sizes().values())

    def bound(self) -> Cell:
        """Return the cell bound to its parameters and tensor attributes."""
        names = (*self.cell.shapes(), *self.tensor_attributes)
        return self.cell.bind(dict(zip(names, self.tensors[len(self.states) :], strict=True)))

    def compiled(self, x: Tensor) -> CompiledCell:
        """Return the compiled cell for x, with any values of the tensor attributes."""
        argument_checks.check_dtype(x.dtype)
        # A meta tensor only asks for shapes. The cell's own attributes are on the CPU then.
        dtype, device = x.dtype, torch.device("cpu") if x.is_meta else x.device
        key, compiled = (torch.get_default_dtype(), dtype, device), self.graph_cell.compiled
        if key not in compiled:
            values = self.graph_cell.values
            compiled[key] = run_outside_transforms(
                lambda: registry.compiled(self.cell, dtype, device, values)
            )
        return compiled[key]

    def spec(self, x: Tensor) -> DirectionSpec:
        """Return the direction as :mod:`engines.autograd` takes it, with the tensor attributes' values."""
        bound = self.bound()
        compiled = registry.compiled(bound, x.dtype, x.device, self.graph_cell.values)
        return DirectionSpec(compiled, bound, self.stateful, self.reverse)


def deserialize_directions(text: str, tensors: Sequence[Any]) -> list[SerializedDirection]:
    """Return the directions that a text describes, with their tensors.

    Raises:
        ValueError: If the text doesn't describe directions.
        RuntimeError: If there are more or fewer tensors than the directions have.
    """
    directions, offset = [], 0
    for cell_string, stateful, reverse, tensor_attributes in _parse(text):
        try:
            graph_cell = cell_text.deserialize_cell(cell_string)
        except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(argument_checks.INVALID_TEXT.format(text)) from error
        cell = graph_cell.cell
        count = (len(cell.state) if stateful else 0) + len(cell.shapes()) + len(tensor_attributes)
        part = tensors[offset : offset + count]
        directions.append(SerializedDirection(graph_cell, stateful, reverse, tensor_attributes, part))
        offset += count
    if len({(direction.cell.input, direction.cell.features) for direction in directions}) != 1:
        raise ValueError(argument_checks.INVALID_TEXT.format(text))
    argument_checks.check_count("tensors: initial states, parameters and tensor attributes", tensors, offset)
    return directions


@functools.lru_cache(maxsize=1000)
def _parse(text: str) -> list[tuple[str, bool, bool, tuple[str, ...]]]:
    try:
        directions = [
            (entry["cell"], entry["stateful"], entry["back"], tuple(entry["own"]))
            for entry in json.loads(text)
        ]
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(argument_checks.INVALID_TEXT.format(text)) from error
    for cell, stateful, reverse, tensor_attributes in directions:
        flags_are_valid = isinstance(stateful, bool) and isinstance(reverse, bool)
        names_are_valid = all(isinstance(name, str) for name in (cell, *tensor_attributes))
        if not (flags_are_valid and names_are_valid and len(directions) <= 2):
            raise ValueError(argument_checks.INVALID_TEXT.format(text))
    if not directions:
        raise ValueError(argument_checks.INVALID_TEXT.format(text))
    return directions


def result_batch_axes(directions: Sequence[SerializedDirection]) -> list[int]:
    """Return the batch axis of each output and final state, direction by direction."""
    return [axis for direction in directions for axis in (1, *(0 for _ in direction.widths))]


def saved_batch_axes(directions: Sequence[SerializedDirection], x: Tensor) -> list[int | None]:
    """Return the batch axis of each value saved for the backward pass, None if it has none.

    Outputs and final states are not among them.
    """
    saved = [tensor for direction in directions for tensor in direction.compiled(x).saved_tensors]
    return [1 if BATCH_SYMBOL in shape else None for shape, _ in saved]


def gradient_batch_axes(directions: Sequence[SerializedDirection], x: Tensor) -> list[int | None]:
    """Return the batch axis of each gradient that is not None; None for those of parameters, without one."""
    captured = [direction.compiled(x).captured for direction in directions]
    axes: list[int | None] = [1] if any(step.grad_x for step in captured) else []
    for direction, step in zip(directions, captured, strict=True):
        axes += [0] * len(direction.states)
        axes += [None for node in step.grad_params if node is not None]
    return axes


def checked_directions(
    x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str, batch: Any = None
) -> list[SerializedDirection]:
    """Return the directions that a text describes, after a check of all arguments of a forward pass.

    The arguments are those of :func:`argument_checks.check_forward`.
    """
    directions = deserialize_directions(text, tensors)
    argument_checks.check_forward(directions, x, sizes, batch)
    return directions


# --- kernels ---


def _checked_call(
    x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str, *others: Tensor
) -> tuple[list[SerializedDirection], Layout]:
    """Return the directions and the layout of the rows, after a check of all arguments and their memory."""
    size_list = None if sizes is None else argument_checks.read_sizes(sizes, x)
    argument_checks.check_memory([x, *tensors, *others])
    directions = checked_directions(x, tensors, sizes, text, size_list and size_list[0])
    return directions, Layout.of(x, size_list)


def _infer(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    (directions, layout), calls, dtype = _checked_call(x, tensors, sizes, text), [], x.dtype
    specs = [direction.spec(x) for direction in directions]
    x, *extra_inputs = _split_extra_inputs(x, directions, specs[0].compiled.dtype)
    for direction, spec in zip(directions, specs, strict=True):
        contiguous = [*_contiguous_tensors(direction, x.dtype), *extra_inputs]
        states = tuple(contiguous[: spec.state_count]) if spec.stateful else None
        params = contiguous[spec.state_count :]
        calls.append(run_compiled.DirectionCall(spec.compiled, spec.cell, params, states, spec.reverse))
    results = run_compiled.infer(calls, x, layout)
    return [tensor.to(dtype) for output, final in results for tensor in (output, *final)]


def _forward_and_save(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    (directions, layout), dtype = _checked_call(x, tensors, sizes, text), x.dtype
    axes = saved_batch_axes(directions, x)
    specs = [direction.spec(x) for direction in directions]
    x, *extra_inputs = _split_extra_inputs(x, directions, specs[0].compiled.dtype)
    flat = [t for direction in directions for t in (*_contiguous_tensors(direction, x.dtype), *extra_inputs)]
    results: list[Tensor] = []
    saved: list[Tensor] = []
    forward = autograd.forward(specs, layout, x, flat)
    for spec, (step_states, final, values) in zip(specs, forward, strict=True):
        results += [tensor.to(dtype) for tensor in (step_states[0], *final)]
        saved += [state for state in step_states[1:] if state is not None]
        saved += [values[node] for node in spec.compiled.saved_for_backward]
    storages = {tensor.untyped_storage().data_ptr() for tensor in (x, *tensors, *results) if tensor.numel()}
    for k, (tensor, axis) in enumerate(zip(saved, axes, strict=True)):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # results of an operator must not share memory
        storages.add(tensor.untyped_storage().data_ptr())
        saved[k] = tensor if axis is None else tensor.view(*x.shape[:-1], tensor.shape[-1])
    return results + saved


def _backward(
    grads: Sequence[Tensor],
    outputs_and_saved: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int = 1,
) -> list[Tensor]:
    directions, layout = _checked_call(x, tensors, sizes, text, *grads, *outputs_and_saved)
    argument_checks.check_backward(directions, grads, outputs_and_saved, x, sizes, groups, layout.batch)
    dtype, axes = x.dtype, saved_batch_axes(directions, x)
    specs = [direction.spec(x) for direction in directions]
    x, *extra_inputs = _split_extra_inputs(x, directions, specs[0].compiled.dtype)
    flat = [t for direction in directions for t in (*_contiguous_tensors(direction, x.dtype), *extra_inputs)]
    grads = [grad.resolve_neg().to(x.dtype) for grad in grads]
    outputs, saved = outputs_and_saved[: len(directions)], outputs_and_saved[len(directions) :]
    remaining = iter(
        [tensor if axis is None else tensor.flatten(0, -2) for tensor, axis in zip(saved, axes, strict=True)]
    )
    saved_by_direction = []
    for spec, output in zip(specs, outputs, strict=True):
        step_states: list[Tensor | None] = [output.to(x.dtype).contiguous()]
        step_states += [
            None if size is None else next(remaining).contiguous()
            for size in spec.compiled.saved_state_widths[1:]
        ]
        values = {node: next(remaining).contiguous() for node in spec.compiled.saved_for_backward}
        saved_by_direction.append((step_states, values))
    gradients = autograd.gradients(specs, layout, x, flat, saved_by_direction, grads, groups=groups)
    size_list = None if sizes is None else sizes.tolist()
    gradients = exclude_unused_states(specs, size_list, x, flat, grads, gradients, groups)
    if extra_inputs and gradients[0] is not None:
        gradients[0] = torch.cat((gradients[0], torch.zeros_like(extra_inputs[0])), -1)
    return [tensor.to(dtype).contiguous() for tensor in gradients if tensor is not None]


def _split_extra_inputs(
    x: Tensor, directions: Sequence[SerializedDirection], dtype: torch.dtype
) -> list[Tensor]:
    """Split x into the cell's input and any extra inputs that wrappers read; contiguous, in a dtype."""
    x, width = x.resolve_neg().to(dtype), directions[0].cell.input
    if x.shape[-1] == width:
        return [x]
    return [x[..., :width].contiguous(), x[..., width:].contiguous()]


def _contiguous_tensors(direction: SerializedDirection, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.resolve_neg().to(dtype).contiguous() for tensor in direction.differentiable]


for _device_type in ("CPU", "CUDA"):
    library.impl("recurrence", _infer, _device_type)
    library.impl("recurrence_kept", _forward_and_save, _device_type)
    library.impl("recurrence_back", _backward, _device_type)


# --- fake kernels: shapes only ---


def fake_infer(x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str) -> list[Tensor]:
    """Return empty tensors with the shapes of the results of ``unrolled::recurrence``."""
    directions, results = checked_directions(x, tensors, sizes, text), []
    batches: list[Any] = [x.shape[1]] if sizes is None else []
    batches += [direction.states[0].shape[0] for direction in directions if direction.stateful]
    batch = batches[0] if batches else None
    if batch is None:
        batch = torch.library.get_ctx().new_dynamic_size()
    for direction in directions:
        results.append(x.new_empty(*x.shape[:-1], direction.widths[0]))
        results += [x.new_empty(batch, width) for width in direction.widths]
    return results


def _fake_forward_and_save(
    x: Tensor, tensors: Sequence[Tensor], sizes: Tensor | None, text: str
) -> list[Tensor]:
    saved = [
        x.new_empty((*x.shape[:-1], shape[-1]) if BATCH_SYMBOL in shape else shape, dtype=dtype)
        for direction in deserialize_directions(text, tensors)
        for shape, dtype in direction.compiled(x).saved_tensors
    ]
    return [*fake_infer(x, tensors, sizes, text), *saved]


def _fake_backward(
    grads: Sequence[Tensor],
    outputs_and_saved: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    sizes: Tensor | None,
    text: str,
    groups: int = 1,
) -> list[Tensor]:
    directions = checked_directions(x, tensors, sizes, text)
    argument_checks.check_backward(directions, grads, outputs_and_saved, x, sizes, groups)
    has_grad_x = gradient_batch_axes(directions, x)[:1] == [1]
    gradients = [x.new_empty(x.shape)] if has_grad_x else []
    group_axis = () if groups == 1 else (groups,)
    for direction in directions:
        gradients += [state.new_empty(state.shape) for state in direction.states]
        params = direction.differentiable[len(direction.states) :]
        nodes = direction.compiled(x).captured.grad_params
        for param, node in zip(params, nodes, strict=True):
            if node is not None:
                gradients.append(param.new_empty((*group_axis, *param.shape)))
    return gradients


torch.library.register_fake("unrolled::recurrence", fake_infer, lib=library)
torch.library.register_fake("unrolled::recurrence_kept", _fake_forward_and_save, lib=library)
torch.library.register_fake("unrolled::recurrence_back", _fake_backward, lib=library)

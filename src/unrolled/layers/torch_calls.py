"""Calls that torch's own recurrent functions answer: on CUDA devices, where cuDNN runs them.

The compiled loops run on CPUs. On a CUDA device, a layer that torch.nn has, called without options that only
this library has, runs the function that torch.nn runs, with the same parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines import dispatch, log
from unrolled.engines._torch_private import any_requires_grad, keep_graph
from unrolled.engines.autograd import by_reference, gradients_of_graph
from unrolled.engines.selection import current_engine, engine
from unrolled.engines.torch_ops import transforms
from unrolled.layers.module import States
from unrolled.layers.sequence import SequenceBatch

DEVICES = frozenset({"cuda"})
"""Types of devices on which torch's own functions run these calls."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def are_answered(x: Tensor) -> bool:
    """Return whether calls with this input run torch's own functions, whatever else they are given.

    Not in a transform of torch, such as torch.compile, which torch's functions don't support, and not if an
    engine was selected.
    """
    return (
        x.device.type in DEVICES
        and x.dtype in _DTYPES
        and current_engine() == "auto"
        and not transforms.active()
    )


def run_layer(layer: Any, sequence: SequenceBatch, initial: States | None) -> tuple[Tensor, States] | None:
    """Run a layer by torch's own function.

    Args:
        layer: The layer, a ``DropInLayer``.
        sequence: The input.
        initial: The initial states in the row order of ``sequence``, ``(K, batch, size)`` each. None: zeros.

    Returns:
        The output of the last layer in the layout of ``sequence.steps``, and the final states. None if
        torch's function doesn't support these tensors.
    """
    cells = [layer._bind(suffix) for suffix in layer._cells]  # checks the shapes
    weights = [getattr(cell, name) for cell in cells for name in cell.shapes()]
    steps = sequence.steps
    if initial is None:
        sizes, rows = layer._first.state_sizes().values(), sequence.batch
        initial = tuple([steps.new_zeros(len(cells), rows, size) for size in sizes])
    tensors = [steps, *initial, *weights]
    if not _supported(tensors):
        return None
    log.engine.info("%s: torch's own function on %s (selected: auto)", layer._label, steps.device.type)
    call = _LayerCall(layer, sequence.batch_sizes, len(initial), layer.dropout if layer.training else 0.0)
    if torch.is_grad_enabled() and any_requires_grad(tensors):
        output, *final = _Differentiable.apply(call, *tensors)  # type: ignore[no-untyped-call]
    else:
        output, *final = call.run(tensors, saves=False)
    return output, tuple(final)


def run_cell(cell: Any, rows: Tensor, initial: States | None) -> States | None:
    """Run one step by torch's own function, which can be differentiated twice.

    Args:
        cell: The cell, a ``DropInCell``.
        rows: The input, ``(batch, features)``.
        initial: The previous states, ``(batch, size)`` each. None: zeros.

    Returns:
        The new states. None if torch's function doesn't support these tensors.
    """
    bound = cell._bind("")
    if initial is None:
        initial = tuple([rows.new_zeros(rows.shape[0], size) for size in bound.state_sizes().values()])
    weights: list[Any] = [getattr(bound, name) for name in bound.shapes()]
    if not _supported([rows, *initial, *weights]):
        return None
    log.engine.info("%s: torch's own function on %s (selected: auto)", cell._label, rows.device.type)
    biases = [] if cell.bias else [None, None]
    single = len(initial) == 1
    result = cell.torch_function(rows, initial[0] if single else initial, *weights, *biases)
    return (result,) if single else result


def _supported(tensors: Sequence[Tensor]) -> bool:
    """Return whether torch's functions support these tensors: plain, on one device and of one dtype.

    With autocast, dtypes may differ.
    """
    first = tensors[0]
    mixed = transforms.maybe_autocast() and transforms.autocast_enabled(first.device.type)
    return all(
        type(tensor) in (Tensor, Parameter)
        and tensor.device == first.device
        and (tensor.dtype is first.dtype or (mixed and tensor.dtype in _DTYPES))
        for tensor in tensors
    )


@dataclasses.dataclass
class _LayerCall:
    """A call of torch's function for all layers and directions.

    Attributes:
        layer: The layer.
        batch_sizes: The batch sizes if the input is packed, else None.
        state_count: Number of states of the cell.
        dropout: Probability of zeroing an element between layers.
    """

    layer: Any
    batch_sizes: Any
    state_count: int
    dropout: float

    def run(self, tensors: Sequence[Tensor], saves: bool) -> list[Tensor]:
        """Return the output and the final states.

        Args:
            tensors: The input, the initial states and the weights.
            saves: Whether cuDNN saves what its backward pass reads. It does so only in training mode, which
                without dropout computes the same.
        """
        layer, (steps, *rest) = self.layer, tensors
        initial, weights = rest[: self.state_count], rest[self.state_count :]
        hx: Any = initial[0] if self.state_count == 1 else initial
        options = (layer.bias, layer.num_layers, self.dropout, saves or self.dropout > 0, layer.bidirectional)
        function, sizes = layer.torch_function, self.batch_sizes
        if sizes is None:
            results = function(steps, hx, weights, *options, False)
        else:
            results = function(steps, torch.as_tensor(sizes, device="cpu"), hx, weights, *options)
        return list(results)

    def run_by_reference(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the same from the reference engine, whose gradients are differentiable.

        Raises:
            RuntimeError: If there was dropout between layers, whose random numbers only cuDNN knows.
        """
        if self.dropout > 0 and self.layer.num_layers > 1:
            raise RuntimeError(
                f"{self.layer._label}: second and batched gradients through the dropout between layers "
                "aren't possible with cuDNN: run the forward pass in unrolled.engine('reference')"
            )
        steps, *rest = tensors
        initial, weights = rest[: self.state_count], iter(rest[self.state_count :])
        cells = self.layer._cells.values()
        bound = [cell.bind({name: next(weights) for name in cell.shapes()}) for cell in cells]
        layer = self.layer.with_cells(bound)
        with engine("reference"):
            output, final = layer.run_stack(
                SequenceBatch(steps, self.batch_sizes), tuple(initial), dispatch.run
            )
        return [output, *final]


class _Differentiable(torch.autograd.Function):
    """A call of torch's function, whose second gradients come from the reference engine.

    cuDNN computes first gradients only.
    """

    @staticmethod
    def forward(ctx: Any, call: _LayerCall, *tensors: Tensor) -> Any:
        """Return the output and the final states."""
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [
                tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)
            ]
            results = call.run(inputs, saves=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.graph = call, (inputs, results)
        ctx.autocast = _autocast_state(tensors[0])
        return tuple([result.detach() for result in results])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the tensors."""
        tensors = ctx.saved_tensors  # first, because it raises torch's error at a second backward pass
        inputs, outputs = ctx.graph
        keep = keep_graph()
        if not keep:
            ctx.graph = None  # free the memory even if the user keeps the loss
        if by_reference(grads):
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                # Views, because one tensor may depend on another: gradients must not contain each other.
                inputs = [tensor.view_as(tensor) for tensor in tensors]
                outputs = ctx.call.run_by_reference(inputs)
        return None, *gradients_of_graph(outputs, inputs, grads, keep or None)


def _autocast_state(x: Tensor) -> dict[str, Any]:
    """Return the arguments of torch.autocast for the present state."""
    device = x.device.type
    enabled = transforms.maybe_autocast() and transforms.autocast_enabled(device)
    return {
        "device_type": device,
        "enabled": enabled,
        "dtype": torch.get_autocast_dtype(device) if enabled else None,
    }

"""The gradient of a loss with respect to every quantity of a traced layer, at every time step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.random_state import RandomState, cuda_devices, replay_random_state
from unrolled.tracing.step_recorder import StepRecorder, run_recorded

Loss = Callable[..., Tensor]


def gradients_through_time(
    recurrent: Recurrent,
    cells: Sequence[Cell],
    initial_states: Sequence[tuple[Tensor, ...]],
    call: tuple[Any, Any],
    random_state: RandomState,
    loss: Loss | Tensor,
    dropout_function: Callable[[Tensor, float], Tensor] = dropout,
) -> list[dict[str, Tensor]]:
    """Run the forward and backward pass of a layer and return ``∂loss/∂quantity`` for every quantity.

    Args:
        recurrent: The layer, in the mode in which to run it.
        cells: The cell of each layer and direction, with its parameters.
        initial_states: The initial states of each cell, ``(batch, size)``, with the rows in the engine's
            order.
        call: Input and initial state of the layer.
        random_state: Random state from which to draw the dropout between layers.
        loss: See :meth:`unrolled.Trace.backward`.
        dropout_function: The dropout between layers.

    Returns:
        For each cell, the gradients by the name of the quantity, ``(time, batch, size)``. They are zero where
        the loss doesn't depend on the quantity.
    """
    recorders: list[StepRecorder] = []
    layouts: list[tuple[SequenceBatch, bool]] = []
    with differentiating(random_state, cuda_devices(call[0])):
        x, state = (map_tensors(part, lambda tensor: tensor.detach().clone()) for part in call)
        x = map_tensors(x, lambda tensor: tensor.requires_grad_())
        sequence = SequenceBatch.from_input(x, recurrent.batch_first, type(recurrent).__name__)

        def run(_: list[Cell], steps: Tensor, __: Any, sizes: Any, **draws: Any) -> Any:
            results = []
            for reverse in (False, True)[: 1 + recurrent.bidirectional]:
                index = len(recorders)
                # Copies, since tensors created in inference mode can't be differentiated.
                parameters = {name: getattr(cells[index], name).clone() for name in cells[index].shapes()}
                recorder = StepRecorder(cells[index].bind(parameters), keep=lambda tensor: tensor)
                start = tuple(part.detach().clone().requires_grad_() for part in initial_states[index])
                recorders.append(recorder)
                layouts.append((sequence, reverse))
                results.append(run_recorded(recorder.cell, steps, start, sizes, reverse, **draws))
            return results

        value = _evaluate(loss, *recurrent.unroll(x, state, run, dropout_function))
        all_steps = [step for recorder in recorders for step in recorder.recorded]
        inputs = [tensor for step in all_steps for tensor in step.values() if tensor.requires_grad]
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError("the loss must depend on the layer's output, but it doesn't")
        by_id = dict(zip(map(id, inputs), gradients, strict=True))
    results = []
    for recorder, (sequence, reverse) in zip(recorders, layouts, strict=True):
        for step in recorder.recorded:
            for name, tensor in step.items():
                gradient = by_id.get(id(tensor))
                step[name] = torch.zeros_like(tensor) if gradient is None else gradient.detach()
        results.append(recorder.stacked(sequence, reverse))
    return results


@contextmanager
def differentiating(random_state: RandomState, devices: list[torch.device]) -> Iterator[None]:
    """Enable gradients regardless of the caller's mode, and replay a captured random state."""
    with torch.inference_mode(False), torch.enable_grad(), replay_random_state(random_state, devices):
        yield


def _evaluate(loss: Loss | Tensor, output: Tensor | PackedSequence, state: Any) -> Tensor:
    """Compute the loss and check that it is a real scalar with a gradient."""
    if isinstance(loss, Tensor):
        data = output.data if isinstance(output, PackedSequence) else output
        if loss.shape != data.shape:
            hint = ""
            if loss.numel() == 1:
                hint = ". For a loss that is already computed, use record(model, gradients=True)"
            raise ValueError(
                "backward expects a function of the output, such as lambda output: output.square().mean(), "
                f"or a target with the output's shape {tuple(data.shape)}, but got a tensor of shape "
                f"{tuple(loss.shape)}{hint}"
            )
        if loss.is_complex() and not data.is_complex():
            raise ValueError("the target must be real, because the output is, but it is complex")
        difference = data - loss.detach().to(data)
        return (difference.abs() if difference.is_complex() else difference).square().mean()
    if not callable(loss):
        raise TypeError(
            f"the loss must be a function of the output or a target tensor, got {type(loss).__name__}"
        )
    # The final state is part of the last step, which a loss that works in place would change.
    state = map_tensors(state, Tensor.clone)
    value = loss(output, state) if _takes_state(loss) else loss(output)
    if not isinstance(value, Tensor):
        raise ValueError(f"the loss must return a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"the loss must return a scalar tensor, got one of shape {tuple(value.shape)}")
    if value.is_complex():
        raise ValueError("the loss must return a real number, got a complex one")
    if not value.requires_grad:
        raise ValueError("the loss must depend on the layer's output, but it doesn't")
    return value.sum()


def _takes_state(loss: Loss) -> bool:
    """Whether a function has two required arguments: output and final state.

    Raises:
        TypeError: If it requires more or takes none, or if one is called ``target``, as in torch's losses.
    """
    try:
        function = loss.forward if isinstance(loss, nn.Module) else loss
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function in C
        return False
    positional_kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [one for one in parameters if one.kind in positional_kinds]
    required = [one.name for one in positional if one.default is one.empty]
    if "target" in required:
        raise TypeError(
            "the loss must be a function of the output, or of output and final state, but this one takes a "
            "target: use lambda output: loss(output, target)"
        )
    if len(required) > 2 or not (positional or any(one.kind is one.VAR_POSITIONAL for one in parameters)):
        raise TypeError(
            "the loss must be a function of the output, or of output and final state, but this one takes "
            f"{len(required) or 'no'} arguments"
        )
    return len(required) == 2


def loss_from_gradients(output_gradient: Any, state_gradient: Any) -> Loss:
    """Return a loss that has the given gradients with respect to output and final state.

    Args:
        output_gradient: Gradient of the layer's output; None for zero.
        state_gradient: Gradients of the final state. Each tensor, or all of it, can be None for zero.
    """
    gradients = [*_as_list(output_gradient), *_as_list(state_gradient)]

    def loss(output: Any, state: Any) -> Tensor:
        results = tensors((output, state))
        pairs = [(a, b) for a, b in zip(results, gradients, strict=True) if b is not None]
        products = [(a * b.to(a).conj()).sum() for a, b in pairs] or [results[0].sum() * 0]
        return torch.stack([one.real if one.is_complex() else one for one in products]).sum()

    return loss


def _as_list(value: Any) -> list[Tensor | None]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return list(value) if isinstance(value, (tuple, list)) else [value]

"""The gradient through time of a traced layer: ∂loss/∂quantity at every step, and the weights behind it."""

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
from unrolled.engines import reference
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.random_state import cuda_devices, drawing_from
from unrolled.tracing.step_recorder import StepRecorder

Loss = Callable[..., Tensor]


def through_time(
    recurrent: Recurrent,
    cells: Sequence[Cell],
    starts: Sequence[tuple[Tensor, ...]],
    call: tuple[Any, Any],
    random_state: list[Tensor],
    loss: Loss | Tensor,
    drop: Callable[[Tensor, float], Tensor] = dropout,
) -> list[dict[str, Tensor]]:
    """Run a layer again, and its backward: ``∂loss/∂quantity`` of every layer and direction.

    Args:
        recurrent: the layer, in the mode in which it is to run.
        cells: of every layer and direction, bound to the parameters that count.
        starts: the initial states of each of them, ``(batch, size)`` in the order of the engines' rows.
        call: the input and state that the layer was given.
        random_state: from which dropout between layers is drawn.
        loss: as :meth:`unrolled.Trace.backward` takes it.
        drop: the dropout between layers.

    Returns:
        For each cell, by the name of the quantity, ``(time, batch, size)``; zeros where the loss doesn't
        depend on it.
    """
    recorders: list[StepRecorder] = []
    turned: list[tuple[SequenceBatch, bool]] = []
    with differentiating(random_state, cuda_devices(call[0])):
        x, state = (map_tensors(part, lambda tensor: tensor.detach().clone()) for part in call)
        x = map_tensors(x, lambda tensor: tensor.requires_grad_())
        steps = SequenceBatch.of(x, recurrent.batch_first, type(recurrent).__name__)

        def run(_: list[Cell], rows: Tensor, __: Any, sizes: Any) -> Any:
            results = []
            for reverse in (False, True)[: 1 + recurrent.bidirectional]:
                which = len(recorders)
                # copies, since nothing of a trace made in inference mode can be differentiated
                copies = {name: getattr(cells[which], name).clone() for name in cells[which].shapes()}
                recorder = StepRecorder(cells[which].bind(copies), keep=lambda tensor: tensor)
                start = tuple(part.detach().clone().requires_grad_() for part in starts[which])
                recorders.append(recorder)
                turned.append((steps, reverse))
                results.append(reference.run(recorder.cell, rows, start, sizes, reverse))
            return results

        value = _value(loss, *recurrent.unroll(x, state, run, drop))
        named = [kept for recorder in recorders for kept in recorder.kept]
        reached = [tensor for kept in named for tensor in kept.values() if tensor.requires_grad]
        slopes = torch.autograd.grad(value, reached, allow_unused=True)
        if all(slope is None for slope in slopes):
            raise ValueError(
                "the loss should give one number that depends on the output, got one that doesn't"
            )
        gradients = dict(zip(map(id, reached), slopes, strict=True))
    found = []
    for recorder, (steps, reverse) in zip(recorders, turned, strict=True):
        for kept in recorder.kept:
            for name, tensor in kept.items():
                gradient = gradients.get(id(tensor))
                kept[name] = torch.zeros_like(tensor) if gradient is None else gradient.detach()
        found.append(recorder.values(steps, reverse))
    return found


@contextmanager
def differentiating(random_state: list[Tensor], devices: list[torch.device]) -> Iterator[None]:
    """Record gradients, whatever the caller does, and draw from this random state."""
    with torch.inference_mode(False), torch.enable_grad(), drawing_from(random_state, devices):
        yield


def _value(loss: Loss | Tensor, output: Tensor | PackedSequence, state: Any) -> Tensor:
    """The loss of an output, checked."""
    if isinstance(loss, Tensor):
        data = output.data if isinstance(output, PackedSequence) else output
        if loss.shape != data.shape:
            given = f"a tensor of the shape {tuple(loss.shape)}"
            if loss.numel() == 1:
                given += ": for a loss that is computed already, record(model, gradients=True)"
            raise ValueError(
                "backward takes a function of the output, such as lambda output: output.square().mean(), or "
                f"a target of the output's shape {tuple(data.shape)}, got {given}"
            )
        if loss.is_complex() and not data.is_complex():
            raise ValueError("the target should be of real numbers as the output is, got complex ones")
        difference = data - loss.detach().to(data)
        return (difference.abs() if difference.is_complex() else difference).square().mean()
    if not callable(loss):
        raise TypeError(
            f"the loss should be a function of the output or a tensor, the target, got {type(loss).__name__}"
        )
    state = map_tensors(state, Tensor.clone)  # a loss may change it in place, and it is that of the last step
    value = loss(output, state) if _takes_two(loss) else loss(output)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad or value.is_complex():
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = "a complex one" if value.is_complex() else "one that doesn't"
            got = got if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
        raise ValueError(f"the loss should give one number that depends on the output, got {got}")
    return value.sum()


def _takes_two(loss: Loss) -> bool:
    """Whether a function has two arguments that must be given: output and final state.

    Raises:
        TypeError: it takes more or none; one is called a target, as those of torch's losses are.
    """
    try:
        called = loss.forward if isinstance(loss, nn.Module) else loss
        arguments = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # of functions in C
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one for one in arguments if one.kind in places]
    needed = [one.name for one in taken if one.default is one.empty]
    if "target" in needed:
        raise TypeError(
            "the loss should be a function of the output, or of output and final state, and this one takes a "
            "target: give lambda output: loss(output, target)"
        )
    if len(needed) > 2 or not (taken or any(one.kind is one.VAR_POSITIONAL for one in arguments)):
        raise TypeError(
            "the loss should be a function of the output, or of output and final state, and this one takes "
            f"{len(needed) or 'no'} arguments"
        )
    return len(needed) == 2


def loss_from_gradients(output: Any, state: Any) -> Loss:
    """The loss whose gradient with respect to output and final state is what is given; None counts as zero.

    Args:
        output: as the output of the layer, or None.
        state: as the final state of the layer, any of its tensors None.
    """
    given = [*_parts(output), *_parts(state)]

    def loss(output: Any, state: Any) -> Tensor:
        made = tensors((output, state))
        pairs = [(a, b) for a, b in zip(made, given, strict=True) if b is not None]
        products = [(a * b.to(a).conj()).sum() for a, b in pairs] or [made[0].sum() * 0]
        return torch.stack([one.real if one.is_complex() else one for one in products]).sum()

    return loss


def _parts(value: Any) -> list[Tensor | None]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return list(value) if isinstance(value, (tuple, list)) else [value]

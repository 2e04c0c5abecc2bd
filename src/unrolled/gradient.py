"""The gradient through time of a traced layer: ∂loss/∂quantity at every step, and the weights behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unrolled import engines
from unrolled.cell import Cell
from unrolled.layers import Recurrent
from unrolled.recording import StepRecorder, cuda_devices
from unrolled.sequence import Sequence as Steps
from unrolled.tensors import map_tensors, tensors

Loss = Callable[..., Tensor]


def through_time(
    recurrent: Recurrent,
    cells: Sequence[Cell],
    starts: Sequence[tuple[Tensor, ...]],
    call: tuple[Any, Any],
    random_state: Tensor,
    loss: Loss | Tensor,
) -> list[dict[str, Tensor]]:
    """Run a layer again, and its backward: ``∂loss/∂quantity`` of every layer and direction.

    Args:
        recurrent: the layer, in the mode in which it is to run.
        cells: of every layer and direction, bound to the parameters that count.
        starts: the initial states of each of them, ``(batch, size)`` in the order of the engines' rows.
        call: the input and state that the layer was given.
        random_state: from which dropout between layers is drawn.
        loss: as :meth:`unrolled.Trace.backward` takes it.

    Returns:
        For each cell, by the name of the quantity, ``(time, batch, size)``; zeros where the loss doesn't
        depend on it.
    """
    recorders: list[StepRecorder] = []
    turned: list[tuple[Steps, bool]] = []
    with _differentiating(call[0]):
        torch.set_rng_state(random_state)
        x, state = (map_tensors(part, lambda tensor: tensor.detach().clone()) for part in call)
        x = map_tensors(x, lambda tensor: tensor.requires_grad_())
        steps = Steps.of(x, recurrent.batch_first, type(recurrent).__name__)

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
                results.append(engines.reference.run(recorder.cell, rows, start, sizes, reverse))
            return results

        value = _value(loss, *recurrent.unroll(x, state, run))
        named = [kept for recorder in recorders for kept in recorder.kept]
        reached = [tensor for kept in named for tensor in kept.values() if tensor.requires_grad]
        gradients = dict(
            zip(map(id, reached), torch.autograd.grad(value, reached, allow_unused=True), strict=True)
        )
    found = []
    for recorder, (steps, reverse) in zip(recorders, turned, strict=True):
        for kept in recorder.kept:
            for name, tensor in kept.items():
                gradient = gradients.get(id(tensor))
                kept[name] = torch.zeros_like(tensor) if gradient is None else gradient.detach()
        found.append(recorder.values(steps, reverse))
    return found


@contextmanager
def _differentiating(x: Any) -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda_devices(x)):
        yield


def _value(loss: Loss | Tensor, output: Tensor | PackedSequence, state: Any) -> Tensor:
    """The loss of an output, checked."""
    if isinstance(loss, Tensor):
        data = output.data if isinstance(output, PackedSequence) else output
        if loss.shape != data.shape:
            shapes = f"{tuple(data.shape)}, got {tuple(loss.shape)}"
            raise ValueError(f"the target should have the shape of the output, {shapes}")
        return (data - loss.detach().to(data)).square().mean()
    if not callable(loss):
        raise TypeError(
            f"the loss should be a function of the output or a tensor, the target, got {type(loss).__name__}"
        )
    value = loss(output, state) if _takes_two(loss) else loss(output)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = "one that doesn't" if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
        raise ValueError(f"the loss should give one number that depends on the output, got {got}")
    return value.sum()


def _takes_two(loss: Loss) -> bool:
    """Whether a function has two arguments that must be given."""
    try:
        arguments = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # of functions in C
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in places and one.default is one.empty for one in arguments) == 2


def pulling(output: Any, state: Any) -> Loss:
    """The loss whose gradient with respect to output and final state is what is given; None counts as zero.

    Args:
        output: as the output of the layer, or None.
        state: as the final state of the layer, any of its tensors None.
    """
    given = [*_parts(output), *_parts(state)]

    def loss(output: Any, state: Any) -> Tensor:
        made = tensors((output, state))
        pairs = [(a, b) for a, b in zip(made, given, strict=True) if b is not None]
        return torch.stack([(a * b.to(a)).sum() for a, b in pairs]).sum() if pairs else made[0].sum() * 0

    return loss


def _parts(value: Any) -> list[Tensor | None]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def spectral_radii(cell: Cell) -> dict[str, list[float]]:
    """The spectral radius of every ``hidden × hidden`` block of the parameters that weigh a hidden state.

    Returns:
        By the parameter's name, one radius for each block of rows: that of a layer with four gates has
        four. Above 1 such a map, applied over and over, makes what it is given grow; below 1, fade.
    """
    found: dict[str, list[float]] = {}
    for name, shape in cell.shapes().items():
        sizes = cell.params()[name].shape
        if len(shape) != 2 or str(sizes[1]) != "hidden" or shape[0] % shape[1]:
            continue
        weight = getattr(cell, name).detach().to("cpu", torch.complex128)
        if weight.isfinite().all():
            blocks = weight.reshape(-1, shape[1], shape[1])
            found[name] = torch.linalg.eigvals(blocks).abs().amax(-1).tolist()
    return found

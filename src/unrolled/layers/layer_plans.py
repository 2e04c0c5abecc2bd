"""Which calls of a layer may have plans, and what the plans are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines._torch_private import jit_tracing_state
from unrolled.engines.call_plans.signature import CallSignature

MAX_ROWS = 8192  # steps × batch; in larger calls, what is around the loop hardly counts


def run(layer: Any, x: Any, state: Any, checkpoint: int | None) -> Any:
    """Run a call of a layer by its plan, or with packed weights inside of :class:`unrolled.frozen`.

    Args:
        layer: The layer, a ``Recurrent``.
        x: The input.
        state: The initial state, or None.
        checkpoint: The option of the call.

    Returns:
        What the layer returns, or None if the call must run as usual.
    """
    if torch.compiler.is_compiling():
        return None
    if layer._frozen is not None:
        result = layer._frozen(x, state)
        if result is not None:
            return result
    if not _may_have_plan(layer, x, state, checkpoint):
        return None
    if not _needs_time_first(layer, x):
        return layer._run_planned(x, state)
    result = layer._run_planned(x.transpose(0, 1), state)
    return None if result is None else (result[0].transpose(0, 1), result[1])


def note(layer: Any, x: Any, state: Any, checkpoint: int | None) -> None:
    """Take note of a call that ran as usual, and make a plan if it comes again; see :func:`run`."""
    if not torch.compiler.is_compiling() and _may_have_plan(layer, x, state, checkpoint):
        layer._note_call(x.transpose(0, 1) if _needs_time_first(layer, x) else x, state, _signature)


def _may_have_plan(layer: Any, x: Any, state: Any, checkpoint: int | None) -> bool:
    """Return whether a call is short, and depends on nothing but its arguments and parameters."""
    if (
        checkpoint is not None
        or jit_tracing_state() is not None
        or (type(x) is not Tensor and type(x) is not Parameter)
    ):
        return False
    if layer.bidirectional or (state is None and layer.initial_state != "zeros"):
        return False
    if layer.dropout and layer.training and layer.num_layers > 1:
        return False
    if x.is_nested or x.dim() < 2 or "unroll" in layer.__dict__:
        return False
    return x.shape[:-1].numel() <= MAX_ROWS


def _needs_time_first(layer: Any, x: Tensor) -> bool:
    """Return whether the input isn't in the order in which the kernels read it."""
    return bool(layer.batch_first and x.dim() == 3 and x.shape[0] > 1 and x.shape[1] > 1)


def _signature(layer: Any, x: Tensor, stateful: bool) -> CallSignature | None:
    """Return the signature of a call, or None if calls like it can't have a plan.

    Args:
        layer: The layer.
        x: The input, time first if it has several rows and several time steps.
        stateful: Whether an initial state is given.
    """
    steps, batch = (x.shape[0], 1) if x.dim() == 2 else x.shape[:2]
    if layer.batch_first and x.dim() == 3 and 1 in (steps, batch):
        steps, batch = batch, steps
    if type(layer).unroll.__module__ != "unrolled.layers.recurrent":  # a subclass may do anything there
        return None
    sizes = layer._first.state_sizes()
    rows = (batch,) if x.dim() == 3 else ()
    return CallSignature(
        cells=[layer._cells[suffix] for [suffix] in layer._stack],
        training=layer.training,
        names=[[full_name for _, full_name, _ in layer._named[suffix]] for [suffix] in layer._stack],
        dtype=x.dtype,
        x=x.shape,
        steps=steps,
        batch=batch,
        states=tuple(torch.Size((layer.num_layers, *rows, size)) for size in sizes.values()),
        stateful=stateful,
        output=torch.Size((*x.shape[:-1], next(iter(sizes.values())))),
    )

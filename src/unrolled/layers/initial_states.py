"""The initial states of a ``Recurrent`` layer: the user's, learned ones, and those after a reset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.engines import memory
from unrolled.layers.module import State, States
from unrolled.layers.sequence import InputError, SequenceBatch
from unrolled.layers.tensors import tensors


def given(layer: Any, state: State, sequence: SequenceBatch) -> States:
    """Check the user's state, and return its tensors in the row order of ``sequence``.

    Raises:
        TypeError: If the state has the wrong type.
        InputError: If a tensor has the wrong shape, dtype or device.
    """
    states = layer._state_tuple(state, layer._label)
    count, batch = len(layer._cells), sequence.batch_of(states[0])
    shapes = {name: (count, batch, size) for name, size in layer._first.state_sizes().items()}
    for (name, shape), part in zip(shapes.items(), states, strict=True):
        expected = shape if sequence.batched else (shape[0], shape[2])
        if part.dim() != len(expected):
            kind = "batched 3-D" if sequence.batched else "unbatched 2-D"
            all_names = " and ".join(f"{name}x" for name in shapes)
            ranks = ", ".join(f"{part.dim()}-D" for part in states)
            raise InputError(
                f"For {kind} input, {all_names} should also be {len(expected)}-D but got "
                + (f"{ranks} tensor" if len(states) == 1 else f"({ranks}) tensors")
            )
        if tuple(part.shape) != expected:
            raise InputError(f"Expected hidden size {expected}, got {list(part.shape)} for the state {name}")
        layer._check_dtype_and_device(f"state {name}", part)
    return tuple(sequence.state_in(part) for part in states)


def learned(layer: Any, batch: int) -> States:
    """Return the learned initial states, ``(K, B, H)`` each."""
    parameters = learned_parameters(layer)
    memory.check_not_freed(tensors(parameters))
    return tuple(torch.stack(parts).unsqueeze(1).expand(-1, batch, -1) for parts in parameters)


def learned_parameters(layer: Any) -> list[list[Tensor]]:
    """Return the parameters of learned initial states: for each state, one per layer and direction."""
    names, suffixes = layer._first.state, layer._cells
    return [[getattr(layer, f"initial_{name}{suffix}") for suffix in suffixes] for name in names]


def after_reset(layer: Any, reset_state: Any, resets: Any, sequence: SequenceBatch) -> States:
    """Return the states after a reset, in the row order of ``sequence``. Empty: zeros.

    Raises:
        TypeError: If ``reset_state`` is a state of the wrong type.
        ValueError: If ``reset_state`` is anything else, has the wrong shape, or is given without ``resets``.
    """
    if resets is None:
        raise ValueError(f"{layer._label}: reset_state has no effect without resets: pass resets too")
    if not isinstance(reset_state, str):
        try:
            return given(layer, reset_state, sequence)
        except (TypeError, InputError) as error:
            raise type(error)(f"reset_state: {error}") from None
    if reset_state != "initial":
        raise ValueError(f"{layer._label}: reset_state should be a state or 'initial', got {reset_state!r}")
    return learned(layer, sequence.batch) if layer.initial_state == "learned" else ()

"""Calls of one time step each that :class:`unrolled.Watch` takes as one call of a sequence."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.layers import initial_states
from unrolled.layers.cell_layers import is_single_step
from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.hooks import LayerCall, input_and_state

MAX_STEPS = 4000  # of a sequence; later ones are left out
Gradients = tuple[Tensor | None, list[Tensor | None]]


class StepGroups:
    """Decides which calls of a module belong to one sequence.

    A call continues the sequence of the call before if both ran one time step in the same call of the model,
    and it begins with a state. While gradients are recorded, a state without a graph starts a new sequence.
    Outside of a call of the model, and if the module is the model, a state without a graph continues the
    sequence only if the call before returned it.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self._is_model = module is model
        self._last: tuple[int, bool] | None = (
            None  # the call of the model, and whether gradients were recorded
        )
        self._returned: weakref.ref[Tensor] | None = None  # the first state that the last call returned

    def continues(self, module: nn.Module, args: Any, kwargs: Any, model_call: int) -> bool:
        """Return whether a call that begins continues the sequence."""
        x, state = input_and_state(args, kwargs)
        last, now = self._last, (0 if self._is_model else model_call, torch.is_grad_enabled())
        is_step = runs_one_step(module, x, kwargs)
        self._last = now if is_step else None
        if not is_step or last != now or state is None:
            return False
        parts = tensors(state)
        if torch.is_grad_enabled():
            return any(part.requires_grad for part in parts)
        return now[0] > 0 or (self._returned is not None and self._returned() is parts[0])

    def ended(self, result: Any) -> None:
        """Note what the call returned."""
        parts = tensors(result)
        self._returned = weakref.ref(parts[0]) if parts else None


def runs_one_step(module: Any, x: Any, kwargs: Any) -> bool:
    """Whether a call runs one time step, which doesn't draw random numbers."""
    if is_single_step(module):
        return isinstance(x, Tensor)
    drops = module.training and module.dropout > 0 and module.num_layers > 1
    if module.bidirectional or drops or not isinstance(x, Tensor) or x.dim() not in (2, 3) or x.is_nested:
        return False
    is_step = x.shape[int(module.batch_first and x.dim() == 3)] == 1
    return is_step and kwargs.get("lengths") is None


def merge_steps(
    calls: Sequence[LayerCall], gradients: Sequence[Gradients], row_count: int
) -> tuple[LayerCall, Gradients]:
    """Merge calls of one step each into one call of one step, whose rows are the rows of all calls.

    The first ``batch`` rows are those of the first call, and so on. Since each call began with a known state,
    and the gradients are those of the states after each step, no call depends on another one.

    Args:
        calls: The calls.
        gradients: The gradient of the output and of the final states of each call.
        row_count: Maximum number of rows of each call to use.

    Returns:
        The call and its gradients.
    """
    recurrent = calls[0].recurrent.with_cells()
    recurrent.batch_first = False

    def steps(value: Any) -> Tensor:
        return SequenceBatch.from_input(value, calls[0].recurrent.batch_first, "").steps[:, :row_count]

    def rows(value: Any) -> Any:
        return map_tensors(value, lambda t: (t if t.dim() == 3 else t.unsqueeze(1))[:, :row_count])

    def joined(values: Sequence[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(map(joined, zip(*values, strict=True)))
        return torch.cat(list(values), 1)

    def joined_gradients(parts: Sequence[Tensor | None], like: Tensor, select: Any) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        zeros = torch.zeros_like(like)
        return torch.cat([zeros if part is None else select(part.detach()) for part in parts], 1)

    finals = [rows(call.final_state) for call in calls]
    outputs = [steps(call.output) for call in calls]
    initial = [_initial_state(call, final) for call, final in zip(calls, finals, strict=True)]
    merged = LayerCall(
        recurrent,
        joined([steps(call.input) for call in calls]),
        joined([rows(state) for state in initial]),
        calls[0].random_state,
        joined(outputs),
        joined(finals),
        None,
    )
    by_state = zip(*(states for _, states in gradients), strict=True)
    likes = tensors(finals[0])
    states = [joined_gradients(parts, like, rows) for parts, like in zip(by_state, likes, strict=True)]
    output = joined_gradients([output for output, _ in gradients], outputs[0], steps)
    return merged, (output, states)


def _initial_state(call: LayerCall, final: Any) -> Any:
    """Return the state that a call began with."""
    if call.initial_state is not None:
        return call.initial_state
    if call.recurrent.initial_state != "learned":
        return map_tensors(final, torch.zeros_like)
    batch = tensors(final)[0].shape[1]
    states = tuple(part.detach() for part in initial_states.learned(call.recurrent, batch))
    return states if isinstance(final, tuple) else states[0]

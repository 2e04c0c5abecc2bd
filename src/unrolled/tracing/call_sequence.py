"""Consecutive calls of one time step each, joined into one trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unrolled.layers.sequence import SequenceBatch
from unrolled.layers.tensors import map_tensors, tensors
from unrolled.tracing.hooks import LayerCall
from unrolled.tracing.indexing import identical
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.trace import Trace


@dataclass(eq=False)
class CallSequence:
    """A recorded call of a layer, or the consecutive calls of a cell or layer that runs step by step.

    Attributes:
        model_call: The number of the call of the whole model in which the last call was.
        pieces: The traces of the calls. Those of steps that were not selected are left out.
        steps: The number of each of these calls in the sequence.
        length: The number of calls so far.
        intact: Whether each call began with the state that the call before returned.
    """

    model_call: int
    pieces: list[Trace] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    length: int = 0
    intact: bool = True
    _final_state: Any = None  # of the last call; None if no call can continue it
    _first_state: Any = None
    _training: bool = False
    _joined: Trace | None = None

    @property
    def trace(self) -> Trace | None:
        """The trace of all calls; None if none of the selected steps was reached."""
        if not self.pieces:
            return None
        if self.length == 1:
            return self.pieces[0]
        if self._joined is None or len(self._joined.layers[0].input) != len(self.pieces):
            self._joined = join_traces(self.pieces, self.steps, self.length, self.intact)
        join_gradients(self._joined, self.pieces)
        return self._joined

    def continues(self, call: LayerCall, model_call: int) -> bool:
        """Whether a call is the next step of the sequence.

        It is if it begins with the state that the last call returned, in which some rows may be zeros, as a
        policy does where an episode ended. In the same call of the model, it is as well if it begins with
        another state, which isn't zero and isn't that of the first step: then the model changed the state
        between two steps.
        """
        if self._final_state is None or call.initial_state is None or not is_one_step(call):
            return False
        given, last = tensors(call.initial_state), tensors(self._final_state)
        if [(t.shape, t.dtype, t.device) for t in given] != [(t.shape, t.dtype, t.device) for t in last]:
            return False
        if call.recurrent.training is not self._training:
            return False
        if all(map(identical, given, last)) or _some_rows_restart(given, last):
            return True
        first = tensors(self._first_state)
        is_new = not any(bool(t.any()) for t in given) or (bool(first) and all(map(identical, given, first)))
        return model_call == self.model_call and not is_new

    def add(self, call: LayerCall, trace: Trace | None, model_call: int) -> None:
        """Add a call. The trace is None if its step isn't selected."""
        if self.length:
            given, last = tensors(call.initial_state), tensors(self._final_state)
            self.intact &= all(map(identical, given, last))
        else:
            self._first_state = _copied(call.initial_state)
        if trace is not None:
            self.pieces.append(trace)
            self.steps.append(self.length)
        self.length += 1
        self.model_call, self._training = model_call, call.recurrent.training
        has_draws = trace is not None and any(part.draws is not None for part in trace.layers)
        can_continue = is_one_step(call) and not call.recurrent.bidirectional and not has_draws
        # A copy, since the model may change the state in place.
        self._final_state = _copied(call.final_state) if can_continue else None

    def end(self) -> None:
        """Let no further call continue the sequence."""
        self._final_state = None

    def has_parameters_of(self, trace: Trace) -> bool:
        """Whether a trace has the parameters of the calls so far."""
        if not self.pieces:
            return True
        pairs = zip(trace.layers, self.pieces[-1].layers, strict=True)
        return all(
            getattr(part.cell, name) is getattr(earlier.cell, name)
            for part, earlier in pairs
            for name in part.cell.shapes()
        )


def _some_rows_restart(given: Sequence[Tensor], last: Sequence[Tensor]) -> bool:
    """Whether some rows of the states are zeros, and the others, at least one of them, are unchanged."""
    rows = [((one == 0).all(-1), (one == other).all(-1)) for one, other in zip(given, last, strict=True)]
    return all(bool((zero | same).all()) for zero, same in rows) and not all(
        bool(zero.all()) for zero, _ in rows
    )


def is_one_step(call: LayerCall) -> bool:
    """Whether a call ran one time step, with all rows of the batch."""
    if isinstance(call.input, PackedSequence) or call.lengths is not None:
        return False
    return SequenceBatch.from_input(call.input, call.recurrent.batch_first, "").time == 1


def join_traces(pieces: Sequence[Trace], steps: Sequence[int], length: int, intact: bool) -> Trace:
    """Join the traces of consecutive calls of one step each.

    Args:
        pieces: The traces of the calls.
        steps: The number of each of these calls in the sequence.
        length: The number of all calls.
        intact: Whether each call began with the state that the call before returned. If not, the result has
            the states before each step, and can't run the sequence again.
    """
    first, last = pieces[0], pieces[-1]
    is_whole = intact and len(pieces) == length
    layers = [
        _join_layers(parts, None if is_whole else tuple(steps), length, changed=len(pieces) == length)
        for parts in zip(*(piece.layers for piece in pieces), strict=True)
    ]
    x = output = None
    if is_whole and first.input is not None:
        axis = 1 if first.recurrent.batch_first and first.input.dim() == 3 else 0
        x, output = (
            torch.cat([getattr(piece, name) for piece in pieces], axis) for name in ("input", "output")
        )
    state = None if first._call is None else first._call[1]
    trace = Trace(
        first.module,
        first.recurrent,
        layers,
        first._initial_states,
        (x, state),
        (output, last.final_state),
        first._random_state,
    )
    if not is_whole:
        trace.selection = replace(first.selection, steps=tuple(steps))
    else:
        trace.selection = first.selection
    recurrent = first.recurrent
    draws_dropout = recurrent.training and recurrent.dropout > 0 and recurrent.num_layers > 1
    if x is None or draws_dropout:  # every call drew its own mask
        trace._call, trace._initial_states = None, ()
    return trace


def _join_layers(
    parts: tuple[LayerTrace, ...], steps: tuple[int, ...] | None, length: int, changed: bool
) -> LayerTrace:
    """Join one layer of the traces, and let these share the memory of the result."""
    first = parts[0]
    values = {name: torch.cat([part.values[name] for part in parts]) for name in first.values}
    for position, part in enumerate(parts):
        part.values.update({name: value[position : position + 1] for name, value in values.items()})
    before = {}
    if steps is not None and not first.partial:
        before = {
            name: torch.stack([part.initial_state[name] for part in parts]) for name in first.initial_state
        }
    return replace(
        first,
        input=torch.cat([part.input for part in parts]),
        values=values,
        lengths=torch.full_like(first.lengths, length),
        gradients={},
        steps=steps,
        before=before,
        changed_states=changed and steps is not None,
    )


def join_gradients(trace: Trace, pieces: Sequence[Trace]) -> None:
    """Give a joined trace the gradients of its pieces, if a backward pass has reached any of them."""
    if trace.layers[0].gradients or not any(piece.layers[0].gradients for piece in pieces):
        return
    for part, *parts in zip(trace.layers, *(piece.layers for piece in pieces), strict=True):
        for name, values in part.values.items():
            gradients = [one.gradients.get(name) for one in parts]
            zeros = torch.zeros_like(values[:1])
            part.gradients[name] = torch.cat([zeros if one is None else one for one in gradients])


def _copied(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().clone())

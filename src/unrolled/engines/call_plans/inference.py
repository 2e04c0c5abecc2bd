"""Plans of calls that record no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unrolled.engines.call_plans.conditions import address_of, readable
from unrolled.engines.call_plans.recorder import CallRecorder
from unrolled.engines.call_plans.signature import CallSignature, CompiledCall, check_recorded
from unrolled.engines.run_compiled import DirectionCall, infer


class InferencePlan:
    """A call that records no gradients.

    Args:
        signature: The call.

    Raises:
        NotRecordableError: If it can't be recorded.
        UnsupportedError: If a cell can't be compiled.
        UnavailableError: If there is no C++ compiler.
    """

    def __init__(self, signature: CallSignature) -> None:
        self._call = call = CompiledCall(signature)
        self._x, self._dtype, self._states = signature.x, signature.dtype, signature.states
        self._stateful, self._has_several_states = signature.stateful, len(signature.states) > 1
        self._params = list(zip(call.names, call.shapes, strict=True))
        x, states, params = call.example()
        recorder = CallRecorder([x, *states, *(param for group in params for param in group)])
        with recorder.recording():
            steps, finals = x, []
            for k, layer_states in enumerate(call.by_layer(states)):
                direction = DirectionCall(call.compiled[k], call.cells[k], params[k], layer_states, False)
                [(steps, final)] = infer([direction], steps, call.layout)
                finals.append(final)
            if len(finals) > 1:
                stacked = [torch.stack(parts) for parts in zip(*finals, strict=True)]
            else:
                stacked = list(finals[0])
        outputs = stacked if signature.output is None else [steps, *stacked]
        check_recorded(recorder, outputs)
        inputs = [x, *states, *(param for group in params for param in group)]
        self._launches, _ = recorder.finish([[tensor] for tensor in (*inputs, *outputs)])
        self._output = signature.output
        # An empty tensor is created faster like another, which must have the strides of a contiguous one.
        self._strides = [torch.empty(shape, device="meta").stride() for shape in signature.states]

    def is_current(self) -> bool:
        """Return whether the plan is for the present number of threads, default dtype and Python values."""
        return self._call.is_current()

    def run(self, parameters: Mapping[str, Any], x: Any, state: Any) -> Any:
        """Run the call; :func:`runs_as_usual` must hold.

        Args:
            parameters: The parameters of the module, by name.
            x: The input.
            state: The initial state, as the user passes it.

        Returns:
            What the module returns, or None if the call must run as usual.
        """
        if not self._call.is_current():
            return None
        try:
            x, address = readable(x, self._x, self._dtype)
            addresses = [0, address]
            states = self._initial_states(state, addresses)
            for name, shape in self._params:
                addresses.append(address_of(parameters.get(name), shape, self._dtype))
            if states is None or not all(addresses[1:]):
                return None
            output, finals = self._results(x, states)
        except RuntimeError:  # a tensor without memory, or no memory left
            return None
        if output is not None:
            addresses.append(output.data_ptr())
        addresses += [final.data_ptr() for final in finals]
        self._launches.run(addresses)
        final_state = tuple(finals) if self._has_several_states else finals[0]
        return final_state if output is None else (output, final_state)

    def _initial_states(self, state: Any, addresses: list[int]) -> list[Any] | None:
        """Return the initial states, and append their addresses. None if there are too many or too few."""
        if not self._stateful:
            return []
        if not self._has_several_states:
            state = (state,)
        elif type(state) not in (tuple, list) or len(state) != len(self._states):
            return None
        states = []
        for part, shape in zip(state, self._states):  # noqa: B905  # the keyword costs 0.1 microseconds
            part, address = readable(part, shape, self._dtype)
            states.append(part)
            addresses.append(address)
        return states

    def _results(self, x: Tensor, states: list[Any]) -> tuple[Tensor | None, list[Tensor]]:
        """Return new tensors for the output and the final states."""
        shapes, strides = self._states, self._strides
        finals = [
            torch.empty_like(part) if part.stride() == stride else part.new_empty(part.shape)
            for part, stride in zip(states, strides)  # noqa: B905
        ] or [x.new_empty(shape) for shape in shapes]
        if self._output is None:
            return None, finals
        like_state = self._output == shapes[0] and finals[0].stride() == strides[0]
        return torch.empty_like(finals[0]) if like_state else x.new_empty(self._output), finals

"""Plans of calls that record no gradients."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from unrolled.engines.call_plans import native_replay
from unrolled.engines.call_plans.conditions import native_conditions
from unrolled.engines.call_plans.launches import RecordedFunction
from unrolled.engines.call_plans.native_replay import NativeInference
from unrolled.engines.call_plans.recorder import MAX_SCRATCH, CallRecorder
from unrolled.engines.call_plans.replay import Replay
from unrolled.engines.call_plans.signature import CallSignature, CompiledCall, check_recorded, state_tensors
from unrolled.engines.run_compiled import DirectionCall, infer


class InferencePlan:
    """A call that records no gradients.

    Args:
        signature: The call.

    Attributes:
        native: The same plan in compiled code. None if that isn't compiled yet, or can't be used.

    Raises:
        NotRecordableError: If it can't be recorded.
        UnsupportedError: If a cell can't be compiled.
        UnavailableError: If there is no C++ compiler.
    """

    def __init__(self, signature: CallSignature) -> None:
        self._call = call = CompiledCall(signature)
        self._signature = signature
        self.native: NativeInference | None = None
        x, states, params = call.example()
        inputs = [x, *states, *(param for group in params for param in group)]
        recorder = CallRecorder(inputs)
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
        results = stacked if signature.output is None else [steps, *stacked]
        check_recorded(recorder, results)
        launches = recorder.finish([[tensor] for tensor in (*inputs, *results)], MAX_SCRATCH)
        function = RecordedFunction(signature.dtype, call.input_shapes, call.result_shapes, launches)
        self._replay = Replay(function)

    def is_current(self) -> bool:
        """Return whether the plan is for the present number of threads, default dtype and Python values."""
        return self._call.is_current()

    def run(self, attributes: Mapping[str, Any], x: Any, state: Any) -> Any:
        """Run the call; :func:`runs_as_usual` must hold.

        Args:
            attributes: The attributes of the module.
            x: The input.
            state: The initial state, as the user passes it.

        Returns:
            What the module returns, or None if the call must run as usual.
        """
        call, signature = self._call, self._signature
        states = state_tensors(state, signature)
        if states is None or not call.is_current():
            return None
        parameters = attributes["_parameters"]
        results = self._replay.run([x, *states, *[parameters.get(name) for name in call.names]])
        if results is None:
            return None
        if self.native is None:
            self.native = self._new_native(attributes)
        return signature.result(results)

    def _new_native(self, attributes: Mapping[str, Any]) -> NativeInference | None:
        """Return the plan in compiled code, for modules with the present mode and layout, or None."""
        code, signature, function = native_replay.library(), self._signature, self._replay.function
        if code is None or not native_replay.fits(function):
            return None
        functions, items = native_conditions()
        for name in ("training", "batch_first"):
            items.append(
                (native_replay.MODULE, sys.intern(name), attributes.get(name, native_replay.MISSING))
            )
        conditions = [*functions, *self._call.native_conditions()], items
        states, stateful = len(signature.states), signature.stateful
        return NativeInference(code, function, self._call.names, states, stateful, conditions)

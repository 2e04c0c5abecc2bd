"""Plans of calls that record gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from unrolled.engines._torch_private import (
    dispatch_mode_count,
    functorch_interpreter,
    keep_graph,
    top_saved_tensors_hooks,
)
from unrolled.engines.autograd import (
    by_reference,
    forward,
    gradients,
    materialize_gradients,
    reference_gradients,
)
from unrolled.engines.call_plans.launches import RecordedFunction
from unrolled.engines.call_plans.recorder import MAX_SCRATCH, CallRecorder, NotRecordableError
from unrolled.engines.call_plans.replay import Replay
from unrolled.engines.call_plans.signature import CallSignature, CompiledCall, check_recorded, state_tensors
from unrolled.engines.directions import DirectionSpec
from unrolled.engines.missing_gradients import (
    all_complete,
    constant_results,
    existing_gradients,
    unused_states_spread,
)

# Bytes that the forward pass may save in one block. If a block is larger than 32 MiB, glibc asks the system
# for it anew in each call. Layer-norm LSTM 32x100x128 (saves 30 MiB): 40 ms with a plan, 32 without (Zen 4).
MAX_KEPT = 4 * 2**20


class TrainingPlan:
    """A call of one layer that records gradients.

    Args:
        signature: The call.

    Attributes:
        has_output: Whether the call returns the output besides the final states.

    Raises:
        NotRecordableError: If it can't be recorded.
        UnsupportedError: If a cell can't be compiled.
        UnavailableError: If there is no C++ compiler.
    """

    def __init__(self, signature: CallSignature) -> None:
        if len(signature.cells) > 1:
            raise NotRecordableError("it has several layers")
        self._call, self._signature = (call := CompiledCall(signature)), signature
        call.compiled[0].prepare_training()
        self.has_output = signature.output is not None
        self._specs = (DirectionSpec(call.compiled[0], call.cells[0], signature.stateful, reverse=False),)
        self._all_gradients_exist = all_complete(self._specs)
        self._result_count = len(call.result_shapes)
        given, needed = (True,) * self._result_count, (True,) * len(call.input_shapes)
        recorded = _Recorded(call, self._specs, given)
        self._forward = _forward_replay(recorded)
        self._backwards: dict[tuple[tuple[bool, ...], tuple[bool, ...]], _Backward | None] = {
            # Without a plan, the backward pass would compute the forward pass again.
            (given, needed): _Backward(recorded, needed)
        }

    def is_current(self) -> bool:
        """Return whether the plan is for the present number of threads, default dtype and Python values."""
        return self._call.is_current()

    def run(self, attributes: Mapping[str, Any], x: Any, state: Any) -> Any:
        """Run the call; see :meth:`InferencePlan.run`."""
        call, signature = self._call, self._signature
        states = state_tensors(state, signature)
        if states is None or not call.is_current() or top_saved_tensors_hooks(True) is not None:
            return None
        parameters = attributes["_parameters"]
        tensors = [x, *states, *[parameters.get(name) for name in call.names]]
        made = self._forward.run(tensors)
        if made is None:
            return None
        return signature.result(_apply(self, made, *tensors))

    def split(self, made: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        """Return what a call returns, and what the backward pass reads besides: one tensor, or none."""
        return tuple(made[: self._result_count]), made[self._result_count :]

    def constants(self, needs_gradient: Sequence[bool], results: Sequence[Tensor]) -> list[Tensor]:
        """Return the results that no gradient flows through; see :func:`constant_results`."""
        if self._all_gradients_exist:
            return []
        flat = results if self.has_output else [None, *results]
        constants = constant_results(self._specs, self._call.layout.steps, None, needs_gradient, flat)
        return [result for result in constants if result is not None]

    def backward(
        self,
        tensors: Sequence[Tensor],
        output: Tensor | None,
        kept: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needed: tuple[bool, ...],
    ) -> list[Tensor | None] | None:
        """Run the backward pass.

        Args:
            tensors: The inputs of the forward pass.
            output: Its output, if the call returns one.
            kept: What it has saved besides.
            grads: The gradients of its results. None: there is none.
            needed: Whether the gradient of each input is needed.

        Returns:
            The gradients of the inputs, or None if it must run as usual.
        """
        if torch.is_grad_enabled() or functorch_interpreter() is not None or dispatch_mode_count():
            return None
        given = tuple([grad is not None for grad in grads])
        key = given, needed
        plan = self._backwards[key] if key in self._backwards else self._add_backward(given, needed)
        if plan is None or torch.get_num_threads() != self._call.threads:
            return None
        outputs = [] if output is None else [output]
        made = plan.replay.run([*tensors, *outputs, *kept, *[grad for grad in grads if grad is not None]])
        if made is None:
            return None
        existing = iter(made)
        results = [next(existing) if exists else None for exists in plan.exists]
        if not self._all_gradients_exist and unused_states_spread(self._specs, grads, results):
            return None
        return results

    def backward_as_usual(
        self,
        tensors: Sequence[Tensor],
        output: Tensor | None,
        grads: Sequence[Tensor | None],
        needed: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Run the backward pass without a plan: gradients of gradients, batches of gradients, and so on.

        The arguments and the result are those of :meth:`backward`.

        Raises:
            RuntimeError: If the memory of a tensor was freed.
        """
        specs, layout = self._specs, self._call.layout
        cell = self._call.cells[0]
        sizes = cell.state_sizes().values()
        count = 1 + self._specs[0].state_count
        with torch.enable_grad():  # so that they require gradients like the tensors that they are views of
            x = tensors[0].reshape(layout.steps, layout.batch, cell.features)
            pairs = zip(tensors[1:count], sizes, strict=False)
            inputs = [*[part.reshape(layout.batch, size) for part, size in pairs], *tensors[count:]]
        widths = [*([next(iter(sizes))] if self.has_output else []), *sizes]
        flat = [
            None if grad is None else grad.reshape(-1, layout.batch, width)
            for grad, width in zip(grads, widths, strict=True)
        ]
        grad_output, *final = flat if self.has_output else [None, *flat]
        flat = [grad_output, *[None if grad is None else grad[0] for grad in final]]
        flat = list(materialize_gradients(flat, [x, *inputs, *([] if output is None else [output])]))
        if by_reference(flat):
            results = reference_gradients(specs, None, x, inputs, flat)
        else:
            saved = [(states, values) for states, _, values in forward(specs, layout, x, inputs)]
            results = gradients(specs, layout, x, inputs, saved, flat, needed)
            if unused_states_spread(specs, flat, results):
                results = reference_gradients(specs, None, x, inputs, flat)
            else:
                results = existing_gradients(specs, layout.steps, None, flat, results)
        shapes = [tensor.shape for tensor in tensors]
        return [
            None if result is None else result.reshape(shape)
            for result, shape in zip(results, shapes, strict=True)
        ]

    def _add_backward(self, given: tuple[bool, ...], needed: tuple[bool, ...]) -> _Backward | None:
        """Record the backward pass for the results that have a gradient; None if it isn't recordable."""
        try:
            backward = _Backward(_Recorded(self._call, self._specs, given), needed)
        except NotRecordableError:
            backward = None
        self._backwards[given, needed] = backward
        return backward


def _forward_replay(recorded: _Recorded) -> Replay:
    """Return the forward pass. If the backward pass reads more than its results, that is the last result."""
    call, kept = recorded.call, [recorded.kept] if recorded.kept else []
    slots = [*([tensor] for tensor in (*recorded.inputs, *recorded.results)), *kept]
    outputs = [*call.result_shapes, *map(_shape_of_kept, kept)]
    launches = recorded.recorder.finish(slots, MAX_SCRATCH)
    if sum(map(CallRecorder.slot_size, kept)) > MAX_KEPT:
        raise NotRecordableError("it saves much for the backward pass")
    return Replay(RecordedFunction(call.signature.dtype, call.input_shapes, outputs, launches))


def _shape_of_kept(kept: Sequence[Tensor]) -> torch.Size:
    return torch.Size((CallRecorder.slot_size(kept) // kept[0].itemsize,))


class _Recorded:
    """A recorded forward pass.

    Args:
        call: The call.
        specs: Its direction.
        given: For each result whether it has a gradient.

    Attributes:
        recorder: The recorder.
        inputs: The input, the initial states and the parameters.
        results: What the call returns.
        kept: What the backward pass reads besides.
        grads: Gradients of the results.
    """

    def __init__(self, call: CompiledCall, specs: tuple[DirectionSpec, ...], given: Sequence[bool]) -> None:
        self.call, self._specs = call, specs
        signature = call.signature
        self._has_output = has_output = signature.output is not None
        x, states, [params] = call.example()
        self.inputs = [x, *states, *params]
        layout, sizes = call.layout, list(call.cells[0].state_sizes().values())
        shapes = [(layout.batch, size) for size in sizes]
        result_shapes = [*([(layout.steps, *shapes[0])] if has_output else []), *shapes]
        self.grads = [
            torch.empty(shape, dtype=signature.dtype, device="cpu") if flag else None
            for shape, flag in zip(result_shapes, given, strict=True)
        ]
        self.recorder = CallRecorder([*self.inputs, *(grad for grad in self.grads if grad is not None)])
        with self.recorder.recording():
            self._tensors = [*(call.by_layer(states)[0] or ()), *params]
            [(step_states, final, values)] = forward(specs, layout, x, self._tensors)
        self._saved = step_states, values
        self.results = [*([step_states[0]] if has_output else []), *final]
        check_recorded(self.recorder, self.results)
        self.kept = self.recorder.other_allocations([*step_states, *values.values()], self.results)

    def backward(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Record the backward pass with the gradients that are needed, and return its results."""
        call, x = self.call, self.inputs[0]
        self.recorder.clear()
        grads = self.grads if self._has_output else [None, *self.grads]
        with self.recorder.recording():
            results = gradients(self._specs, call.layout, x, self._tensors, [self._saved], grads, needed)
        return existing_gradients(self._specs, call.layout.steps, None, grads, results)


class _Backward:
    """A recorded backward pass.

    Args:
        recorded: The recorded forward pass, with the gradients that are given.
        needed: Whether the gradient of each input is needed.

    Attributes:
        replay: Its launches. They take the inputs of the forward pass, the output if it is returned, what the
             forward pass saved besides, and the given gradients.
        exists: For each input of the forward pass whether it has a gradient.
    """

    def __init__(self, recorded: _Recorded, needed: tuple[bool, ...]) -> None:
        call = recorded.call
        grads = recorded.backward(needed)
        check_recorded(recorded.recorder, grads)
        self.exists = [grad is not None for grad in grads]
        output = call.signature.output
        outputs = [] if output is None else recorded.results[:1]
        kept = [recorded.kept] if recorded.kept else []
        given = [grad for grad in recorded.grads if grad is not None]
        inputs = [
            *call.input_shapes,
            *([] if output is None else [output]),
            *map(_shape_of_kept, kept),
            *(
                shape
                for shape, grad in zip(call.result_shapes, recorded.grads, strict=True)
                if grad is not None
            ),
        ]
        shapes = [shape for shape, exists in zip(call.input_shapes, self.exists, strict=True) if exists]
        slots = [
            *([tensor] for tensor in (*recorded.inputs, *outputs)),
            *kept,
            *([grad] for grad in (*given, *grads) if grad is not None),
        ]
        launches = recorded.recorder.finish(slots)
        self.replay = Replay(RecordedFunction(call.signature.dtype, inputs, shapes, launches))


class _PlannedCall(Function):
    """A planned call, which has already run, as a function of its tensors."""

    @staticmethod
    def forward(ctx: Any, plan: TrainingPlan, made: Sequence[Tensor], *tensors: Tensor) -> Any:
        """Return the results of the call."""
        results, kept = plan.split(made)
        # The output refers to this node, so keeping it undetached would make a reference cycle.
        output = results[0].detach() if plan.has_output else None
        ctx.set_materialize_grads(False)  # gradients of unused results stay None
        ctx.mark_non_differentiable(*plan.constants(ctx.needs_input_grad[2:], results))
        ctx.save_for_backward(*tensors)
        ctx.kept = plan, output, kept, results[0]._version
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the tensors."""
        tensors = ctx.saved_tensors
        plan, output, kept, version = ctx.kept
        if not keep_graph():
            ctx.kept = None  # free the memory even if the user keeps the loss
        needed, results = ctx.needs_input_grad[2:], None
        if output is None or output._version == version:  # else the output was changed in place
            results = plan.backward(tensors, output, kept, grads, needed)
        if results is None:
            results = plan.backward_as_usual(tensors, output, grads, needed)
        return None, None, *results


# Function.apply without its own preparation for torch.func, where no call is planned.
_apply: Any = super(Function, _PlannedCall).apply

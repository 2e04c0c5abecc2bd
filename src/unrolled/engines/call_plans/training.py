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
from unrolled.engines.call_plans.conditions import address_of, readable
from unrolled.engines.call_plans.launches import LaunchList
from unrolled.engines.call_plans.recorder import CallRecorder, NotRecordableError
from unrolled.engines.call_plans.signature import CallSignature, CompiledCall, check_recorded
from unrolled.engines.directions import DirectionSpec
from unrolled.engines.missing_gradients import (
    all_complete,
    constant_results,
    existing_gradients,
    unused_states_spread,
)

_Shapes = list[torch.Size]


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
        self._call = call = CompiledCall(signature)
        call.compiled[0].prepare_training()
        self._dtype = signature.dtype
        self._has_several_states, self.has_output = len(signature.states) > 1, signature.output is not None
        self._states = signature.states if signature.stateful else ()
        self._inputs: _Shapes = [signature.x, *self._states, *call.shapes]
        self._results = [*([signature.output] if signature.output is not None else []), *signature.states]
        self._specs = (DirectionSpec(call.compiled[0], call.cells[0], signature.stateful, reverse=False),)
        self._all_gradients_exist = all_complete(self._specs)
        self._backwards: dict[tuple[bool, ...], _Backward | None] = {}
        self._forward, self._kept = self._record_forward()

    def is_current(self) -> bool:
        """Return whether the plan is for the present number of threads, default dtype and Python values."""
        return self._call.is_current()

    def run(self, parameters: Mapping[str, Any], x: Any, state: Any) -> Any:
        """Run the call; see :meth:`InferencePlan.run`."""
        if not self._call.is_current() or top_saved_tensors_hooks(True) is not None:
            return None
        if not self._states:
            states: Sequence[Any] = ()
        elif not self._has_several_states:
            states = (state,)
        elif type(state) in (tuple, list) and len(state) == len(self._states):
            states = state
        else:
            return None
        tensors = [*states, *[parameters.get(name) for name in self._call.names]]
        try:
            copies, addresses = self._addresses(x, tensors)
        except RuntimeError:  # a tensor without memory
            return None
        if not all(addresses[1:]):
            return None
        results = _apply(self, addresses, x, *tensors)
        del copies  # only now, after the kernels have read them
        final = results[self.has_output :]
        final_state = tuple(final) if self._has_several_states else final[0]
        return (results[0], final_state) if self.has_output else final_state

    def _addresses(self, x: Any, tensors: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """Return the addresses of the inputs after slot 0, and what keeps their memory alive."""
        copies, addresses, shapes, dtype = [], [0], self._inputs, self._dtype
        count = 1 + len(self._states)
        for tensor, shape in zip((x, *tensors[: count - 1]), shapes):  # noqa: B905
            tensor, address = readable(tensor, shape, dtype)
            copies.append(tensor)
            addresses.append(address)
        for tensor, shape in zip(tensors[count - 1 :], shapes[count:]):  # noqa: B905
            addresses.append(address_of(tensor, shape, dtype))
        return copies, addresses

    def forward(self, x: Tensor, addresses: list[int]) -> tuple[list[Tensor], Tensor | None]:
        """Run the forward pass.

        Args:
            x: A tensor of the right dtype.
            addresses: The addresses of the inputs, after slot 0.

        Returns:
            The results, and the memory with what the backward pass reads besides, if it reads anything.
        """
        results = [x.new_empty(shape) for shape in self._results]
        addresses += [result.data_ptr() for result in results]
        kept = x.new_empty(self._kept) if self._kept else None
        addresses.append(0 if kept is None else kept.data_ptr())
        self._forward.run(addresses)
        return results, kept

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
        kept: Tensor | None,
        grads: Sequence[Tensor | None],
    ) -> list[Tensor | None] | None:
        """Run the backward pass.

        Args:
            tensors: The inputs of the forward pass.
            output: Its output, if the call returns one.
            kept: The memory that it filled.
            grads: The gradients of its results. None: there is none.

        Returns:
            The gradients of the inputs, or None if it must run as usual.
        """
        if torch.is_grad_enabled() or functorch_interpreter() is not None or dispatch_mode_count():
            return None
        plan = self._backward_plan(tuple([grad is not None for grad in grads]))
        if plan is None or torch.get_num_threads() != self._call.threads:
            return None
        given = [(grad, shape) for grad, shape in zip(grads, self._results, strict=True) if grad is not None]
        try:
            copies, addresses = self._addresses(tensors[0], tensors[1:])
            if output is not None:
                addresses.append(address_of(output, self._results[0], self._dtype))
            contiguous = [readable(grad, shape, self._dtype) for grad, shape in given]
        except RuntimeError:  # a gradient without memory
            return None
        grad_addresses = [address for _, address in contiguous]
        if not (all(addresses[1:]) and all(grad_addresses)):
            return None
        addresses.append(0 if kept is None else kept.data_ptr())
        results = plan.run(tensors, [*addresses, *grad_addresses])
        del copies
        if not self._all_gradients_exist and unused_states_spread(self._specs, grads, results):
            return None
        return results

    def backward_as_usual(
        self, tensors: Sequence[Tensor], output: Tensor | None, grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Run the backward pass without a plan: gradients of gradients, batches of gradients, and so on.

        The arguments and the result are those of :meth:`backward`.

        Raises:
            RuntimeError: If the memory of a tensor was freed.
        """
        specs, layout = self._specs, self._call.layout
        cell = self._call.cells[0]
        sizes = cell.state_sizes().values()
        count = 1 + len(self._states)
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
            results = gradients(specs, layout, x, inputs, saved, flat)
            if unused_states_spread(specs, flat, results):
                results = reference_gradients(specs, None, x, inputs, flat)
            else:
                results = existing_gradients(specs, layout.steps, None, flat, results)
        shapes = [tensor.shape for tensor in tensors]
        return [
            None if result is None else result.reshape(shape)
            for result, shape in zip(results, shapes, strict=True)
        ]

    def _record_forward(self) -> tuple[LaunchList, int]:
        """Return the forward pass, and the number of elements that the backward pass reads besides."""
        recorded = _Recorded(self._call, self._specs, self.has_output, ())
        launches, sizes = recorded.recorder.finish(
            [*([tensor] for tensor in (*recorded.inputs, *recorded.results)), recorded.kept]
        )
        return launches, sizes[1 + len(recorded.inputs) + len(recorded.results)] // self._dtype.itemsize

    def _backward_plan(self, given: tuple[bool, ...]) -> _Backward | None:
        """Return the backward pass for the results that have a gradient, or None if it isn't recordable."""
        if given not in self._backwards:
            try:
                recorded = _Recorded(self._call, self._specs, self.has_output, given)
                self._backwards[given] = _Backward(recorded, self._inputs)
            except NotRecordableError:
                self._backwards[given] = None
        return self._backwards[given]


class _Recorded:
    """A recorded forward pass.

    Args:
        call: The call.
        specs: Its direction.
        has_output: Whether the call returns the output besides the final states.
        given: For each result whether it has a gradient; empty if the backward pass won't be recorded.

    Attributes:
        recorder: The recorder.
        inputs: The input, the initial states and the parameters.
        results: What the call returns.
        kept: What the backward pass reads besides.
        grads: Gradients of the results.
    """

    def __init__(
        self, call: CompiledCall, specs: tuple[DirectionSpec, ...], has_output: bool, given: Sequence[bool]
    ) -> None:
        self._call, self._specs, self.has_output = call, specs, has_output
        signature = call.signature
        x, states, [params] = call.example()
        self.inputs = [x, *states, *params]
        layout, sizes = call.layout, list(call.cells[0].state_sizes().values())
        shapes = [(layout.batch, size) for size in sizes]
        result_shapes = [*([(layout.steps, *shapes[0])] if has_output else []), *shapes]
        self.grads = [
            torch.empty(shape, dtype=signature.dtype, device="cpu") if flag else None
            for shape, flag in zip(result_shapes, given, strict=False)
        ]
        self.recorder = CallRecorder([*self.inputs, *(grad for grad in self.grads if grad is not None)])
        with self.recorder.recording():
            self._tensors = [*(call.by_layer(states)[0] or ()), *params]
            [(step_states, final, values)] = forward(specs, layout, x, self._tensors)
        self._saved = step_states, values
        self.results = [*([step_states[0]] if has_output else []), *final]
        check_recorded(self.recorder, self.results)
        self.kept = self.recorder.other_allocations([*step_states, *values.values()], self.results)

    def backward(self) -> list[Tensor | None]:
        """Record the backward pass, and return its results."""
        call, x = self._call, self.inputs[0]
        self.recorder.clear()
        grads = self.grads if self.has_output else [None, *self.grads]
        with self.recorder.recording():
            results = gradients(self._specs, call.layout, x, self._tensors, [self._saved], grads)
        return existing_gradients(self._specs, call.layout.steps, None, grads, results)


class _Backward:
    """A recorded backward pass.

    Args:
        recorded: The recorded forward pass, with the gradients that are given.
        shapes: Shapes of the inputs of the forward pass.
    """

    def __init__(self, recorded: _Recorded, shapes: _Shapes) -> None:
        grads = recorded.backward()
        check_recorded(recorded.recorder, grads)
        self._shapes = [None if grad is None else shape for grad, shape in zip(grads, shapes, strict=True)]
        self._strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
        output = recorded.results[:1] if recorded.has_output else []
        slots = [[tensor] for tensor in (*recorded.inputs, *output)]
        slots += [recorded.kept]
        slots += [[grad] for grad in (*recorded.grads, *grads) if grad is not None]
        self._launches, _ = recorded.recorder.finish(slots)

    def run(self, tensors: Sequence[Tensor], addresses: list[int]) -> list[Tensor | None]:
        """Return the gradients of the inputs.

        Args:
            tensors: The inputs of the forward pass.
            addresses: The addresses of all that is read.
        """
        grads: list[Tensor | None] = []
        for tensor, shape, stride in zip(tensors, self._shapes, self._strides):  # noqa: B905
            if shape is None:
                grads.append(None)
                continue
            grad = torch.empty_like(tensor) if tensor.stride() == stride else tensor.new_empty(shape)
            grads.append(grad)
            addresses.append(grad.data_ptr())
        self._launches.run(addresses)
        return grads


class _PlannedCall(Function):
    """A planned call as a function of its tensors."""

    @staticmethod
    def forward(ctx: Any, plan: TrainingPlan, addresses: list[int], *tensors: Tensor) -> Any:
        """Run the call, and return its results."""
        results, kept = plan.forward(tensors[0], addresses)
        # The output refers to this node, so keeping it undetached would make a reference cycle.
        output = results[0].detach() if plan.has_output else None
        ctx.set_materialize_grads(False)  # gradients of unused results stay None
        ctx.mark_non_differentiable(*plan.constants(ctx.needs_input_grad[2:], results))
        ctx.save_for_backward(*tensors)
        ctx.kept = plan, output, kept, results[0]._version
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the tensors."""
        tensors = ctx.saved_tensors
        plan, output, kept, version = ctx.kept
        if not keep_graph():
            ctx.kept = None  # free the memory even if the user keeps the loss
        results = None
        if output is None or output._version == version:  # else the output was changed in place
            results = plan.backward(tensors, output, kept, grads)
        if results is None:
            results = plan.backward_as_usual(tensors, output, grads)
        return None, None, *results


# Function.apply without its own preparation for torch.func, where no call is planned.
_apply: Any = super(Function, _PlannedCall).apply

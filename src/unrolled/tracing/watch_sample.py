"""A call, or a sequence of one-step calls, whose health :class:`unrolled.Watch` computes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from unrolled.engines._torch_private import queue_callback
from unrolled.tracing.health import HealthRecord, compute_health
from unrolled.tracing.hooks import LayerCall
from unrolled.tracing.observed_call import ObservedCall
from unrolled.tracing.watched_steps import MAX_STEPS, Gradients, merge_steps


class WatchSample:
    """The calls of a sample, and the gradients that reach them.

    Args:
        module: The module that was called.
        call_number: The number of the call.
        rows: Maximum number of rows of the batch to use.

    Attributes:
        calls: The calls: one, or the steps of a sequence.
        seconds: Time spent on the sample before the backward pass.
        is_taken: Whether its health was computed.
    """

    def __init__(self, module: nn.Module, call_number: int, rows: int) -> None:
        self.call_number, self._rows = call_number, rows
        self.calls: list[LayerCall] = []
        self.seconds = 0.0
        self.is_taken = False
        self._module = module
        self._versions = [parameter._version for parameter in module.parameters()]
        self._observed: list[ObservedCall] = []
        self._gradients: dict[int, Gradients] = {}
        self._finish: Callable[[WatchSample], None] | None = None

    def add(self, call: LayerCall, observed: ObservedCall, finish: Callable[[WatchSample], None]) -> None:
        """Add a call.

        Args:
            call: The call.
            observed: Its copy, which also gets the gradients.
            finish: Called with this sample after a backward pass that reached it.
        """
        self.calls.append(call)
        self._observed.append(observed)
        self._finish = finish

    def stores(self, index: int) -> Callable[[Tensor | None, list[Tensor | None]], None]:
        """Return the function to call with the gradients of a call."""

        def store(output_gradient: Tensor | None, state_gradients: list[Tensor | None]) -> None:
            if self.is_taken:
                return
            if not self._gradients:
                queue_callback(self._end)  # when the gradients of all calls are stored
            self._gradients[index] = output_gradient, state_gradients

        return store

    def _end(self) -> None:
        for index, gradients in self._gradients.items():
            self._observed[index].add_gradients(*gradients)
        if self._finish is not None:
            self._finish(self)
        self._gradients.clear()

    def reason_against(self) -> str | None:
        """Return why the health can't be computed, or None."""
        parameters = (*self._module.parameters(), *self.calls[0].recurrent.parameters())
        if any(type(parameter) not in (Tensor, nn.Parameter) for parameter in parameters):
            return "its parameters are of a subclass of torch.Tensor, as in distributed training"
        if self._versions != [parameter._version for parameter in self._module.parameters()]:
            return "its parameters change before the backward pass ends"
        return None

    def health(self, warn_mismatch: Callable[[], None]) -> list[HealthRecord]:
        """Compute the health after the backward pass."""
        if len(self.calls) == 1:
            return compute_health(self.calls[0], *self._gradients[0], self._rows, warn_mismatch)
        states = len(next(iter(self._gradients.values()))[1])
        none: Gradients = (None, [None] * states)
        gradients = [self._gradients.get(index, none) for index in range(len(self.calls))]
        steps = len(self.calls)
        call, merged = merge_steps(self.calls, gradients, max(1, min(self._rows, MAX_STEPS // steps)))
        return compute_health(call, *merged, MAX_STEPS, warn_mismatch, steps)

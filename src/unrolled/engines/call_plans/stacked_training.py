"""Plans of calls of several layers that record gradients: a plan for each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unrolled.engines.call_plans.signature import CallSignature, state_tensors
from unrolled.engines.call_plans.training import TrainingPlan


class StackedTrainingPlan:
    """A call of a stack that records gradients.

    Args:
        signature: The call.

    Raises:
        NotRecordableError: If it can't be recorded.
        UnsupportedError: If a cell can't be compiled.
        UnavailableError: If there is no C++ compiler.
    """

    def __init__(self, signature: CallSignature) -> None:
        self._signature = signature
        self._plans = [TrainingPlan(_of_layer(signature, k)) for k in range(len(signature.cells))]

    def is_current(self) -> bool:
        """Return whether the plan is for the present number of threads, default dtype and Python values."""
        return all(plan.is_current() for plan in self._plans)

    def run(self, attributes: Mapping[str, Any], x: Any, state: Any) -> Any:
        """Run the call; see :meth:`InferencePlan.run`."""
        signature = self._signature
        states = state_tensors(state, signature)
        shapes = signature.states if signature.stateful else ()
        if states is None or any(
            getattr(part, "shape", None) != shape for part, shape in zip(states, shapes, strict=True)
        ):
            return None
        by_layer: Sequence[Any] = [*zip(*(part.unbind(0) for part in states), strict=True)]
        final: list[Any] = []
        for plan, initial in zip(self._plans, by_layer or [None] * len(self._plans), strict=True):
            only = initial is not None and len(initial) == 1
            result = plan.run(attributes, x, initial[0] if only else initial)
            if result is None:
                return None
            x, final_state = result
            final.append(final_state if isinstance(final_state, tuple) else (final_state,))
        return signature.result([x, *map(torch.stack, zip(*final, strict=True))])


def _of_layer(signature: CallSignature, k: int) -> CallSignature:
    """Return the signature of one layer of a stack."""
    assert signature.output is not None
    return dataclasses.replace(
        signature,
        cells=signature.cells[k : k + 1],
        names=signature.names[k : k + 1],
        x=signature.output if k else signature.x,
        states=tuple(torch.Size(shape[1:]) for shape in signature.states),
    )

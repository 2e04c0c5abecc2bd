"""The plans of a module's calls, by what the calls have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines._torch_private import any_requires_grad
from unrolled.engines.call_plans.conditions import runs_as_usual
from unrolled.engines.call_plans.inference import InferencePlan
from unrolled.engines.call_plans.native_replay import NativeInference
from unrolled.engines.call_plans.recorder import NotRecordableError
from unrolled.engines.call_plans.signature import CallSignature
from unrolled.engines.call_plans.stacked_training import StackedTrainingPlan
from unrolled.engines.call_plans.training import TrainingPlan
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.errors import UnavailableError

MAX_PLANS = 64  # per module
MAX_COUNTED = 1000  # shapes that are counted, but have no plan yet
_TENSORS = Tensor, Parameter

Plan = InferencePlan | TrainingPlan | StackedTrainingPlan
Signature = Callable[[Any, Tensor, bool], CallSignature | None]


class PlannedCalls:
    """The plans of a module's calls.

    A call gets a plan when the same call comes again. If there are too many different calls, all plans are
    dropped, and from then on a call must come twice as often before it gets one.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, Plan | None] = {}
        self._counts: dict[Any, int] = {}
        self._threshold = 2
        self._native: NativeInference | None = None  # of the plan that ran the last call

    def __reduce__(self) -> Any:
        return PlannedCalls, ()  # a copy of the module makes its own

    def run(self, module: Any, x: Any, state: Any) -> Any:
        """Run a call by its plan, and return what the module returns, or None if it must run as usual."""
        native = self._native  # its object must stay alive during the call
        if native is not None:
            result = native.run(module.__dict__, x, state)
            if result is not None:
                return result
        if not self._plans or type(x) not in _TENSORS or not (x.is_cpu and runs_as_usual()):
            return None
        try:
            plan = self._plans.get(_key(module, x, state))
        except RuntimeError:  # a nested tensor has no shape
            return None
        if plan is None:
            return None
        result = plan.run(module.__dict__, x, state)
        if result is not None and isinstance(plan, InferencePlan):
            self._native = plan.native
        return result

    def note(self, module: Any, x: Any, state: Any, signature: Signature) -> None:
        """Take note of a call that ran as usual, and make a plan for its like if it came before.

        Args:
            module: The module.
            x: The input.
            state: The initial state, or None.
            signature: Returns the signature of a call, or None if calls like it can't have a plan. Its
                arguments are the module, the input, and whether an initial state is given.
        """
        if type(x) not in _TENSORS or not (x.is_cpu and runs_as_usual()):
            return
        key = _key(module, x, state)
        if key in self._plans:
            plan = self._plans.get(key)
            if plan is not None and not plan.is_current():
                self._plans.pop(key, None)  # another thread may have done so
                self._native = None
            return
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if count >= self._threshold:
            self._counts.pop(key, None)
            self._add(key, _create_plan(signature(module, x, state is not None), key[1]))
        elif len(self._counts) > MAX_COUNTED:
            self._counts.clear()

    def _add(self, key: Any, plan: Plan | None) -> None:
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
            self._native = None
            self._threshold *= 2
        self._plans[key] = plan


def _key(module: Any, x: Tensor, state: Any) -> Any:
    """Return what calls have in common that one plan can run."""
    records = torch.is_grad_enabled() and any_requires_grad(
        x, *module._parameters.values(), *(state if type(state) in (tuple, list) else (state,))
    )
    attributes = module.__dict__
    return x.shape, records, x.dtype, state is None, attributes["training"], attributes.get("batch_first")


def _create_plan(signature: CallSignature | None, records_gradients: bool) -> Plan | None:
    """Return a plan, or None if calls with this signature must run as usual."""
    if signature is None:
        return None
    try:
        if not records_gradients:
            return InferencePlan(signature)
        return TrainingPlan(signature) if len(signature.cells) == 1 else StackedTrainingPlan(signature)
    except (NotRecordableError, UnsupportedError, UnavailableError):
        return None

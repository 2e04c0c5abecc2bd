"""Modules with and without call plans, and whether a plan has run a call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.layer_pairs import COMPILER_ERROR
from unrolled.engines.call_plans import native_replay
from unrolled.engines.call_plans.training import TrainingPlan
from unrolled.engines.native.toolchain import build, cpp_files
from unrolled.layers.planned_calls import PlannedCalls
from unrolled.layers.single_step import SingleStep

FACTOR = 2.0  # a Python value that the step of Leaky reads


class Leaky(ur.Cell):
    """A cell of a user, with an option, a global value and a mode."""

    state = ("h", "trace")
    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")
    bias_h = ur.Param("hidden")
    leak: float = 0.25

    def step(self, x: Tensor, h: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        drive = torch.nn.functional.linear(x, self.weight_ih, self.bias_h)
        new = torch.tanh(drive + h @ self.weight_hh.t())
        h = self.leak * h + (1 - self.leak) * new
        trace = trace + FACTOR * h if self.training else trace - h
        return h, trace


@dataclass
class PlanSpy:
    """Counts the calls that plans have run, and the backward passes."""

    calls: int = 0
    backwards: int = 0

    def ran(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """Return what a call returns, or its error, and whether a plan ran it."""
        before = self.calls
        result = outcome(call)
        return result, self.calls > before


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or its error."""
    try:
        return call()
    except Exception as error:
        return error


@pytest.fixture(autouse=True, params=["compiled", pytest.param("Python", marks=pytest.mark.slow)])
def plan_spy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PlanSpy:
    """Count what plans run, in compiled code or in Python, in all tests of a module that imports it."""
    if request.param == "Python":
        monkeypatch.setattr(native_replay, "library", lambda: None)
    elif native_replay.interface() is not None and not COMPILER_ERROR:
        build.load(cpp_files.read("call_plan.cpp"))
    spy = PlanSpy()

    def counted(method: Any, attribute: str) -> Any:
        def run(*args: Any) -> Any:
            result = method(*args)
            setattr(spy, attribute, getattr(spy, attribute) + (result is not None))
            return result

        return run

    monkeypatch.setattr(PlannedCalls, "run", counted(PlannedCalls.run, "calls"))
    monkeypatch.setattr(TrainingPlan, "backward", counted(TrainingPlan.backward, "backwards"))
    return spy


class _NoPlans:
    """Takes the place of a module's plans, and never has one."""

    def run(self, *args: Any) -> None:
        return None

    def note(self, *args: Any) -> None:
        return None


def without_plans(module: Any) -> Any:
    """Return a copy of a module that always runs as usual. It shares the parameters."""
    clone = copy.copy(module)
    vars(clone)["_parameters"] = module._parameters
    vars(clone)["_planned_calls"] = _NoPlans()
    return clone


@dataclass
class Case:
    """A module, tensors for one call of it, and how many there are of each.

    Attributes:
        module: The module; a plan is made at its second call.
        x: The input.
        state: The states.
    """

    module: Any
    x: Tensor
    state: tuple[Tensor, ...]
    usual: Any = field(init=False)

    def __post_init__(self) -> None:
        self.usual = without_plans(self.module)

    @property
    def hx(self) -> Any:
        if len(self.state) > 1:
            return self.state
        return self.state[0] if self.state else None

    def warm_up(self) -> Case:
        """Run the call until it has a plan."""
        for _ in range(2):
            self.module(self.x, self.hx)
        return self


CELLS = "LSTMCell", "GRUCell", "RNNCell", "Leaky"
LAYERS = "LSTM", "GRU", "RNN", "2 layers", "3 steps", "batch_first", "batch_first, 3 steps", "no state"
MODULES = *CELLS, *LAYERS


def sampled(names: Sequence[str], fast: Sequence[str]) -> list[Any]:
    """Return names as parameters of a test, those that aren't in ``fast`` marked as slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def new_case(name: str, rows: int = 3, width: int = 5, hidden: int = 4, dtype: Any = torch.float32) -> Case:
    """Return a case by its name in ``MODULES``."""
    batch_first = name.startswith("batch_first")
    two_states = batch_first or name in ("LSTMCell", "LSTM", "Leaky", "2 layers")
    states = 2 if two_states else name != "no state"
    layers, steps = 2 if name == "2 layers" else 1, 3 if name.endswith("3 steps") else 1
    options: dict[str, Any] = {"dtype": dtype}
    if name == "Leaky":
        module: Any = SingleStep(Leaky, width, hidden, **options)
    elif name.endswith("Cell"):
        module = getattr(ur, name)(width, hidden, **options)
    elif batch_first:
        module = ur.LSTM(width, hidden, batch_first=True, **options)
    else:
        kind = {"2 layers": "LSTM", "3 steps": "GRU", "no state": "LSTM"}.get(name, name)
        module = getattr(ur, kind)(width, hidden, num_layers=layers, **options)
    first = () if name in CELLS else (layers,)
    x = torch.randn(*(() if name in CELLS else (steps,)), rows, width, dtype=dtype)
    x = x.transpose(0, 1).contiguous() if batch_first else x
    return Case(module, x, tuple(torch.randn(*first, rows, hidden, dtype=dtype) for _ in range(states)))


def flat(result: Any) -> list[Tensor]:
    """Return the tensors of a result in a list."""
    return [result] if isinstance(result, Tensor) else [part for item in result for part in flat(item)]


def same(result: Any, expected: Any) -> bool:
    """Return whether two results, or two errors, are the same to the bit."""
    if isinstance(expected, Exception) or isinstance(result, Exception):
        return type(result) is type(expected) and str(result) == str(expected)
    pairs = zip(flat(result), flat(expected), strict=True)

    def kind(tensor: Tensor) -> Any:
        return type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad, tensor.is_inference()

    return all(kind(a) == kind(b) and torch.equal(a, b) for a, b in pairs)

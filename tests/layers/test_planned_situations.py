"""Calls with a plan in unusual situations: they run as usual, with the same results and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import unrolled as ur
from helpers.planned import MODULES, Case, PlanSpy, flat, new_case, plan_spy, same, sampled

__all__ = ["plan_spy"]  # a fixture

SITUATIONS: dict[str, tuple[bool | None, Callable[[Any, Case], Any]]] = {}


def situation(planned: bool | None) -> Callable[[Callable[[Any, Case], Any]], Callable[[Any, Case], Any]]:
    """Register a call, and whether a plan for the usual call runs it; None: either is right."""

    def register(call: Callable[[Any, Case], Any]) -> Callable[[Any, Case], Any]:
        SITUATIONS[call.__name__] = planned, call
        return call

    return register


class Subclass(torch.Tensor):
    pass


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def replace(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the states of a case with the last one changed."""
    state = (*case.state[:-1], change(case.state[-1]))
    return state if len(state) > 1 else state[0]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@situation(True)
def as_planned(module: Any, case: Case) -> Any:
    return module(case.x, case.hx)


@situation(True)
def other_values(module: Any, case: Case) -> Any:
    return module(case.x * 2, replace(case, torch.sin))


@situation(True)
def strided_input(module: Any, case: Case) -> Any:
    return module(torch.stack((case.x, case.x), -1)[..., 0], case.hx)


@situation(True)
def strided_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, lambda part: torch.stack((part, part), -1)[..., 1]))


@situation(True)
def expanded_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, lambda part: part[..., :1, :].expand(part.shape)))


@situation(True)
def parameter_as_input(module: Any, case: Case) -> Any:
    return module(nn.Parameter(case.x.clone()), case.hx)


@situation(True)
def native_engine(module: Any, case: Case) -> Any:
    with ur.engine("native"):
        return module(case.x, case.hx)


@situation(True)
def inference_mode(module: Any, case: Case) -> Any:
    with torch.inference_mode():
        return module(case.x, case.hx)


@situation(True)
def inference_tensor(module: Any, case: Case) -> Any:
    with torch.inference_mode():
        x = case.x.clone()
    return module(x, case.hx)


@situation(True)
def deterministic_algorithms(module: Any, case: Case) -> Any:
    with deterministic():
        return module(case.x, case.hx)


@situation(True)
def functional_call(module: Any, case: Case) -> Any:
    name, value = next(iter(module._parameters.items()))
    return torch.func.functional_call(module, {name: 2 * value}, (case.x, case.hx))


@situation(None)
def list_as_state(module: Any, case: Case) -> Any:
    return module(case.x, list(case.state))


@situation(False)
def fewer_states(module: Any, case: Case) -> Any:
    return module(case.x, case.state[:-1])


@situation(False)
def number_as_state(module: Any, case: Case) -> Any:
    return module(case.x, 1.0)


@situation(False)
def other_rows(module: Any, case: Case) -> Any:
    axis = 0 if case.x.dim() == 2 or module.batch_first else 1
    state = [torch.cat((part, part), -2) for part in case.state]
    return module(torch.cat((case.x, case.x), axis), tuple(state) if len(state) > 1 else state[0])


@situation(False)
def other_rows_of_the_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, lambda part: torch.cat((part, part), -2)))


@situation(False)
def one_row(module: Any, case: Case) -> Any:
    if case.x.dim() == 2:
        state = tuple(part[0] for part in case.state)
        return module(case.x[0], state if len(state) > 1 else state[0])
    state = tuple(part[:, 0] for part in case.state)
    return module(case.x[0] if module.batch_first else case.x[:, 0], state if len(state) > 1 else state[0])


@situation(False)
def no_state(module: Any, case: Case) -> Any:
    return module(case.x)


@situation(False)
def wrong_features(module: Any, case: Case) -> Any:
    return module(case.x[..., 1:], case.hx)


@situation(False)
def wrong_dtype(module: Any, case: Case) -> Any:
    return module(case.x.double(), case.hx)


@situation(False)
def wrong_dtype_of_a_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, torch.Tensor.double))


@situation(False)
def on_the_meta_device(module: Any, case: Case) -> Any:
    return module(case.x.to("meta"), case.hx)


@situation(False)
def sparse_input(module: Any, case: Case) -> Any:
    return module(case.x.to_sparse(), case.hx)


@situation(False)
def sparse_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, torch.Tensor.to_sparse))


@situation(False)
def nested_input(module: Any, case: Case) -> Any:
    return module(torch.nested.nested_tensor(list(case.x)), case.hx)


@situation(False)
def mkldnn_input(module: Any, case: Case) -> Any:
    return module(case.x.to_mkldnn() if torch.backends.mkldnn.is_available() else case.x.to_sparse(), case.hx)


@situation(False)
def negated_view(module: Any, case: Case) -> Any:
    return module(torch._neg_view(case.x), case.hx)


@situation(False)
def negated_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, torch._neg_view))


@situation(False)
def zeros_without_memory(module: Any, case: Case) -> Any:
    return module(torch._efficientzerotensor(case.x.shape), case.hx)


@situation(False)
def zero_state_without_memory(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, lambda part: torch._efficientzerotensor(part.shape)))


@situation(False)
def freed_input(module: Any, case: Case) -> Any:
    x = case.x.clone()
    x.untyped_storage().resize_(0)
    return module(x, case.hx)


@situation(False)
def freed_part_of_an_input(module: Any, case: Case) -> Any:
    x = torch.cat((case.x, case.x))[len(case.x) :]
    x.untyped_storage().resize_(0)
    return module(x, case.hx)


@situation(False)
def subclass(module: Any, case: Case) -> Any:
    return module(case.x.as_subclass(Subclass), case.hx)


@situation(False)
def subclass_as_state(module: Any, case: Case) -> Any:
    return module(case.x, replace(case, lambda part: part.as_subclass(Subclass)))


@situation(False)
def functional_tensor(module: Any, case: Case) -> Any:
    return torch.func.functionalize(lambda x: module(x, case.hx))(case.x)


@situation(False)
def autocast(module: Any, case: Case) -> Any:
    with torch.autocast("cpu"):
        return module(case.x, case.hx)


@situation(False)
def vmap(module: Any, case: Case) -> Any:
    return torch.vmap(lambda x: module(x, case.hx))(torch.stack((case.x, 2 * case.x)))


@situation(False)
def vmap_over_weights(module: Any, case: Case) -> Any:
    name, value = next(iter(module._parameters.items()))

    def call(weight: torch.Tensor) -> Any:
        return torch.func.functional_call(module, {name: weight}, (case.x, case.hx))

    return torch.vmap(call)(torch.stack((value, 2 * value)))


@situation(False)
def jvp(module: Any, case: Case) -> Any:
    return torch.func.jvp(lambda x: flat(module(x, case.hx))[0], (case.x,), (case.x,))


@situation(False)
def dual_numbers(module: Any, case: Case) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.x, torch.ones_like(case.x))
        return list(forward_ad.unpack_dual(flat(module(dual, case.hx))[0]))


@situation(False)
def dispatch_mode(module: Any, case: Case) -> Any:
    with Dispatch():
        return module(case.x, case.hx)


@situation(False)
def function_mode(module: Any, case: Case) -> Any:
    with Function():
        return module(case.x, case.hx)


@situation(False)
def default_device(module: Any, case: Case) -> Any:
    with torch.device("cpu"):
        return module(case.x, case.hx)


@situation(False)
def fake_tensors(module: Any, case: Case) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = module(mode.from_tensor(case.x), case.hx)
    return [torch.empty(part.shape).fill_(1) for part in flat(result)]


@situation(False)
def traced_by_make_fx(module: Any, case: Case) -> Any:
    return make_fx(lambda x: flat(module(x, case.hx)))(case.x)(case.x)


@situation(False)
def reference_engine(module: Any, case: Case) -> Any:
    with ur.engine("reference"):
        return module(case.x, case.hx)


@situation(False)
def other_threads(module: Any, case: Case) -> Any:
    with threads(torch.get_num_threads() + 1):
        return module(case.x, case.hx)


@situation(False)
def other_default_dtype(module: Any, case: Case) -> Any:
    with default_dtype(torch.float64):
        return module(case.x, case.hx)


@pytest.mark.filterwarnings("ignore")  # of torch, about nested and sparse tensors
@pytest.mark.parametrize("name", sampled([*MODULES[:-1]], ["LSTMCell", "Leaky", "2 layers", "batch_first"]))
def test_situations(name: str, plan_spy: PlanSpy) -> None:
    """A plan that exists runs the calls that it was recorded for, and no other call."""
    wrong = []
    with torch.no_grad():
        case = new_case(name).warm_up()
        for what, (expected_plan, call) in SITUATIONS.items():
            expected, by_plan = plan_spy.ran(lambda call=call: call(case.usual, case))
            assert not by_plan
            result, by_plan = plan_spy.ran(lambda call=call: call(case.module, case))
            if not same(result, expected) or expected_plan not in (None, by_plan):
                wrong.append(f"{what}: {by_plan=} {result!r:.300} instead of {expected!r:.300}")
            as_before, by_plan = plan_spy.ran(lambda: case.warm_up().module(case.x, case.hx))
            if not by_plan or not same(as_before, case.usual(case.x, case.hx)):
                wrong.append(f"after {what}: {by_plan=}")
    assert not wrong, "\n".join(wrong)

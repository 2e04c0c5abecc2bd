"""The names that explanations, drawings and messages give to the functions of a step."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.step_operations import BINARY, CUSTOM_GRADIENTS, DISCONTINUOUS, PRODUCTS, UNARY
from unrolled.tracing.call_recorder import Call, CallRecorder
from unrolled.tracing.step_functions import function_name
from unrolled.tracing.step_graph import model_programs


def calls_of_functions() -> list[Callable[[], object]]:
    """Return calls of all operations that the compiler supports, and of others in modules of torch."""
    v, w = torch.rand(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    integers = torch.arange(6)
    of_one = (UNARY, DISCONTINUOUS, CUSTOM_GRADIENTS)
    calls: list[Callable[[], object]] = [partial(f, v) for table in of_one for f in table.values()]
    calls += [partial(f, v, w) for f in BINARY.values()]
    calls += [partial(f, v, lambda *shape: torch.rand(shape, dtype=v.dtype)) for f in PRODUCTS.values()]
    calls += [partial(getattr(torch.special, name), v) for name in torch.special.__all__]
    calls += [partial(getattr(torch.special, name), v, w) for name in torch.special.__all__]
    calls += [partial(f, v, -1) for f in (torch.special.softmax, torch.special.logsumexp)]
    calls += [partial(f, v) for f in (torch.fft.rfft, torch.linalg.norm)]
    calls += [partial(f, 2, v) for f in (pow, operator.mod, operator.floordiv, operator.truediv)]
    calls += [partial(f, integers, 3) for f in (operator.and_, operator.or_, operator.xor, operator.mod)]
    calls += [partial(operator.invert, integers)]
    return calls


@pytest.fixture(scope="module")
def recorded() -> dict[str, Call]:
    with CallRecorder() as recorder:
        for call in calls_of_functions():
            with contextlib.suppress(TypeError, RuntimeError):  # another number of arguments
                call()
    return {call.name: call for call in recorder.calls().values() if call is not None}


def test_names_are_those_in_torch(recorded: dict[str, Call]) -> None:
    expected = {"special.entr", "special.xlog1py", "linalg.norm", "fft.rfft", "logsigmoid", "bitwise_and"}
    assert expected | {"sigmoid", "softmax", "lgamma", "pow", "remainder", "floor_divide"} <= recorded.keys()

    def exists(namespace: object, name: str) -> bool:
        with contextlib.suppress(AttributeError):
            return operator.attrgetter(name)(namespace) is not None
        return False

    for name, call in recorded.items():
        full = function_name(call)
        assert exists(torch, full.removeprefix("torch.")), full
        known = any(exists(namespace, name) for namespace in (torch, nn.functional, torch.Tensor))
        assert known or name == "getitem", name


def test_a_number_before_an_operator_is_the_first_operand() -> None:
    class Powers(ur.Cell):
        state = ("h",)

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            power = 2.0**x
            rest = 7.5 % power
            return rest + h

    trace = ur.trace(ur.Recurrent(Powers, 1, 1), torch.tensor([[0.5], [2.0]]))
    assert trace.explain("power", 0, 0).startswith("pow(2, 0.5")
    assert trace.explain("rest", 1, 0).startswith("remainder(7.5, 4")
    assert model_programs(trace)[0].reason is None

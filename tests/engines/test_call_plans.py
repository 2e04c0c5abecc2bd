"""Recording calls: what is recorded, and what can't be; and the interface of the compiled code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import COMPILER_ERROR
from helpers.sampling import sample
from unrolled.engines import _torch_private as private
from unrolled.engines.call_plans import launches, native_replay
from unrolled.engines.call_plans.launches import RecordedFunction
from unrolled.engines.call_plans.recorder import CallRecorder, NotRecordableError
from unrolled.engines.call_plans.replay import Replay
from unrolled.engines.native.matmul import products
from unrolled.engines.native.toolchain import build, cpp_files
from unrolled.layers.single_step import SingleStep

needs_compiler = pytest.mark.skipif(bool(COMPILER_ERROR), reason="there is no compiler")


@pytest.fixture(params=["Python", "compiled"])
def _runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(native_replay, "library", lambda: None)
    else:
        build.load(cpp_files.read("call_plan.cpp"))


def recorded(function: Any, *inputs: Tensor) -> Replay:
    """Return a function of tensors, recorded with other tensors like the inputs."""
    examples = [torch.empty_like(tensor) for tensor in inputs]
    recorder = CallRecorder(examples)
    with recorder.recording():
        results = function(*examples)
    slots = [[tensor] for tensor in (*examples, *results)]
    shapes = [tensor.shape for tensor in inputs], [result.shape for result in results]
    return Replay(RecordedFunction(inputs[0].dtype, *shapes, recorder.finish(slots)))


@needs_compiler
@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_zeros_and_products(dtype: torch.dtype) -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        stacked = torch.stack((a, b))
        joined = torch.cat((a, b, a.new_zeros(1, 3)))
        product, itemsize = a.new_empty(2, 2), a.itemsize
        scratch = torch.cat((b, b)).clone()
        operands = (scratch.data_ptr() + 6 * itemsize, 3, 1, a.data_ptr(), 1, 3)
        numbers = launches.array.array("q", [product.data_ptr(), 0, *operands, 2, 2, 3])
        products(dtype).run_bulk(numbers)
        return [stacked, joined, product]

    a, b = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    replay = recorded(function, a, b)
    for _ in range(3):
        a, b = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
        results = replay.run([a, torch.stack((b, b), -1)[..., 0]])  # the second is strided
        assert results is not None
        assert torch.equal(results[0], torch.stack((a, b)))
        assert torch.equal(results[1], torch.cat((a, b, torch.zeros(1, 3, dtype=dtype))))
        torch.testing.assert_close(results[2], b @ a.t())
    for wrong in ([a, b[:1]], [a, b.float() if dtype is torch.float64 else b.double()], [a, None], [a, 1.0]):
        assert replay.run(wrong) is None


@needs_compiler
@pytest.mark.usefixtures("_runs")
def test_large_scratch_memory() -> None:
    def function(a: Tensor) -> list[Tensor]:
        return [a.clone().clone()]

    for size in (1, 1000, 50_000):
        a = torch.randn(size)
        results = recorded(function, a).run([a])
        assert results is not None
        assert torch.equal(results[0], a)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: [a + 1],
        lambda a: [a.t().clone()],
        lambda a: [a.new_zeros(2).add_(1)],
        lambda a: [torch.cat((a, a), 1)],
        lambda a: [torch.ones(3)],
        lambda a: [a],
        lambda a: [(b := a.clone()), b],
        lambda a: [a.to(torch.float64)],
        lambda a: [torch.cat((torch.tensor([1.0, 2.0, 3.0]).view(1, 3), a))],
    ],
)
def test_what_is_not_recordable(function: Any) -> None:
    with pytest.raises(NotRecordableError):
        recorded(function, torch.zeros(2, 3))


class Scaled(ur.Cell):
    """A cell with an operation on a parameter that isn't a matrix product."""

    weight_ih = ur.Param("hidden", "input")
    scale = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight_ih) + h) * torch.exp(self.scale)


class Random(ur.Cell):
    weight_ih = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.nn.functional.dropout(linear(x, self.weight_ih) + h, 0.5, self.training)


class WithTensor(ur.Cell):
    weight_ih = ur.Param("hidden", "input")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shift = torch.ones(3)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight_ih) + h + self.shift)


@needs_compiler
@pytest.mark.parametrize("cell", sample([Scaled, Random, WithTensor]))
def test_cells_that_have_no_plan(cell: type[ur.Cell]) -> None:
    """They run as usual, and nothing is recorded again in each call."""
    module, x, h = SingleStep(cell, 2, 3), torch.randn(4, 2), torch.randn(4, 3)
    with torch.no_grad():
        for _ in range(5):
            torch.manual_seed(0)
            result = module(x, h)
            torch.manual_seed(0)
            with ur.engine("reference"):
                expected = module(x, h)
            if cell is not Random:  # with other generators
                torch.testing.assert_close(result, expected)
    plans = vars(module)["_planned_calls"]._plans
    assert list(plans.values()) == [None]


@needs_compiler
def test_bfloat16_and_meta_have_no_plan() -> None:
    for options in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        cell = ur.GRUCell(2, 3, **options)
        with torch.no_grad():
            for _ in range(4):
                cell(torch.zeros(1, 2, **options))
        assert not any(vars(cell)["_planned_calls"]._plans.values())


def test_the_interface_of_the_compiled_code() -> None:
    """The struct in C++ and the list in Python name the same functions in the same order."""
    struct = re.search(r"struct Interface \{(.*?)\n\};", cpp_files.read("call_plan.cpp"), re.DOTALL)
    assert struct is not None
    comments = re.findall(r"\(\*\w+\)\(.*?\);\s+// ([\w.]+)", struct[1])
    names = [name.lstrip(".") for name in comments]
    expected = [*native_replay.PYTHON_FUNCTIONS, *private.TENSOR_FUNCTIONS]
    assert len(names) == len(expected)
    for name, other in zip(names, expected, strict=True):
        assert name in other
    members = len(re.findall(r"^  [^/].*?;", struct[1], re.MULTILINE)) + struct[1].count("inference_keys")
    numbers = native_replay.interface()
    assert numbers is None or len(numbers) == members

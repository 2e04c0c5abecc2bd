"""Selection of an engine, and fallbacks from the native to the reference engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.user_cell import MGU

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
]


def test_engine_is_set_for_a_block_or_from_here_on() -> None:
    with pytest.raises(ValueError, match="should be 'auto', 'native', 'reference', got 'gpu'"):
        ur.engine("gpu")
    layer = ur.Recurrent(MGU, 3, 4, dtype=torch.float16)
    x = torch.randn(2, 3).half()
    with ur.engine("native"):
        with ur.engine("reference"):
            layer(x)
        with pytest.raises(RuntimeError, match="native engine"):
            layer(x)
    layer(x)


def test_unsupported_calls_fall_back_to_the_reference_engine() -> None:
    layer, x = ur.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    with ur.engine("auto"):
        assert_close(torch.func.jvp(lambda v: layer(v)[0], (x,), (x,))[0], expected, 1e-5)
    with ur.engine("native"):
        for call, reason in (
            (lambda: ur.LSTM(3, 4, dtype=torch.float16)(x.half()), "bfloat16, not torch.float16"),
            (
                lambda: torch.func.jvp(lambda v: layer(v)[0], (x,), (x,)),
                "forward-mode",
            ),
        ):
            with pytest.raises(RuntimeError, match=reason):
                call()


def test_a_step_that_cannot_be_compiled_gives_one_warning() -> None:
    class Branching(ur.Cell):
        weight = ur.Param("hidden", "hidden")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return linear(h, self.weight) + x if h.sum() > -1e9 else h

    class Bessel(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return torch.special.i0(h + x)

    x = torch.randn(3, 2, 4)
    for cell, reason in ((Branching, "can't be captured"), (Bessel, "aten.i0")):
        layer = ur.Recurrent(cell, 4, 4)
        with ur.engine("auto"):
            with pytest.warns(UserWarning, match=f"{cell.__name__} runs on the reference engine.*{reason}"):
                layer(x)
            layer(x)  # warnings are errors in the tests, so a second one would fail here
        with (
            ur.engine("native"),
            pytest.raises(RuntimeError, match=f"{cell.__name__} can't run on the native engine"),
        ):
            layer(x)


@pytest.mark.slow
def test_an_unsupported_backward_is_reported_in_the_forward() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(value: torch.Tensor) -> torch.Tensor:
            return 2 * value

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.special.i0(*ctx.saved_tensors)

    class WithOwnGradient(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return torch.sigmoid(Doubled.apply(h) + x)

    layer, x = ur.Recurrent(WithOwnGradient, 4, 4), torch.randn(3, 2, 4, requires_grad=True)
    with ur.engine("native"):
        with torch.no_grad():
            output = layer(x)[0]
        with pytest.raises(RuntimeError, match="WithOwnGradient can't run on the native engine: aten.i0"):
            layer(x)
    with ur.engine("auto"), pytest.warns(UserWarning, match="WithOwnGradient runs on the reference engine"):
        trained = layer(x)[0]
    assert_close(output, trained, 1e-6)
    trained.sum().backward()
    assert x.grad is not None

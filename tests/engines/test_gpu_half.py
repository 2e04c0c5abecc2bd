"""Half-precision tensors on the GPU engine, whose kernels compute in float32, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from helpers.gpu_engine import gpu_engine
from helpers.sampling import sample
from unrolled.engines.gpu.backend import BACKEND

CELLS: list[Any] = [getattr(ur.cells, name) for name in ur.cells.__all__]
CELLS = [cell for cell in CELLS if isinstance(cell, type) and issubclass(cell, ur.Cell)]
DTYPES = [torch.float16, torch.bfloat16]

# Each rounding adds an error of up to 0.5 eps. These values are rounded: the result, the input products, both
# factors of each product, the states that the backward pass reads, and sums.
ROUNDINGS = 8


# sLSTM takes the maximum of two values that depend on a state. The backward pass reads the rounded state, so
# it may take the other one. The output doesn't depend on which one it is, but the final states do.
OUTPUT_ONLY = (ur.cells.SLSTM,)


def results(layer: Any, call: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return the results of a call, and the gradients of its inputs and parameters."""
    output, state = call(layer, *inputs)
    values = [output if isinstance(output, Tensor) else output.data]
    values += state if isinstance(state, tuple) else [state]
    weights = [torch.linspace(-1, 1.5, v.numel(), dtype=v.dtype).view_as(v) for v in values]
    if isinstance(layer._first.innermost, OUTPUT_ONLY):
        weights[1:] = map(torch.zeros_like, values[1:])
    grads = torch.autograd.grad(values, [*inputs, *layer.parameters()], weights, allow_unused=True)
    with torch.no_grad():
        inferred = call(layer, *inputs)[0]
    values += [grad for grad in grads if grad is not None]
    values.append(inferred if isinstance(inferred, Tensor) else inferred.data)
    return [value.detach() for value in values]


def check(layer: Any, call: Any, inputs: list[Tensor], dtype: torch.dtype, streamed: bool = False) -> None:
    """Compare a layer and inputs of a half-precision dtype with the same numbers in float64."""
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    layer, inputs = layer.to(dtype), [one.to(dtype) for one in inputs]
    with gpu_engine(streamed) as runtime, ur.engine("native"):
        actual = results(layer, call, [one.clone().requires_grad_() for one in inputs])
    assert runtime.sources
    assert all(f"ST = tl.constexpr(tl.{str(dtype)[6:]})" in source for source in runtime.sources)
    with ur.engine("reference"):
        expected = results(layer.double(), call, [one.double().requires_grad_() for one in inputs])
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype is dtype
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-3)
        assert float(error) < 0.5 * ROUNDINGS * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "streamed"),
    [
        (torch.float16, False),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(torch.float16, True, marks=pytest.mark.exhaustive),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", sample(CELLS, [ur.cells.LSTM]), ids=lambda cell: cell.__name__)
def test_every_cell(cell: Any, dtype: torch.dtype, streamed: bool) -> None:
    check(ur.Recurrent(cell, 5, 6), lambda layer, x: layer(x), [torch.randn(6, 3, 5)], dtype, streamed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["packed", "lengths", "checkpoint"])
def test_states_and_options(kind: str, dtype: torch.dtype) -> None:
    """In both directions, with initial states."""
    lengths = torch.tensor([5, 4, 2])

    def call(layer: Any, x: Tensor, h: Tensor) -> Any:
        if kind == "packed":
            return layer(pack_padded_sequence(x, lengths), h)
        return layer(x, h, **({"lengths": lengths} if kind == "lengths" else {"checkpoint": 2}))

    layer = ur.GRU(4, 6, bidirectional=True)
    check(layer, call, [torch.randn(5, 3, 4), torch.randn(2, 3, 6)], dtype)


class Slow(ur.Cell):
    """A state that grows by less than half-precision types can add to it."""

    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return h + linear(x, self.weight)


@pytest.mark.parametrize("dtype", sample(DTYPES), ids=str)
def test_states_are_float32_between_steps(dtype: torch.dtype) -> None:
    """Each of 64 steps adds an eighth of the distance of numbers near 1."""
    layer, start = ur.Recurrent(Slow, 1, 3, dtype=dtype), torch.ones(1, 2, 3, dtype=dtype)
    torch.nn.init.ones_(next(iter(layer.parameters())))
    step = torch.finfo(dtype).eps / 8
    x = torch.full((64, 2, 1), step, dtype=dtype)
    for streamed in (False, True):
        with gpu_engine(streamed), ur.engine("native"), torch.no_grad():
            output, final = layer(x, start)
        assert torch.equal(final, torch.full_like(start, 1 + 64 * step))
        assert torch.equal(output[-1], final[0])


class Decay(ur.Cell):
    """A factor near 1 that depends on parameters only."""

    nu = ur.Param("hidden")
    weight = ur.Param("hidden", "input")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.exp(-torch.exp(self.nu)) * h + linear(x, self.weight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_parameters_are_not_rounded(dtype: torch.dtype) -> None:
    """The factor is 1 - 2⁻¹³, which both types would round to 1."""
    layer = ur.Recurrent(Decay, 1, 2, dtype=dtype)
    nu, weight = layer.parameters()
    torch.nn.init.constant_(nu, -9.0)
    torch.nn.init.zeros_(weight)
    steps = 1000
    x, start = torch.zeros(steps, 1, 1, dtype=dtype), torch.ones(1, 1, 2, dtype=dtype)
    with gpu_engine(), ur.engine("native"), torch.no_grad():
        final = layer(x, start)[1]
    expected = float(torch.exp(-torch.exp(nu.detach().double()) * steps)[0])
    assert float(final[0, 0, 0]) == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.slow
def test_matrices_of_half_the_size_fit_in_registers() -> None:
    """Two matrices of 90 units, padded to 128, have 64 KiB in half precision, and twice that in float32."""
    device = torch.device("cuda", 0)
    strategies = {torch.float16: "registers", torch.bfloat16: "registers", torch.float32: "persistent"}
    for dtype, strategy in strategies.items():
        loop: Any = BACKEND.compile(ur.cells.MGU(4, 90), dtype, device).inference
        assert loop.specs[0].choice.strategy == strategy


@pytest.mark.slow
def test_autocast_and_graphs() -> None:
    """Autocast runs kernels on half-precision tensors; operators of graphs convert them to float32."""
    layer, x = ur.Recurrent(ur.cells.MGU, 3, 5), torch.randn(4, 2, 3)
    with ur.engine("reference"):
        expected = layer(x)[0]
    with gpu_engine() as runtime, ur.engine("native"), torch.autocast("cpu", torch.float16):
        output = layer(x)[0]
    assert output.dtype is torch.float16
    assert "ST = " in runtime.sources[0]
    torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=2e-3)
    half, batch = layer.to(torch.float16), x.half()
    with gpu_engine() as runtime, ur.engine("native"):
        output = torch.func.vmap(lambda row: half(row.unsqueeze(1))[0][:, 0], 1, 1)(batch)
    assert "ST = " not in runtime.sources[0]
    assert output.dtype is torch.float16
    torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=2e-3)

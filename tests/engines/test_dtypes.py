"""Bools, whole numbers and complex values in a step. A compiled loop holds them as floating-point numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, tanh
from torch.func import functional_call, vjp
from torch.nn import functional as F
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, TOLERANCE, assert_close, tensors, values_and_gradients
from helpers.step_batch import BatchCompiler
from helpers.step_operations import Get, cell_of

pytestmark = NEEDS_COMPILER

INPUT, HIDDEN = 4, 6

MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "comparison": lambda v: v > 0,
    "and": lambda v: (v > 0) & (v < 1),
    "or": lambda v: (v > 1) | (v < -1),
    "xor": lambda v: (v > 0) ^ (v < 0.5),
    "not": lambda v: ~(v > 0),
    "isnan": lambda v: ~torch.isnan(v),
    "isfinite": torch.isfinite,
    "isinf": lambda v: torch.isinf(1 / v.round()),
    "signbit": torch.signbit,
    "logical_not of numbers": lambda v: torch.logical_not(v.relu()),
    "logical_and of numbers": lambda v: torch.logical_and(v, v.relu()),
    "logical_or of numbers": lambda v: torch.logical_or(-(-v).relu(), (v - 1).relu()),
    "logical_xor of numbers": lambda v: torch.logical_xor(v, v.relu()),
    "bool": lambda v: v.relu().bool(),
    "one-hot": lambda v: v.argmax(-1, keepdim=True) == torch.arange(v.shape[-1]),
    "winner": lambda v: v == v.amax(-1, keepdim=True),
    "any": lambda v: (v > 0.5).any(-1, keepdim=True).expand_as(v),
    "all": lambda v: (v > -1).all(-1, keepdim=True).expand_as(v),
    "comparison of masks": lambda v: (v > 0) != (v > 0.5),
    "choice of masks": lambda v: torch.where(v > 0, v.roll(1, -1) > 0, v < -0.5),
    "masked fill": lambda v: (v > 0).masked_fill(v > 0.5, False),
    "joined": lambda v: torch.cat([v[:, 1:] > 0, v[:, :1] < 0], -1),
    "turned": lambda v: (v > 0).flip(-1),
    "added": lambda v: (v > 0) + (v < -0.5),
    "multiplied": lambda v: (v > -0.5) * (v < 0.5),
    "count": lambda v: (v > 0).sum(-1, keepdim=True).expand_as(v),
    "running count": lambda v: (v > 0).cumsum(-1),
    "difference": lambda v: (v > 0).long() - (v < 0.5).long(),
    "whole number": lambda v: (3 * v).long(),
    "choice of numbers": lambda v: torch.where(v > 0, 1, -1),
    "small integer": lambda v: (v > 0).to(torch.int8),
}

# Of parameters alone: a vector and a square matrix of the cell's width.
VECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "comparison": lambda b, u: b > 0,
    "not": lambda b, u: ~(b > 0),
    "and": lambda b, u: (b > -0.5) & (b < 0.5),
    "argmax": lambda b, u: u.argmax(-1),
    "count": lambda b, u: (u > 0).sum(-1),
    "running count": lambda b, u: (b > 0).cumsum(0),
    "whole number": lambda b, u: (3 * b).long(),
    "double": lambda b, u: (b.double() * 2).to(b.dtype),
    "column": lambda b, u: u[:, 1],
    "diagonal": lambda b, u: u.diagonal(),
    "every second": lambda b, u: u.flatten()[::2][:HIDDEN],
    "repeated": lambda b, u: b[1:2].expand(HIDDEN),
    "of the transpose": lambda b, u: u.t()[2],
    "of the transposed exp": lambda b, u: u.t().exp().t().flatten()[:HIDDEN],
    "real part": lambda b, u: torch.exp(torch.complex(-u[0].abs(), u[1])).real,
    "imaginary part": lambda b, u: torch.exp(torch.complex(-u[0].abs(), u[1])).imag,
    "absolute": lambda b, u: torch.complex(b, u[0]).abs(),
    "angle": lambda b, u: torch.complex(b, u[0]).angle(),
    "conjugate": lambda b, u: (torch.complex(b, u[0]).conj() * torch.complex(u[1], u[2])).imag,
    "imaginary part of the conjugate": lambda b, u: torch.complex(b, u[0]).conj().imag,
    "polar": lambda b, u: torch.polar(b.abs(), u[0]).real,
    "pairs": lambda b, u: torch.view_as_complex(u.view(HIDDEN, 3, 2)).real[:, 1],
    "view as real": lambda b, u: torch.view_as_real(torch.complex(b, u[0]))[:, 1],
    "fft": lambda b, u: torch.fft.irfft(torch.fft.rfft(b) * torch.fft.rfft(u[0]), n=HIDDEN),
}
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda u: u > 0,
    "masked": lambda u: u * (u.abs() > 0.2),
    "sign with its own gradient": lambda u: (u > 0).to(u.dtype) - u.detach() + u,
    "whole numbers": lambda u: (3 * u).long() @ (3 * u).long() * 0.1,
    "complex product": lambda u: (torch.complex(u, u.t()) @ torch.complex(u, u)).real,
    "fft": lambda u: torch.fft.fft(u, dim=-1).real,
    "triangle": lambda u: u * torch.ones(HIDDEN, HIDDEN, dtype=torch.bool).tril(),
    "twice": lambda u: torch.cat([u[:3], u[:3]]),
}


def masks_of_x(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    [h] = states
    total = linear(h, get(HIDDEN, HIDDEN))
    for mask in MASKS.values():
        total = total + linear(mask(x).to(x.dtype), get(HIDDEN, INPUT))
    return (tanh(total),)


def masks_of_state(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    [h] = states
    total = linear(x, get(HIDDEN, INPUT))
    for mask in MASKS.values():
        total = total + 0.3 * linear(mask(3 * h).to(x.dtype), get(HIDDEN, HIDDEN))
    return (tanh(total),)


def masks_without_products(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    [h] = states
    total = linear(x, get(HIDDEN, INPUT)) + linear(h, get(HIDDEN, HIDDEN))
    for mask in [*MASKS.values()][:-1:2]:
        total = total + torch.where(mask(2 * h).bool(), get(HIDDEN), h) * 0.2
    for mask in [*MASKS.values()][1:-1:2]:
        total = total - (1 - mask(h + x[:, :1]).to(x.dtype)) * get(HIDDEN) * h
    return (tanh(total),)


def vectors_of_parameters(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    [h] = states
    total = linear(x, get(HIDDEN, INPUT))
    for vector in VECTORS.values():
        total = total + vector(get(HIDDEN), get(HIDDEN, HIDDEN)).to(x.dtype) * h * 0.2
        total = total + vector(get(HIDDEN), get(HIDDEN, HIDDEN)).to(x.dtype) * x[:, :1]
    return (tanh(total),)


def matrices_of_parameters(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    [h] = states
    total = linear(x, get(HIDDEN, INPUT))
    for matrix in MATRICES.values():
        total = total + 0.1 * linear(h, matrix(get(HIDDEN, HIDDEN)).to(x.dtype))
        total = total + linear(x, matrix(get(HIDDEN, HIDDEN)).to(x.dtype)[:, :INPUT])
    return (tanh(total),)


def constants(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    [h] = states
    third = torch.full((len(x), HIDDEN), 1 / 3, dtype=torch.float32)  # not as exact as in float64
    two = torch.full_like(h, 2.7, dtype=torch.int64)
    mask = torch.empty_like(h, dtype=torch.bool).copy_(F.relu(h))
    return (0.5 * h * third + linear(x, get(HIDDEN, INPUT)) / two + 0.1 * mask.to(x.dtype),)


def indices(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    """Return the indices of the extrema in each row of x and of the preceding x."""
    _, last = states
    extrema = [(v.argmax(-1), v.argmin(-1), v.max(-1)[1], v.min(-1)[1]) for v in (x, last)]
    return torch.stack([index for part in extrema for index in part], -1).to(x.dtype), x


RUNS = [
    pytest.param(constants, marks=pytest.mark.slow),
    masks_of_x,
    pytest.param(masks_of_state, marks=pytest.mark.slow),
    pytest.param(masks_without_products, marks=pytest.mark.slow),
    pytest.param(vectors_of_parameters, marks=pytest.mark.slow),
    pytest.param(matrices_of_parameters, marks=pytest.mark.slow),
]
EACH_RUN = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def layers(request: pytest.FixtureRequest) -> Iterator[dict[Any, Any]]:
    """Return the layers of the selected tests, compiled."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    cases = {(params["run"], params.get("dtype", torch.float64)) for params in selected}
    with BatchCompiler() as batch:
        layers = {}
        for run, dtype in cases:
            widths = (8, INPUT) if run is indices else (HIDDEN,)
            layer = ur.Recurrent(cell_of(run, INPUT, widths), INPUT, widths[0], dtype=dtype)
            layers[run, dtype] = layer
            batch.prepare(layer._first, dtype)
        batch.finish()
        yield layers


def draw(layer: Any, dtype: torch.dtype, seed: int, batch: int = 5) -> tuple[Tensor, Tensor]:
    """Draw the parameters of a layer, an input and an initial state."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(4, batch, INPUT, generator=generator, dtype=torch.float64).to(dtype)
    h = torch.randn(1, batch, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), h.requires_grad_()


def reference(layer: Any, x: Tensor, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights for the results, and the results with the gradients of their weighted sum."""
    with ur.engine("reference"):
        weights = [torch.randn_like(value) for value in tensors(layer(x, h))]
        results = values_and_gradients(list(tensors(layer(x, h))), weights, [x, h, *layer.parameters()])
    return weights, results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_RUN
def test_matches_reference(layers: Any, run: Any, dtype: torch.dtype) -> None:
    if dtype is torch.float32 and run in (masks_of_state, masks_without_products):
        pytest.skip("a state that rounding moves across a threshold changes everything after it")
    layer = layers[run, dtype]
    for seed, batch in enumerate((1, 5, 17)):
        x, h = draw(layer, dtype, seed, batch)
        weights, expected = reference(layer, x, h)
        with ur.engine("native"):
            values = list(tensors(layer(x, h)))
            actual = values_and_gradients(values, weights, [x, h, *layer.parameters()])
        assert_close(actual, expected, 20 * TOLERANCE[dtype])


@EACH_RUN
def test_torch_operators(layers: Any, run: Any) -> None:
    layer = layers[run, torch.float64]
    x, h = draw(layer, torch.float64, 3)
    weights, expected = reference(layer, x, h)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def call(x: Tensor, h: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors(functional_call(layer, parameters, (x, h))))

    values, backward = vjp(call, x.detach(), h.detach(), parameters)
    grad_x, grad_h, grads = backward(tuple(weights))
    assert_close([*values, grad_x, grad_h, *grads.values()], expected, 1e-11)


@pytest.mark.slow
@EACH_RUN
def test_torch_compile(layers: Any, run: Any) -> None:
    layer = layers[run, torch.float64]
    x, h = draw(layer, torch.float64, 4)
    weights, expected = reference(layer, x, h)
    torch.compiler.reset()
    values = list(tensors(torch.compile(layer, backend="aot_eager")(x, h)))
    actual = values_and_gradients(values, weights, [x, h, *layer.parameters()])
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("run", [indices])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_index_of_row_with_nan(layers: Any, run: Any, dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    rows = [
        [1, nan, 2, nan],
        [nan] * 4,
        [3, 1, 1, 3],
        [inf, -inf, nan, 0],
        [-inf] * 4,
        [inf] * 4,
        [0, 1, 2, nan],
    ]
    x = torch.stack([torch.tensor(rows, dtype=dtype).roll(k, 0) for k in range(3)])
    state = torch.zeros(1, len(rows), 8, dtype=dtype), torch.zeros(1, len(rows), INPUT, dtype=dtype)
    with ur.engine("native"):
        output, _ = layers[run, dtype](x, state)
    values = torch.stack([x, torch.cat([state[1], x[:-1]])])
    expected = [values.argmax(-1), values.argmin(-1), values.max(-1)[1], values.min(-1)[1]]
    assert torch.equal(output, torch.cat(torch.stack(expected, -1).to(dtype).unbind(0), -1))

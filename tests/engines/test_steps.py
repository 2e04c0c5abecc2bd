"""Steps with unusual states, outputs and parameters on the native engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, TOLERANCE, assert_close, tensors, values_and_gradients
from helpers.step_batch import BatchCompiler

pytestmark = NEEDS_COMPILER


class Sign(torch.autograd.Function):
    """Sign with a custom backward."""

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return v.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.5 * grad


class Base(ur.Cell):
    """Parameters that the cells below share."""

    w = ur.Param("hidden", "input")
    u = ur.Param("hidden", "hidden")
    b = ur.Param("hidden")

    def preactivation(self, x: Tensor, h: Tensor) -> Tensor:
        return linear(x, self.w, self.b) + linear(h, self.u)


class OutputHasAnotherSize(Base):
    state = {"y": "hidden//2", "h": "hidden"}
    o = ur.Param("hidden//2", "hidden")

    def step(self, x, y, h):
        h = torch.tanh(self.preactivation(x, h))
        return linear(h, self.o), h


class OutputDependsOnInputOnly(Base):
    state = ("y", "h")

    def step(self, x, y, h):
        return linear(x, self.w), torch.tanh(self.preactivation(x, h))


class OutputIsConstant(Base):
    state = ("y", "h")

    def step(self, x, y, h):
        return torch.ones_like(y), torch.tanh(self.preactivation(x, h))


class OutputIsParameter(Base):
    state = ("y", "h")

    def step(self, x, y, h):
        return self.b.expand(x.shape[0], -1), torch.tanh(self.preactivation(x, h))


class OneTensorForTwoStates(Base):
    state = ("h", "t")

    def step(self, x, h, t):
        h = torch.tanh(self.preactivation(x, t))
        return h, h


class SwappedStates(Base):
    state = ("h", "t")

    def step(self, x, h, t):
        return t, torch.tanh(self.preactivation(x, h))


class DelayLine(Base):
    state = ("h", "one", "two")

    def step(self, x, h, one, two):
        return torch.tanh(self.preactivation(x, two)), h, one


class ConstantState(Base):
    state = ("h", "t")

    def step(self, x, h, t):
        return torch.tanh(self.preactivation(x, h) + t), t


class Counter(Base):
    state = {"h": "hidden", "n": 1}

    def step(self, x, h, n):
        n = n + 1
        return torch.tanh(self.preactivation(x, h) / n.abs().clamp(min=1)), n


class UnusedCounter(Base):
    state = {"h": "hidden", "n": 1}

    def step(self, x, h, n):
        return torch.tanh(self.preactivation(x, h)), n + 1


class NoRecurrence(Base):
    def step(self, x, h):
        return torch.tanh(linear(x, self.w, self.b))


class NoInput(Base):
    def step(self, x, h):
        return torch.tanh(linear(h, self.u))


class NoParameters(ur.Cell):
    def step(self, x, h):
        return torch.tanh(x.repeat(1, 3)[:, : h.shape[1]] + h)


class OnlyInput(Base):
    def step(self, x, h):
        return x.repeat(1, 3)[:, : h.shape[1]]


class Identity(Base):
    def step(self, x, h):
        return h


class Zero(Base):
    def step(self, x, h):
        return h - h


class FourStateSizes(Base):
    state = {"h": "hidden", "a": 3, "b": "2*hidden", "c": 1}
    v = ur.Param("2*hidden", 3)
    q = ur.Param(3, "2*hidden")
    z = ur.Param(1, "hidden")

    def step(self, x, h, a, b, c):
        b = torch.sin(b + linear(a, self.v))
        a = torch.tanh(linear(b, self.q) + c)
        c = torch.sigmoid(linear(h, self.z))
        h = torch.tanh(linear(x, self.w) + b.chunk(2, -1)[0] * h)
        return h, a, b, c


class FastWeights(Base):
    state = {"h": "hidden", "m": "hidden*hidden"}

    def step(self, x, h, m):
        n = self.hidden
        k = torch.tanh(linear(x, self.w))
        m = 0.9 * m.view(-1, n, n) + k[:, :, None] * h[:, None, :]
        h = torch.tanh(linear(x, self.w) + (m @ k[:, :, None]).squeeze(-1))
        return h, m.flatten(1)


class SixLayers(Base):
    def step(self, x, h):
        for _ in range(6):
            h = torch.tanh(linear(h, self.u) + linear(x, self.w))
        return h


class ResetBefore(Base):
    r = ur.Param("hidden", "hidden")

    def step(self, x, h):
        reset = torch.sigmoid(linear(x, self.w) + linear(h, self.r))
        return 0.5 * h + 0.5 * torch.tanh(linear(x, self.w) + linear(reset * h, self.u))


class ResetAfter(Base):
    r = ur.Param("hidden", "hidden")

    def step(self, x, h):  # the backward reads the product of the state without the reset gate
        return torch.tanh(linear(x, self.w) + torch.sigmoid(linear(h, self.r)) * linear(h, self.u))


class PassedOn(Base):
    """Its backward passes gradients of states to a parameter and to x unchanged."""

    state = {"h": "hidden", "product": "hidden", "bias": "hidden", "last": "input"}

    def step(self, x, h, product, bias, last):
        h = torch.tanh(h + product + bias + last.repeat(1, 3)[:, :8])
        return h, linear(h, self.u), self.b.expand(x.shape[0], -1), x


class TwoProducts(Base):
    state = ("h", "t")

    def step(self, x, h, t):
        return torch.tanh(linear(x, self.w) + h * linear(t, self.u)), torch.sin(h)


class Attention(Base):
    state = ("h", "c")

    def step(self, x, h, c):
        query, keys = linear(x, self.w), torch.stack([h, c], 1)
        weights = torch.softmax((query[:, None] * keys).sum(-1), -1)
        return torch.tanh((weights[:, :, None] * keys).sum(1) + query), h


class Detached(Base):
    def step(self, x, h):
        return torch.tanh(linear(x, self.w) + linear(h.detach(), self.u))


class NoGrad(Base):
    def step(self, x, h):
        with torch.no_grad():
            gate = torch.sigmoid(linear(h, self.u))
        return torch.tanh(linear(x, self.w) + gate * h)


class CustomBackward(Base):
    def step(self, x, h):
        return 0.3 * Sign.apply(self.preactivation(x, h))


class ConcatenatedWeights(Base):
    def step(self, x, h):
        weights = torch.cat([self.w, self.u], 1).t()
        return torch.tanh(torch.addmm(self.b, torch.cat([x, h], 1), weights))


class BatchedParameter(Base):
    stacked = ur.Param(2, "hidden", "hidden")

    def step(self, x, h):
        a, b = torch.einsum("bi,koi->kbo", h, self.stacked).unbind(0)
        return torch.tanh(linear(x, self.w) + a) * torch.sigmoid(b)


CELLS = [
    cell
    for cell in list(globals().values())
    if isinstance(cell, type) and issubclass(cell, ur.Cell) and "step" in vars(cell)
]


def values(layer: Any, x: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Run a layer and return its output and final states."""
    return list(tensors(layer(x, tuple(state) if len(state) > 1 else state[0])))


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    with BatchCompiler() as batch:
        for cell in CELLS:
            for dtype in (torch.float64, torch.float32):
                batch.prepare(cell(3, 8), dtype)
        batch.finish()
        yield


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
def test_matches_reference(compiled: None, cell: Any, dtype: torch.dtype) -> None:
    for time, batch, bidirectional in ((4, 3, False), (1, 1, False), (3, 2, True)):
        layer = ur.Recurrent(cell, 3, 8, bidirectional=bidirectional, dtype=dtype)
        for param in layer.parameters():
            nn.init.normal_(param, 0, 0.4)
        x = torch.randn(time, batch, 3, dtype=dtype).requires_grad_()
        sizes = layer._first.state_sizes().values()
        state = [torch.randn(1 + bidirectional, batch, n, dtype=dtype).requires_grad_() for n in sizes]
        leaves = [x, *state, *layer.parameters()]
        with ur.engine("reference"):
            weights = [torch.randn_like(value) for value in values(layer, x, state)]
            expected = values_and_gradients(values(layer, x, state), weights, leaves)
        with ur.engine("native"):
            actual = values_and_gradients(values(layer, x, state), weights, leaves)
            assert_close(actual, expected, TOLERANCE[dtype])
            with torch.no_grad():
                assert_close(values(layer, x, state), expected[: len(weights)], TOLERANCE[dtype])


def test_unused_parameter_has_no_gradient() -> None:
    layer, x = ur.Recurrent(NoInput, 3, 8), torch.randn(2, 2, 3, requires_grad=True)
    for name in ("reference", "native"):
        with ur.engine(name):
            output, _ = layer(x, torch.ones(1, 2, 8))
        layer.zero_grad()
        output.sum().backward()
        assert layer.w_l0.grad is None
        assert layer.u_l0.grad is not None
        assert x.grad is None

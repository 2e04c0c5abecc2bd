"""Operations with rules of their own in the compiler: values, gradients and torch operators, by theme.

Each cell applies all functions of a theme to the same value. ``self`` is passed as ``s``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear, one_hot, pad

import unrolled as ur
from fuzz.functions import Spike
from helpers.layer_pairs import (
    NEEDS_COMPILER,
    TOLERANCE,
    assert_close,
    results_of_engines,
    tensors,
)
from helpers.step_batch import BatchCompiler

pytestmark = NEEDS_COMPILER

WIDTH = 8
Functions = dict[str, Callable[[Any, Tensor], Tensor]]


def tiny(v: Tensor, exponent: float) -> float:
    """Return a small number, whose square is 0 if the exponent is more than 1/2."""
    return float(torch.finfo(v.dtype).tiny ** exponent)


NUMBERS: Functions = {
    "where-numbers": lambda s, v: torch.where(v > 0, 1.0, -1.0) * v,
    "where-inexact": lambda s, v: torch.where(v > 0, 0.1, -0.3) + v,  # rounded to the default dtype
    "where-integers": lambda s, v: torch.where(v > 0, 1, -1) * v,
    "where-mixed": lambda s, v: torch.where(v > 0, 2, -0.7) * v,
    "where-bools": lambda s, v: torch.where(v > 0, True, v < -1).to(v.dtype) * v,
    "where-tensors": lambda s, v: torch.where(v > 0, torch.tensor(0.1), torch.tensor(-0.1)) * v,
    "where-nested": lambda s, v: torch.where(v > 1, 0.3, torch.where(v < -1, -0.3, 0.0)) + v,
    "logic-with-bools": lambda s, v: (
        torch.where((v > 0) ^ True, v, 2 * v) * ((v > 1) | False | (v < -1) & True)
    ),
    "where-parameter": lambda s, v: torch.where(s.p > 0, 0.1, -0.1) * v,
    "full": lambda s, v: torch.full((v.shape[0], 1), 0.1) * v + torch.ones(v.shape),
    "linspace": lambda s, v: torch.linspace(-1, 0.7, WIDTH) * 0.3 * v,
    "ldexp": lambda s, v: torch.ldexp(s.p * v, v.sin()),
    "ldexp-number": lambda s, v: torch.ldexp(v, torch.tensor(-2.0)),
    "constants-compared": lambda s, v: torch.where(torch.full_like(v, 0.1) == 0.1, v, -v),
    "constants-computed": lambda s, v: torch.where(torch.full_like(v, 0.1) * 3 > 0.3, v, -v),
    "tiny-divided-down": lambda s, v: torch.div(v * tiny(v, 0.8), -tiny(v, 0.5), rounding_mode="floor"),
    "tiny-divided-by-rows": lambda s, v: torch.div(
        v * tiny(v, 0.8), s.p * tiny(v, 0.5), rounding_mode="floor"
    ),
    "zero-divided-down": lambda s, v: torch.copysign(
        v, torch.div(-v.abs() * 0.1, -9.0, rounding_mode="floor")
    ),
    "root-of-infinity": lambda s, v: torch.where(v > 0, v, -math.inf).detach().pow(0.5).nan_to_num() * v,
    "inverse-root-of-infinity": lambda s, v: (
        v * ((torch.where(v > 0, 1, -math.inf) * v.new_ones(1)) ** -0.5).isnan()
    ),
}
CASTS: Functions = {
    "double": lambda s, v: ((v.double() * 0.1 + 1) - 1).to(v.dtype),
    "double-of-sum": lambda s, v: (v.double().sum(-1, keepdim=True) / 3).to(v.dtype) + v,
    "double-product": lambda s, v: linear(v.double(), s.q.double()).to(v.dtype),
    "double-softmax": lambda s, v: v.softmax(-1, dtype=torch.float64).to(v.dtype),
    "double-constant": lambda s, v: (v * torch.linspace(0, 1, WIDTH, dtype=torch.float64)).to(v.dtype),
    "float": lambda s, v: (v.float() * 0.1 + 1).to(v.dtype),
    "float-compared": lambda s, v: v * (v.float() > 0.1) + (v.float() == v),
    "float-product": lambda s, v: (v.float() * s.p.float()).to(v.dtype),
    "float-number": lambda s, v: v * (v.float() / 3).to(v.dtype),
    "mask": lambda s, v: v * (v > 0).float() + (v < 0).double().to(v.dtype),
    "type-as": lambda s, v: v.type(torch.float64).type_as(v),
}
INTEGERS: Functions = {
    "multiply": lambda s, v: ((v * 3).long() * 5 + 2) * v,
    "square": lambda s, v: (v * 3).long() ** 2 * v,
    "divide-down": lambda s, v: ((v * 30).long() * 1000 // 7) * v,
    "divide": lambda s, v: ((v * 30).long() / 7).to(v.dtype) * v,
    "remainder": lambda s, v: ((v * 1000).long() * 12345 % 7) * v,
    "clamp": lambda s, v: (v * 3).long().clamp(-2, 1) * v,
    "count": lambda s, v: ((v > 0).sum(-1, keepdim=True) * 3 - 1) * v,
    "bits": lambda s, v: (((v * 30).long() & 3) + ((v * 30).long() >> 2) + ((v * 3).long() << 1)) * v,
    "int32": lambda s, v: ((v * 30).int() * 3 // 4) * v,
    "int32-overflows": lambda s, v: ((v * 30).int() * 123456789 % 11) * v,
    "int8-overflows": lambda s, v: ((v * 30).to(torch.int8) * 100) * v * 0.01,
    "uint8": lambda s, v: (v.abs() * 30).to(torch.uint8) * 50 * v * 0.01,
    "sums": lambda s, v: ((v * 3).long().sum(-1, keepdim=True) + (v * 2).long().cumsum(-1)) * v,
    "compare": lambda s, v: ((v * 30).long() * 7 > 20) * v,
    "maximum": lambda s, v: torch.maximum((v * 3).long(), (v * -2).int()) * v,
    "uint8-negated": lambda s, v: -(v > 0).to(torch.uint8) * v * 0.01,
    "uint8-times": lambda s, v: (v > 0).to(torch.uint8) * -1 * v * 0.01,
    "matrix-product": lambda s, v: ((v * 30).long() @ torch.full((WIDTH, WIDTH), 100001) % 7) * v,
    "running-product": lambda s, v: ((v * 20).long().clamp(-15, 15).cumprod(-1) % 7) * v,
    "written": lambda s, v: (
        torch.zeros_like(v, dtype=torch.int32).slice_scatter((v * 3).int()[:, 2:], 1, 2) * v
    ),
    "sorted-indices": lambda s, v: (
        torch.sort((v > 0).to(torch.int8), stable=True, dim=-1)[1].to(torch.int8) * 100 * v
    ),
    "first-index": lambda s, v: (v > 0).long().argmax(-1, keepdim=True).to(torch.int8) * 100 * v,
    "scattered": lambda s, v: (
        torch.zeros_like(v, dtype=torch.int64).scatter_add(
            -1, (v > 0).long(), (v * 3).long().clamp(-3, 3) * 4000037
        )
        % 7
        * v
    ),
    "large": lambda s, v: ((v * 1000).long() * 100003 - (v * 1000).long() * 100002) * v * 0.001,
}


class OldSpike(torch.autograd.Function):
    """The same without ``setup_context``, and with a gradient of the threshold."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(v, threshold)
        spikes = (v > threshold).to(v.dtype)
        mask = v > 0
        ctx.mark_non_differentiable(mask)
        return spikes, mask

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        v, threshold = ctx.saved_tensors
        surrogate = torch.clamp(1 - (v - threshold).abs(), min=0) * grad
        return surrogate, -surrogate.sum(0) if ctx.needs_input_grad[1] else None


class RoundInPlace(torch.autograd.Function):
    """A straight-through estimator that works in place."""

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        y = v.clone()
        y[v < 0] = 0.5
        return y.mul_(3).round_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        v, y = ctx.saved_tensors
        grad = grad.clone()
        grad[v.abs() > 1] = 0
        return grad + 0.1 * y


AUTOGRAD_FUNCTIONS: Functions = {
    "spike": lambda s, v: Spike.apply(v, 10.0),
    "spike-of-product": lambda s, v: Spike.apply(linear(v, s.q), 2) * v,
    "in-place": lambda s, v: RoundInPlace.apply(v),
}
OLD_AUTOGRAD_FUNCTIONS: Functions = {
    "spike": lambda s, v: OldSpike.apply(v, s.p)[0],
    "second-output": lambda s, v: OldSpike.apply(v, s.p)[1] * v,
    "detached": lambda s, v: v * torch.heaviside(v.detach() - 0.3, v.new_tensor(0.5)),
}
NORMS: Functions = {
    "batch-norm": lambda s, v: batch_norm(v, s.mean.to(v.dtype), s.var.to(v.dtype), s.p, s.p * 2),
    "batch-norm-no-scale": lambda s, v: batch_norm(v, s.mean.to(v.dtype), s.var.to(v.dtype), eps=0.1),
    "batch-norm-parameters": lambda s, v: batch_norm(v, s.p.detach(), s.q[0].detach().exp(), s.p, None),
    "batch-norm-of-channels": lambda s, v: batch_norm(
        v.unflatten(1, (2, 4)), s.mean[:2].to(v.dtype), s.var[:2].to(v.dtype), s.p[:2], s.p[2:4]
    ).flatten(1),
    "batch-norm-of-images": lambda s, v: batch_norm(
        v.unflatten(1, (2, 2, 2)), s.mean[:2].to(v.dtype), s.var[:2].to(v.dtype)
    ).flatten(1),
}


def keep_winners(v: Tensor, count: int) -> Tensor:
    """Keep the largest values of each row and set the others to 0."""
    values, indices = v.topk(count, -1)
    return torch.zeros_like(v).scatter(-1, indices, values)


CUMULATIVE: Functions = {
    "prod": lambda s, v: torch.cat([v.prod(-1, keepdim=True), v[:, 1:]], -1),
    "prod-with-zeros": lambda s, v: torch.relu(v).prod(-1, keepdim=True) + v,
    "prod-of-heads": lambda s, v: v.unflatten(1, (4, 2)).prod(1).repeat(1, 4),
    "cumprod": lambda s, v: torch.sigmoid(v).cumprod(-1),
    "cumprod-with-zeros": lambda s, v: torch.cumprod(torch.relu(v + 0.5), 1),
    "cumprod-of-heads": lambda s, v: v.unflatten(1, (4, 2)).cumprod(1).flatten(1),
    "cumprod-flipped": lambda s, v: torch.sigmoid(v).flip(-1).cumprod(-1).flip(-1),
    "cummax": lambda s, v: v.cummax(-1).values,
    "cummax-of-heads": lambda s, v: torch.cummax(v.unflatten(1, (4, 2)), 1)[0].flatten(1),
    "cummax-indices": lambda s, v: v * v.cummax(-1).indices,
    "cummax-ties": lambda s, v: torch.relu(v).cummax(-1).values,
    "cummin": lambda s, v: torch.cummin(v, -1)[0],
    "logcumsumexp": lambda s, v: v.logcumsumexp(-1),
    "logcumsumexp-of-heads": lambda s, v: torch.logcumsumexp(v.unflatten(1, (2, 4)), 2).flatten(1),
}
SORTED: Functions = {
    "topk-values": lambda s, v: v.topk(3, -1).values.sum(-1, keepdim=True) * v,
    "topk-indices": lambda s, v: v * v.topk(2).indices.sum(-1, keepdim=True),
    "topk-smallest": lambda s, v: torch.topk(v, 5, 1, largest=False)[0].repeat(1, 2)[:, :WIDTH],
    "winners": lambda s, v: keep_winners(v, 3),
    "winners-mask": lambda s, v: v * torch.zeros_like(v).scatter(-1, v.topk(4, -1).indices, 1.0),
    "winners-of-heads": lambda s, v: keep_winners(v.unflatten(1, (2, 4)), 2).flatten(1),
    "winners-threshold": lambda s, v: v * (v >= v.topk(3, -1).values[:, -1:]),
    "gather": lambda s, v: v.flip(-1).gather(-1, v.topk(WIDTH, -1).indices),
    "sort": lambda s, v: v.sort(-1).values,
    "sort-descending": lambda s, v: torch.sort(v, dim=1, descending=True).values,
    "argsort": lambda s, v: v * v.argsort(-1),
    "kth-value": lambda s, v: v - v.kthvalue(3, -1, keepdim=True).values,
    "median": lambda s, v: v - v.median(-1, keepdim=True).values,
    "one-hot": lambda s, v: one_hot(v.argmax(-1), WIDTH) * v,
}
EMPTY: Functions = {
    "sum": lambda s, v: v[:, 2:2].sum(-1, keepdim=True) + v,
    "sum-of-heads": lambda s, v: v.unflatten(1, (4, 2))[:, :, :0].sum(-1).repeat(1, 2) + v,
    "prod": lambda s, v: v[:, :0].prod(-1, keepdim=True) * v,
    "any": lambda s, v: torch.where((v[:, :0] > 0).any(-1, keepdim=True), v, -v),
    "all": lambda s, v: torch.where((v[:, :0] > 0).all(-1, keepdim=True), v, -v),
    "mean": lambda s, v: torch.where(v[:, :0].mean(-1, keepdim=True).isnan(), v, -v),
    "logsumexp": lambda s, v: torch.exp(v[:, :0].logsumexp(-1, keepdim=True)) + v,
    "product": lambda s, v: linear(v[:, :0], s.q[:, :0]) + v,
    "product-without-columns": lambda s, v: torch.cat([v @ s.q[:, :0], v], 1),
    "product-of-rows": lambda s, v: torch.bmm(v[:, None, :0], v[:, :0, None])[:, 0] + v,
    "softmax": lambda s, v: torch.cat([v[:, :0].softmax(-1), v], 1),
    "cumulative": lambda s, v: torch.cat(
        [v[:, :0].cumsum(1), v, v[:, :0].cumprod(1), v[:, :0].cummax(1)[0]], 1
    ),
    "sorted": lambda s, v: torch.cat([v[:, :0].sort(-1).values, v.topk(0).values, v], 1),
}
PADDED: Functions = {
    "reflect": lambda s, v: pad(v[:, None], (3, 2), mode="reflect")[:, 0, ::1][:, :WIDTH],
    "reflect-2d": lambda s, v: pad(v.view(-1, 1, 2, 4), (2, 1, 1, 0), mode="reflect").flatten(1)[:, 3:11],
    "replicate": lambda s, v: pad(v[:, None], (2, 4), mode="replicate").unfold(2, 7, 1).mean(-1)[:, 0],
    "replicate-2d": lambda s, v: pad(v.view(-1, 1, 2, 4), (1, 1, 1, 1), mode="replicate").flatten(1)[:, 4:12],
    "replicate-crop": lambda s, v: pad(v[:, None], (-2, 2), mode="replicate")[:, 0],
    "cdist": lambda s, v: torch.cdist(v, s.q),
    "cdist-of-heads": lambda s, v: torch.cdist(v.view(-1, 4, 2), v.view(-1, 4, 2) + 1).flatten(1)[:, 4:12],
    "cdist-same": lambda s, v: torch.cdist(v.view(-1, 4, 2), v.view(-1, 4, 2)).flatten(1)[:, 4:12],
    "cdist-1": lambda s, v: torch.cdist(v, s.q, p=1.0) * 0.3,
    "cdist-3": lambda s, v: torch.cdist(v[:, None], s.q, p=3)[:, 0],
    "cdist-infinity": lambda s, v: torch.cdist(v, s.q, float("inf")),
}
OUTSIDE = torch.linspace(-0.3, 1, WIDTH)
MATRIX = torch.arange(WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH).sin()
ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 5])
OUTSIDE_TENSORS: Functions = {
    "global": lambda s, v: v * OUTSIDE,
    "global-matrix": lambda s, v: v @ MATRIX.to(v.dtype),
    "global-number": lambda s, v: v * OUTSIDE[2],
    "global-index": lambda s, v: v[:, ORDER],
    "global-of-heads": lambda s, v: v.unflatten(1, (4, 2)).mul(OUTSIDE[:2]).flatten(1),
    "global-mask": lambda s, v: torch.where(ORDER > 3, v, -v),
    "attribute-index": lambda s, v: v[:, s.order],
    "attribute-index-select": lambda s, v: v.index_select(1, s.order),
    "attribute-gather": lambda s, v: v.gather(1, s.order.expand_as(v)),
    "attribute-scatter": lambda s, v: torch.zeros_like(v).scatter(1, s.order.expand_as(v), v),
    "attribute-put": lambda s, v: torch.zeros_like(v).index_add(1, s.order, v),
    "attribute-mask": lambda s, v: v[:, s.mask].repeat(1, 2),
    "attribute-factor": lambda s, v: v * s.order,
}
THEMES: dict[str, Functions] = {
    "cumulative": CUMULATIVE,
    "sorted": SORTED,
    "empty": EMPTY,
    "padded": PADDED,
    "outside": OUTSIDE_TENSORS,
    "norms": NORMS,
    "autograd-functions": AUTOGRAD_FUNCTIONS,
    "old-autograd-functions": OLD_AUTOGRAD_FUNCTIONS,
    "numbers": NUMBERS,
    "casts": CASTS,
    "integers": INTEGERS,
}
INEXACT = {"casts"}  # torch computes some values in float32


def cell_of(theme: str) -> type[ur.Cell]:
    """Return a cell whose state has the results of all functions of a theme."""
    functions = list(THEMES[theme].values())

    class Themed(ur.Cell):
        p = ur.Param(WIDTH)
        q = ur.Param(WIDTH, WIDTH)
        order = torch.tensor([5, 0, 0, 3, 7, 1, 2, 4])
        mask = torch.arange(WIDTH) % 2 == 1
        mean = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
        var = torch.linspace(0.5, 2, WIDTH, dtype=torch.float64)
        r = ur.Param("hidden")
        w = ur.Param("hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            parts = (linear(x, self.w) + self.r * h).chunk(len(functions), -1)
            values = [f(self, part) + part for f, part in zip(functions, parts, strict=True)]
            return 0.5 * torch.tanh(torch.cat(values, -1))

    return Themed


FAST = [("numbers", torch.float64)]
CASES = [
    pytest.param(theme, dtype, marks=[] if (theme, dtype) in FAST else pytest.mark.slow)
    for theme in THEMES
    for dtype in (torch.float32, torch.float64)
]


@pytest.fixture
def layer(theme: str, dtype: torch.dtype) -> Iterator[Any]:
    """Return a compiled layer."""
    with BatchCompiler() as batch:
        layer = ur.Recurrent(cell_of(theme), 3, WIDTH * len(THEMES[theme]), dtype=dtype)
        for param in layer.parameters():
            torch.nn.init.normal_(param, 0, 0.5)
        batch.prepare(layer._first, dtype)
        batch.finish()
        yield layer


@pytest.mark.parametrize(("theme", "dtype"), CASES, ids=str)
def test_matches_reference(layer: Any, theme: str, dtype: torch.dtype) -> None:
    tolerance = max(TOLERANCE[dtype], 1e-7 * (theme in INEXACT))
    x = torch.randn(3, 5, 3, dtype=dtype).requires_grad_()
    weights, expected, actual = results_of_engines(layer, x)
    with ur.engine("native"):
        with torch.no_grad():
            assert torch.equal(layer(x)[0], actual[0])

        def call(*values: Tensor) -> tuple[Tensor, ...]:
            params = dict(zip([name for name, _ in layer.named_parameters()], values[1:], strict=True))
            return tuple(tensors(torch.func.functional_call(layer, params, (values[0],))))

        outputs, vjp = torch.func.vjp(call, *[leaf.detach() for leaf in (x, *layer.parameters())])
        by_operators = [*outputs, *vjp(tuple(weights))]
    for position, name in enumerate(THEMES[theme]):
        columns = slice(position * WIDTH, (position + 1) * WIDTH)
        assert_close(actual[0][..., columns], expected[0][..., columns], tolerance, name)
        for k in (-2, -1):  # gradients of the parameters r and w
            assert_close(actual[k][columns], expected[k][columns], tolerance, f"{name}, gradient")
    assert_close(actual, expected, tolerance)
    assert_close(by_operators, actual, tolerance)

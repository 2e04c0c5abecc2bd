"""Torch functions that are replaced while a step is captured, because their backward can't be captured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import batch_norm, one_hot, scaled_dot_product_attention

from unrolled.engines._torch_private import disable_current_modes
from unrolled.engines.compiler.ir import UnsupportedError


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``batch_norm``, which has no gradient for the running statistics.

    Raises:
        UnsupportedError: If it would compute statistics over the batch.
    """
    if training:
        raise UnsupportedError(
            "batch_norm with training=True computes statistics over the batch, whose rows must be "
            "independent; use layer_norm, or training=False with running statistics"
        )
    mean, var = (None if value is None else value.detach() for value in (running_mean, running_var))
    return batch_norm(x, mean, var, weight, bias, False, momentum, eps)


def _one_hot(indices: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        return one_hot(indices, num_classes)
    return (indices.unsqueeze(-1) == torch.arange(num_classes)).long()


_library: Any = torch.library.Library("unrolled", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear_recurrence(Tensor factors, Tensor x, int dim) -> Tensor")


def _linear_recurrence(factors: Tensor, x: Tensor, dim: int) -> Tensor:
    """Compute ``y[k] = factors[k] * y[k - 1] + x[k]`` along a dimension."""
    parts: list[Tensor] = []
    for factor, term in zip(torch.split(factors, 1, dim), torch.split(x, 1, dim), strict=True):
        parts.append(factor * parts[-1] + term if parts else term)
    return torch.cat(parts, dim)


for _device_type in ("CPU", "CUDA"):
    _library.impl("linear_recurrence", _linear_recurrence, _device_type)
torch.library.register_fake(
    "unrolled::linear_recurrence", lambda factors, x, dim: torch.empty_like(x), lib=_library
)
linear_recurrence = torch.ops.unrolled.linear_recurrence.default


class _CumProd(torch.autograd.Function):
    """``cumprod``. The backward of torch's own reads whether the input has zeros."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch.cumprod(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [x], [grad], dim = ctx.saved_tensors, grads, ctx.dim
        first, last = x.narrow(dim, 0, 1), x.shape[dim] - 1
        products_before = torch.cat([torch.ones_like(first), x.narrow(dim, 0, last)], dim).cumprod(dim)
        next_factors = torch.cat([x.narrow(dim, 1, last), torch.zeros_like(first)], dim)
        sums = linear_recurrence(next_factors.flip(dim), grad.flip(dim), dim).flip(dim)
        return products_before * sums, None


class _CumulativeExtremum(torch.autograd.Function):
    """``cummax`` or ``cummin``. Each gradient goes to the extremum: it adds up while that stays the same."""

    @staticmethod
    def forward(x: Tensor, dim: int, function: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        values, indices = function(x, dim)
        return values, indices

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dim = inputs[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [indices], grad, dim = ctx.saved_tensors, grads[0], ctx.dim
        size = indices.shape[dim]
        stays = indices.narrow(dim, 1, size - 1) == indices.narrow(dim, 0, size - 1)
        stays = torch.cat([stays, torch.zeros_like(indices.narrow(dim, 0, 1), dtype=torch.bool)], dim)
        sums = linear_recurrence(stays.to(grad.dtype).flip(dim), grad.flip(dim), dim).flip(dim)
        positions = torch.arange(size).view([-1 if d == dim % grad.dim() else 1 for d in range(grad.dim())])
        return torch.where(indices == positions, sums, 0.0), None, None


def _cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    x = input if dtype is None else input.to(dtype)
    if not x.is_floating_point() or not x.shape[dim]:
        return torch.cumprod(x, dim)
    return _CumProd.apply(x, dim)  # type: ignore[no-untyped-call]


def _cumulative_extremum(function: Callable[..., Any], result_type: Any) -> Callable[..., Any]:
    def replacement(input: Tensor, dim: int) -> Any:
        if not input.is_floating_point() or not input.shape[dim]:
            return function(input, dim)
        return result_type(_CumulativeExtremum.apply(input, dim, function))  # type: ignore[no-untyped-call]

    return replacement


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Compute ``cdist`` from the differences."""
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return distances


def _einsum(*args: Any) -> Tensor:
    """Compute ``einsum`` from left to right; the order that opt_einsum chooses depends on the batch size."""
    if not torch.backends.opt_einsum.enabled:
        return torch.einsum(*args)
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(*args)


def _multi_dot(tensors: Sequence[Tensor], *, out: None = None) -> Tensor:
    """Compute ``multi_dot`` from left to right; the order that torch chooses depends on the batch size."""
    return functools.reduce(torch.matmul, tensors)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Compute ``scaled_dot_product_attention`` from products and a softmax instead of as one operation."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*args, **kwargs)


def _getitem(x: Tensor, index: Any) -> Tensor:
    """Index a tensor; masks whose values are known become positions."""

    def to_positions(item: Any) -> Any:
        if type(item) is not Tensor or item.dtype is not torch.bool or item.dim() != 1:
            return item
        with disable_current_modes():
            return item.nonzero().squeeze(1)

    return x[tuple(map(to_positions, index)) if isinstance(index, tuple) else to_positions(index)]


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    batch_norm: _batch_norm,
    one_hot: _one_hot,
    Tensor.__getitem__: _getitem,
    torch.cumprod: _cumprod,
    Tensor.cumprod: _cumprod,
    torch.cdist: _cdist,
    torch.einsum: _einsum,
    torch.linalg.multi_dot: _multi_dot,
    torch.chain_matmul: lambda *matrices: _multi_dot(matrices),
    scaled_dot_product_attention: _attention,
    **dict.fromkeys(
        (torch.cummax, Tensor.cummax), _cumulative_extremum(torch.cummax, torch.return_types.cummax)
    ),
    **dict.fromkeys(
        (torch.cummin, Tensor.cummin), _cumulative_extremum(torch.cummin, torch.return_types.cummin)
    ),
}

"""Functions with gradients of their own, which random steps call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Spike(torch.autograd.Function):
    """A spike, with a surrogate gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, slope: float) -> Tensor:
        return torch.heaviside(v, torch.zeros_like(v))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        [v] = ctx.saved_tensors
        return grad / (1 + ctx.slope * v.abs()) ** 2, None


class RoundThrough(torch.autograd.Function):
    """Rounding, with the gradient of the identity inside of an interval."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return (v * 2).round() / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        v, rounded = ctx.saved_tensors
        return torch.where(v.abs() > 2, 0.1 * rounded * grad, grad)


class ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is limited."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, limit: float) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clamp(-ctx.limit, ctx.limit), None


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "spike": Spike.apply,
    "round_through": RoundThrough.apply,
    "clip_gradient": ClipGradient.apply,
}

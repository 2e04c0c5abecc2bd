"""The functions of a step's program, computed in double precision as the page computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Tensor]

_WITH_NUMBERS = (  # functions of torch.nn.functional whose other arguments are numbers or words
    *("relu6", "silu", "mish", "selu", "elu", "celu", "softplus", "softsign", "logsigmoid", "hardsigmoid"),
    *("hardswish", "hardshrink", "softshrink", "tanhshrink", "threshold", "gelu"),
)


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    x = x if low is None else torch.maximum(x, _tensor(low))
    return x if high is None else torch.minimum(x, _tensor(high))


_ELEMENTWISE: dict[str, Function] = {
    **{name: getattr(functional, name) for name in _WITH_NUMBERS},
    "cast": lambda x: x,
    "clamp": _clamp,
    "hardtanh": _clamp,
    "leaky_relu": lambda x, slope: torch.where(x > 0, x, x * slope),
    "add": lambda a, b, alpha: a + alpha * b,
    "sub": lambda a, b, alpha: a - alpha * b,
    "div": lambda a, b, rounding: torch.div(_tensor(a), _tensor(b), rounding_mode=rounding),
    "round": lambda x, decimals: torch.round(x, decimals=decimals),
    "where": lambda condition, a, b: torch.where(condition != 0, _tensor(a), _tensor(b)),
    "addcmul": lambda x, a, b, value: x + value * a * b,
    "addcdiv": lambda x, a, b, value: x + value * a / b,
    "logit": lambda x, eps: torch.logit(x, eps),
    "nan_to_num": lambda x, nan, high, low: torch.nan_to_num(x, nan, high, low),
}


def elementwise_function(name: str, args: list[Any]) -> Tensor:
    """Apply an elementwise function to tensors and numbers.

    Args:
        name: Its name in the program.
        args: Its arguments.
    """
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name](*args)
    result: Tensor = getattr(torch, name)(*map(_tensor, args))
    return result


# The functions of vectors along axis 1.
REDUCTIONS: dict[str, Function] = {
    "sum": lambda v: v.sum(1),
    "logsumexp": lambda v: v.logsumexp(1),
    "norm": lambda v, order: torch.linalg.vector_norm(v, order, 1),
    "var": lambda v, correction: v.var(1, correction=correction),
    "std": lambda v, correction: v.std(1, correction=correction),
    "amax": lambda v: v.amax(1),
    "amin": lambda v: v.amin(1),
    "argmax": lambda v: v.argmax(1),
    "argmin": lambda v: v.argmin(1),
    "mean": lambda v: v.mean(1),
    "running_mean": lambda v: v.mean(1),
    "prod": lambda v: v.prod(1),
    "any": lambda v: (v != 0).any(1),
    "all": lambda v: (v != 0).all(1),
    "count_nonzero": lambda v: (v != 0).sum(1),
    "median": lambda v: v.median(1).values,
    "argmedian": lambda v: v.median(1).indices,
}
VECTOR_FUNCTIONS: dict[str, Function] = {
    "softmax": lambda v: v.softmax(1),
    "softmin": lambda v: (-v).softmax(1),
    "log_softmax": lambda v: v.log_softmax(1),
    "cumsum": lambda v: v.cumsum(1),
    "cumprod": lambda v: v.cumprod(1),
    "logcumsumexp": lambda v: v.logcumsumexp(1),
    "sort": lambda v, descending: v.sort(1, bool(descending), stable=True).values,
    "argsort": lambda v, descending=False: v.sort(1, bool(descending), stable=True).indices,
    "normalize": lambda v, order, eps: v / torch.linalg.vector_norm(v, order, 1, keepdim=True).clamp_min(eps),
    "layer_norm": lambda v, eps: (v - v.mean(1, True)) / (v.var(1, correction=0, keepdim=True) + eps).sqrt(),
    "rms_norm": lambda v, eps: v / ((v * v).mean(1, True) + eps).sqrt(),
}

"""The modules and functions of torch that act on each time step alone, and where they expect the features."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)
LAST_AXIS_MODULES = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
SOFTMAX_MODULES = (nn.Softmax, nn.LogSoftmax, nn.GLU)

ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset(
    getattr(owner, name)
    for owner, names in (
        (operator, "add sub mul truediv neg abs pow"),
        (torch, "add sub mul div neg abs relu tanh sigmoid exp log sqrt rsqrt square sin cos clamp maximum minimum"
                " where erf log1p expm1 pow softmax"),
        (F, "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu"
            " silu sigmoid softplus softshrink softsign tanh tanhshrink threshold"),
    )
    for name in names.split()
    if name != "softmax"
)  # fmt: skip
ELEMENTWISE_METHODS = frozenset(
    "add sub mul div neg abs relu tanh sigmoid exp log sqrt rsqrt square sin cos clamp pow".split()
)
IDENTITY_METHODS = frozenset({"contiguous", "clone", "detach", "float"})
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.alpha_dropout)


def function_of(module: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a module in evaluation mode as a function of a tensor and its weights, and the weights."""
    module = copy.copy(module)
    if hasattr(module, "inplace"):
        module.inplace = False
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(tensors, weights, strict=True)), (x,))
        return result

    return function, [tensor.detach() for tensor in tensors.values()]


def input_features(module: nn.Module) -> int | None:
    """Return the number of features that a module takes. None if it takes any number."""
    match module:
        case nn.Linear():
            return module.in_features
        case nn.LayerNorm() | nn.RMSNorm():
            return int(module.normalized_shape[-1])
        case nn.BatchNorm1d():
            return module.num_features
        case nn.Conv1d():
            return module.in_channels
    size = getattr(module, "input_size", None)
    return size if isinstance(size, int) else None

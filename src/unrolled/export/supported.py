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
PADDING_MODULES = (nn.ConstantPad1d, nn.ZeroPad1d)
# Modules whose output has as many features as their input.
KEEP_FEATURES = (*ELEMENTWISE_MODULES, *IDENTITY_MODULES, *PADDING_MODULES, nn.Softmax, nn.LogSoftmax)

_TENSOR_FUNCTIONS = (
    "abs", "add", "clamp", "cos", "div", "exp", "log", "mul", "neg", "pow", "relu", "rsqrt", "sigmoid", "sin",
    "sqrt", "square", "sub", "tanh",
)  # fmt: skip
_ACTIVATIONS = (
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh",
    "tanhshrink", "threshold",
)  # fmt: skip
ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset(
    getattr(owner, name)
    for owner, names in (
        (operator, ("add", "mul", "neg", "pow", "sub", "truediv")),
        (torch, (*_TENSOR_FUNCTIONS, "erf", "expm1", "log1p", "maximum", "minimum")),
        (F, _ACTIVATIONS),
    )
    for name in names
)
ELEMENTWISE_METHODS = frozenset(_TENSOR_FUNCTIONS)
IDENTITY_METHODS = frozenset({"contiguous", "clone", "detach", "float"})
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.alpha_dropout)


def function_of(module: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a module in evaluation mode as a function of a tensor and its weights, and the weights."""
    module = copy.copy(module)
    module.__dict__["inplace"] = False  # of activations: their input is read by others, too
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

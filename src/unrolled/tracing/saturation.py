"""Which values of a step are saturated, and which units never change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unrolled.tracing.call_recorder import CallRecorder
from unrolled.tracing.thresholds import DEAD_CHANGE, FLAT_SLOPE

SATURATING_FUNCTIONS = {  # monotonically increasing functions of one tensor with flat parts
    "sigmoid", "tanh", "hardsigmoid", "hardtanh", "softsign", "logsigmoid", "softplus",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "clamp", "clip", "clamp_min", "clamp_max",
}  # fmt: skip


def saturating_functions(
    call_recorder: CallRecorder, values: dict[str, Tensor]
) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Return the saturating function that computed each quantity, for those that have one."""
    functions = {name: call_recorder.function_of(value) for name, value in values.items()}
    return {
        name: function
        for name, function in functions.items()
        if function is not None and function[0] in SATURATING_FUNCTIONS
    }


def saturation_bounds(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return the values of a monotonically increasing function below and above which it is flat."""
    with torch.enable_grad():
        x = torch.linspace(-20, 20, 20001, dtype=torch.float64, requires_grad=True)
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    steep = (slope >= FLAT_SLOPE * slope.max()).nonzero().flatten()
    first, last = int(steep[0]), int(steep[-1])
    low = y[first - 1].item() if first > 0 else -torch.inf
    return low, y[last + 1].item() if last + 1 < len(y) else torch.inf


def dead_units(values: Tensor, rounding: float) -> Tensor:
    """Return which units of ``(steps of all rows, size)`` never change, up to this rounding error."""
    change = (values - values[0]).abs().amax(0)
    return change <= DEAD_CHANGE * rounding * values[0].abs()

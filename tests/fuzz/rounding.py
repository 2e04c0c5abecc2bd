"""How much rounding may change a result: the reference engine with a rounding error in each operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from helpers.layer_pairs import TOLERANCE

SAMPLES = 12
_MAX_SHORT = 2**14  # every float32 above is a multiple of 1/1024
# Operations whose results are exact, apart from views and comparisons.
_EXACT = """
    abs neg relu clamp clamp_min clamp_max maximum minimum amax amin max min where cat stack clone copy_
    zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full index index_select gather
    scatter index_put roll flip floor ceil round trunc sign sgn _to_copy arange eye constant_pad_nd
    repeat masked_fill fill slice_backward select_backward threshold_backward tril triu fmax fmin
    copysign lift_fresh scalar_tensor nan_to_num detach sort _unsafe_view linspace new_empty empty_like
    empty threshold hardtanh heaviside median aminmax masked_fill_ fill_ zero_ index_put_
    new_empty_strided empty_strided value_selecting_reduction_backward
    topk kthvalue cummax cummin scatter_ index_copy select_scatter slice_scatter index_copy_
"""
EXACT = frozenset(_EXACT.split())
# Operations that round like a less exact dtype: torch takes 1/6 in float32.
_ROUNDED_LIKE = {"hardsigmoid_backward": torch.float32}
# These round short numbers, too: x * scale - mean * scale, as torch computes it, isn't 0 where x is the mean.
_NORMALIZATIONS = ("native_group_norm", "native_layer_norm", "native_batch_norm")


class Noise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Change the result of each operation that rounds by up to one unit in the last place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, is_mutable = func.overloadpacket.__name__, func._schema.is_mutable
        if name in EXACT or (func.is_view and not is_mutable):
            return func(*args, **(kwargs or {}))
        if not is_mutable and torch.Tag.pointwise not in func.tags:
            # The intermediate results are rounded, too.
            add: Any = functools.partial(add_noise, keep_short=name not in _NORMALIZATIONS)
            args = tree_map(lambda v: add(v) if isinstance(v, Tensor) else v, args)
        result = func(*args, **(kwargs or {}))
        if is_mutable:
            if isinstance(result, Tensor) and result.is_floating_point() and result.is_contiguous():
                result.copy_(add_noise(result))
            return result
        if isinstance(result, Tensor):
            return add_noise(result, _ROUNDED_LIKE.get(name))
        if isinstance(result, (tuple, list)):
            return type(result)(add_noise(v) if isinstance(v, Tensor) else v for v in result)
        return result


def add_noise(value: Tensor, dtype: torch.dtype | None = None, keep_short: bool = True) -> Tensor:
    """Return a tensor with a random rounding error in each element that isn't a short number.

    Args:
        value: The tensor.
        dtype: The dtype whose rounding errors to add. None for that of the tensor.
        keep_short: Whether short numbers, of few binary digits, have no rounding error.
    """
    if not value.is_floating_point() or value._is_zerotensor() or value.is_meta:
        return value
    with torch.no_grad():
        steps = torch.randint(-1, 2, value.shape, dtype=value.dtype)
        noisy = value * (1 + torch.finfo(dtype or value.dtype).eps * steps)
        if not keep_short:
            return noisy
        scaled = value * 1024
        is_short = (scaled == scaled.round()) & (value.abs() < _MAX_SHORT)
        return torch.where(is_short, value, noisy)


def largest(value: Tensor) -> Tensor:
    """Return the largest finite magnitude in each row, 0 if there is none."""
    value = value.detach().double().abs()
    return torch.where(value.isfinite(), value, 0.0).amax(-1) if value.ndim else value


def kind(value: Tensor) -> Tensor:
    """Return for each element whether it is finite (0), inf, -inf or NaN."""
    return value.isnan() * 3 + value.isposinf() * 1 + value.isneginf() * 2


Results = list[Tensor | None]


def difference(
    actual: Results,
    expected: Results,
    names: list[str],
    compute_others: Callable[[], list[Results]],
) -> str:
    """Return how results differ from the expected ones by more than rounding explains, or an empty string.

    Errors are relative to the largest magnitude in a row, that is along the last dimension. They may also be
    20 times as large as the error of the expected row, or as its change when each operation of the reference
    rounds differently. Near a jump of the step, this change is large.

    Args:
        actual: The results to check. None: no gradient.
        expected: The results of the reference engine.
        names: The name of each result.
        compute_others: Computes the expected results in float64, and with other rounding errors.
    """
    others: list[Results] = []
    for k, (name, a, b) in enumerate(zip(names, actual, expected, strict=True)):
        if a is None or b is None:
            if a is not b:
                return f"{name} is {_describe(a)}, expected {_describe(b)}"
            continue
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name} is {_describe(a)}, expected {_describe(b)}"
        if _is_close(a, b):
            continue
        others = others or compute_others()
        message = _error(a, b, [value for other in others if (value := other[k]) is not None])
        if message:
            return f"{name} {message}"
    return ""


def _describe(value: Tensor | None) -> str:
    return "None" if value is None else f"a {str(value.dtype)[6:]} tensor of shape {tuple(value.shape)}"


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether results agree, apart from a few rounding errors."""
    same = torch.equal(kind(a), kind(b))
    return same and bool((largest(a.double() - b.double()) <= TOLERANCE[b.dtype] * largest(b)).all())


def _error(a: Tensor, b: Tensor, others: Sequence[Tensor]) -> str:
    """Return how a result differs from the expected one, or an empty string.

    Args:
        a: The result.
        b: The expected result.
        others: The expected result with other rounding errors.
    """
    stable = torch.ones_like(b, dtype=torch.bool)
    for other in others:
        stable &= kind(other) == kind(b)
    wrong = stable & (kind(a) != kind(b))
    if wrong.any():
        return f"has {float(a[wrong][0]):.4g}, expected {float(b[wrong][0]):.4g}"
    changes = [largest(torch.where(stable, other.double() - b.double(), 0.0)) for other in others]
    change = torch.stack(changes).amax(0)
    scale, error = largest(b), largest(torch.where(stable, a.double() - b.double(), 0.0))
    excess = error - TOLERANCE[b.dtype] * scale - 20 * change
    k = int(excess.argmax())
    if excess.flatten()[k] <= 0:
        return ""
    numbers = [float(value.flatten()[k]) for value in (error, scale, change)]
    return "is off by {:.2e} of {:.2e}; rounding changes it by {:.2e}".format(*numbers)

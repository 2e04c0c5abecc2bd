"""The functions that GPU kernels call, against torch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.triton_standin import namespace
from unrolled.engines.gpu.kernel_source import device_functions
from unrolled.engines.gpu.triton_ops import ADDITIVE_OPS, REDUCTIONS, TRITON_OPS
from unrolled.engines.native import operations

aten = torch.ops.aten
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1e-30, -1e-30, 1e30, -1e30]
SPECIAL += [math.inf, -math.inf, math.nan]

# Each function, and how far its arguments go.
UNARY: dict[str, tuple[Any, float]] = {
    "sigmoid": (torch.sigmoid, 30), "tanh": (torch.tanh, 30), "expm1": (torch.expm1, 30),
    "log1p": (torch.log1p, 100), "log10": (torch.log10, 100), "relu": (torch.relu, 100),
    "sign": (torch.sign, 10), "trunc": (torch.trunc, 100), "round_half_even": (torch.round, 100),
    "tan": (torch.tan, 1.5), "atan": (torch.atan, 30), "asin": (torch.asin, 1), "acos": (torch.acos, 1),
    "sinh": (torch.sinh, 30), "cosh": (torch.cosh, 30), "asinh": (torch.asinh, 100),
    "acosh": (torch.acosh, 100), "atanh": (torch.atanh, 1), "erfc": (torch.erfc, 9),
}  # fmt: skip
BINARY: dict[str, Any] = {
    "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "copysign": torch.copysign, "atan2": torch.atan2, "hypot": torch.hypot, "fmod": torch.fmod,
    "remainder": torch.remainder, "power": torch.pow,
}  # fmt: skip


def function(name: str) -> Any:
    """Return a device function, on torch's tensors."""
    source = "import triton\nimport triton.language as tl\n\n\n" + "\n\n\n".join(device_functions([name]))
    return namespace(source)[name]


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, units: float) -> None:
    """Compare values: they may differ by some units in the last place."""
    tolerance = units * torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tiny, equal_nan=True)


def arguments(limit: float, dtype: torch.dtype) -> Tensor:
    """Return arguments of all sizes up to a limit."""
    small = torch.logspace(-12, math.log10(limit), 400, dtype=torch.float64)
    return torch.cat([torch.linspace(-limit, limit, 1001, dtype=torch.float64), small, -small]).to(dtype)


@DTYPES
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_value(name: str, dtype: torch.dtype) -> None:
    reference, limit = UNARY[name]
    x = arguments(limit, dtype)
    kept = torch.isfinite(reference(x.double()))
    # Near ±1, the argument of the inverse functions is known less exactly than their result.
    units = {"asin": 8, "acos": 8, "atanh": 8, "acosh": 8, "erfc": 300, "sinh": 20, "cosh": 20}.get(name, 6)
    check(function(name)(x[kept]), reference(x[kept].double()), dtype, units)


@DTYPES
@pytest.mark.parametrize("name", UNARY)
def test_special_values_of_functions_of_one_value(name: str, dtype: torch.dtype) -> None:
    reference, _ = UNARY[name]
    x = torch.tensor(SPECIAL, dtype=dtype)
    if name in ("tan", "sign"):  # torch's own sign of NaN depends on the machine
        x = x[x.abs() <= 2]
    check(function(name)(x), reference(x).double(), dtype, 100)


@DTYPES
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_values(name: str, dtype: torch.dtype) -> None:
    reference = BINARY[name]
    x = torch.linspace(-9, 9, 61, dtype=dtype)[:, None].expand(61, 60).reshape(-1)
    y = torch.linspace(-4, 4.3, 60, dtype=dtype).repeat(61)
    expected = reference(x.double(), y.double())
    actual = function(name)(x, y)
    if name in ("fmod", "remainder"):  # without a fused multiply-add, the rest has the error of the product
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=9 * tolerance)
        return
    check(actual, expected, dtype, 200)


@DTYPES
@pytest.mark.parametrize("name", [name for name in BINARY if name not in ("fmod", "remainder")])
def test_special_values_of_functions_of_two_values(name: str, dtype: torch.dtype) -> None:
    x, y = (
        part.reshape(-1) for part in torch.meshgrid(2 * [torch.tensor(SPECIAL, dtype=dtype)], indexing="ij")
    )
    expected = BINARY[name](x, y)
    actual = function(name)(x, y)
    check(actual, expected.double(), dtype, 100)


@DTYPES
def test_which_numbers_are_negative(dtype: torch.dtype) -> None:
    x = torch.tensor(SPECIAL[:-1], dtype=dtype)
    assert torch.equal(function("is_negative")(x), torch.signbit(x))


def test_reductions_keep_nan() -> None:
    x = torch.tensor([[1.0, math.nan, 3.0, -4.0], [1.0, 2.0, math.inf, -7.0]])
    for name, reference in (("row_maximum", torch.amax), ("row_minimum", torch.amin)):
        torch.testing.assert_close(function(name)(x), reference(x, 1, keepdim=True), equal_nan=True)


def test_all_operations_of_the_compiler() -> None:
    copies = {aten.clone.default, aten._to_copy.default, aten.expand.default}  # the kernel IR has none
    assert TRITON_OPS.keys() == operations.OPERATIONS.keys() - copies
    assert REDUCTIONS.keys() == operations.REDUCTIONS.keys()
    assert ADDITIVE_OPS == operations.ADDITIVE

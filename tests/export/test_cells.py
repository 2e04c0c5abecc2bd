"""Exported C of single layers: every cell, and every function that a step may apply."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import unrolled as ur
from helpers.c_library import IS_X86, NEEDS_CC, Exported, streamed
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.user_cell import MGU
from unrolled.engines.native.operations import OPERATIONS, REDUCTIONS
from unrolled.export.c_ops import C, reduction

CELLS = sorted(name for name in ur.cells.__all__ if issubclass(getattr(ur.cells, name), ur.Cell))
FAST = ("GRU",)
SAME_SIZES = ("NAS", "SRU", "UnICORNN")  # the input is as wide as the hidden state

pytestmark = [NEEDS_CC, NEEDS_COMPILER]


def test_every_operation_of_the_engine_has_its_functions_in_c() -> None:
    folder = Path(ur.export.__path__[0]) / "runtime"
    runtime = "".join(path.read_text() for path in folder.glob("*.h"))
    defined = set(re.findall(r"^ALWAYS_INLINE \w+ (v_\w+)\(", runtime, re.MULTILINE))
    texts = [C.spell(one, ["a", "b", "c"]) for one in OPERATIONS.values()]
    used = {name for text in texts for name in re.findall(r"\bv_\w+", text)}
    used |= {reduction(target)[0] for target in REDUCTIONS}
    assert used <= defined


def example(name: str, hidden: int) -> tuple[ur.Recurrent, Tensor]:
    cell = getattr(ur.cells, name)
    layer = ur.Recurrent(cell, hidden if name in SAME_SIZES else hidden // 3 + 1, hidden)
    with torch.no_grad():
        for parameter in layer.parameters():  # a bias that starts at zero should count, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, 2 * torch.randn(30, layer.input_size)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CELLS]
)
def test_every_cell_has_the_bits_of_a_stream(name: str, tmp_path: Path) -> None:
    for hidden in (19,) if name in FAST else (1, 5, 48):
        layer, x = example(name, hidden)
        exported = Exported(layer, tmp_path / str(hidden))
        expected = streamed(layer, x)
        assert torch.equal(exported.run(x), expected)
        exported.reset()
        assert torch.equal(torch.stack([exported.step(row) for row in x]), expected)
        assert exported.selftest() == (0, 0.0)


@pytest.mark.slow
def test_a_cell_of_the_user(tmp_path: Path) -> None:
    layer, x = ur.Recurrent(MGU, 3, 21), torch.randn(20, 3)
    assert torch.equal(Exported(layer, tmp_path).run(x), streamed(layer, x))


@pytest.mark.skipif(not IS_X86, reason="names x86 instruction sets")
@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-march=x86-64",), ("-march=x86-64", "-DLANES=1"), ("-mavx",)])
@pytest.mark.parametrize("kind", [ur.LSTM, ur.GRU])
def test_other_instruction_sets_differ_by_rounding(kind: Any, flags: tuple[str, ...], tmp_path: Path) -> None:
    layer, x = kind(3, 13), torch.randn(20, 3)
    assert_close(Exported(layer, tmp_path, flags).run(x), layer(x)[0].detach(), atol=5e-7, rtol=0)


@pytest.mark.skipif(not IS_X86, reason="names x86 instruction sets")
@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_the_width_of_vectors_does_not_matter(lanes: int, tmp_path: Path) -> None:
    """Where products are fused and no columns are summed up. The processor must have AVX2."""
    layer, x = ur.LSTM(3, 13), torch.randn(20, 3)
    exported = Exported(layer, tmp_path, ("-march=x86-64-v3", f"-DLANES={lanes}"))
    assert torch.equal(exported.run(x), streamed(layer, x))


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name)
    for name in (
        "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf",
        "erfc", "exp", "exp2", "expm1", "floor", "frac", "isinf", "isnan", "log", "log10", "log1p",
        "log2", "logical_not", "neg", "reciprocal", "relu", "round", "rsqrt", "sgn", "sigmoid",
        "sign", "signbit", "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
    )
} | {name: getattr(F, name) for name in ("elu", "gelu", "mish", "silu", "softplus")}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    name: getattr(torch, name)
    for name in (
        "atan2", "copysign", "div", "fmax", "fmin", "fmod", "ge", "hypot", "logical_and", "logical_or",
        "logical_xor", "lt", "maximum", "minimum", "ne", "pow", "remainder", "sub",
    )
}  # fmt: skip


class Unary(ur.Cell):
    """All functions of one value."""

    state = {"h": "count*input"}
    count: int = len(UNARY)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cat([function(x).to(x.dtype) for function in UNARY.values()], -1)


class Binary(ur.Cell):
    """All functions of two values: the two halves of the input."""

    state = {"h": "count*input//2"}
    count: int = len(BINARY)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([function(a, b).to(x.dtype) for function in BINARY.values()], -1)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 1e-40, -1e-40, 1e-30, 3e38, -3e38, float("inf"),
           -float("inf"), float("nan"), 88.9, -104.2, 1e6, -7e4, 1.23e30, 4.0, 0.3]  # fmt: skip


def inputs() -> Tensor:
    """Rows of 44 numbers: special ones, and others of all magnitudes."""
    width = 2 * len(SPECIAL)
    random = torch.randn(60, width) * torch.logspace(-6, 6, 60).unsqueeze(1)
    special = torch.tensor(SPECIAL)
    pairs = [torch.cat((special, special.roll(shift))) for shift in range(len(SPECIAL))]
    return torch.cat([torch.stack(pairs), random, torch.randn(60, width)])


def by_function(functions: dict[str, Any], y: Tensor) -> dict[str, Tensor]:
    return dict(zip(functions, y.chunk(len(functions), 1), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "functions"), [(Unary, UNARY), (Binary, BINARY)])
def test_functions_have_the_bits_of_the_engine(cell: Any, functions: Any, tmp_path: Path) -> None:
    layer, x = ur.Recurrent(cell, 2 * len(SPECIAL), 2), inputs()
    results = by_function(functions, Exported(layer, tmp_path).run(x))
    for name, expected in by_function(functions, streamed(layer, x)).items():
        result = results[name]
        same = (result.view(torch.int32) == expected.view(torch.int32)) | (result.isnan() & expected.isnan())
        if name in (
            "cos",
            "sin",
            "tan",
        ):  # of large numbers: the engine calls libm, whose last bit may differ
            same |= (x.abs() > 12800) & ((result - expected).abs() <= 1.2e-7 * expected.abs())
        assert same.all(), (name, result[~same], expected[~same])


@pytest.mark.slow
@pytest.mark.skipif(not IS_X86, reason="names x86 instruction sets")
@pytest.mark.parametrize("flags", [("-march=x86-64", "-DLANES=1"), ("-march=x86-64",), ("-march=x86-64-v3",)])
@pytest.mark.parametrize(("cell", "functions"), [(Unary, UNARY), (Binary, BINARY)])
def test_functions_on_other_instruction_sets(
    cell: Any, functions: Any, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Compared with float64: within 2.5 units in the last place, and special values as torch has them."""
    layer, x = ur.Recurrent(cell, 2 * len(SPECIAL), 2), inputs()
    results = by_function(functions, Exported(layer, tmp_path, flags).run(x))
    with ur.engine("reference"):
        exact = layer.double()(x.double().unsqueeze(1))[0][:, 0].detach()
    for name, value in by_function(functions, exact).items():
        if name in (
            "gelu",
            "mish",
            "frac",
            "silu",
            "softplus",
            "remainder",
        ):  # several functions: errors add up
            continue
        result, expected = results[name], value.float()
        unit = torch.nextafter(expected.abs(), torch.tensor(float("inf"))) - expected.abs()
        same = ((result - expected).abs() <= 2.5 * unit) | (result == expected)
        same |= result.isnan() & expected.isnan()
        assert same.all(), (name, result[~same], expected[~same])


@pytest.mark.slow
def test_learned_initial_states_and_zoneout(tmp_path: Path) -> None:
    layer = ur.Recurrent(
        ur.cells.LSTM, 3, 9, num_layers=2, initial_state="learned", zoneout={"c": 0.3}
    ).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("initial"):
                nn.init.normal_(parameter)
    x = torch.randn(12, 3)
    exported = Exported(layer, tmp_path)
    for _ in range(2):
        assert torch.equal(exported.run(x), layer(x)[0].detach())
        exported.reset()

"""Values and gradients of each supported operation on the native engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import (
    NEEDS_COMPILER,
    TOLERANCE,
    assert_close,
    results_of_engines,
    tensors,
)
from helpers.step_batch import BatchCompiler
from helpers.step_operations import (
    BINARY,
    CUSTOM_GRADIENTS,
    DISCONTINUOUS,
    PRODUCTS,
    UNARY,
    Get,
    cell_of,
    fit,
)

pytestmark = NEEDS_COMPILER

WIDTH, GROUP_SIZE = 8, 12
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{name: lambda v, get, f=f: f(v) for name, f in UNARY.items()},
    **{f"jump: {name}": lambda v, get, f=f: f(v) for name, f in DISCONTINUOUS.items()},
    **{
        f"pair: {name}": lambda v, get, f=f: f(v, v.roll(3, 1) * get(v.shape[1]))
        for name, f in BINARY.items()
    },
    **{f"product: {name}": f for name, f in PRODUCTS.items()},
}
CUSTOM = {f"stop: {name}": lambda v, get, f=f: f(v) for name, f in CUSTOM_GRADIENTS.items()}


def group_cell(names: list[str]) -> type[ur.Cell]:
    """Return a cell that applies each operation to its own columns of the state."""

    def run(x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
        [h] = states
        width = len(names) * WIDTH
        v = linear(x, get(width, 3)) + get(width) * h
        parts = zip(names, v.chunk(len(names), -1), strict=True)
        values = [fit({**OPERATIONS, **CUSTOM}[name](part, get), WIDTH) for name, part in parts]
        return (0.5 * torch.tanh(torch.cat(values, -1)) + 0.3 * h,)

    return cell_of(run, 3, (len(names) * WIDTH,))


NAMES = list(OPERATIONS)
GROUPS = [NAMES[k : k + GROUP_SIZE] for k in range(0, len(NAMES), GROUP_SIZE)] + [list(CUSTOM)]
SPECIAL_IN_FLOAT32 = ("activation", "function", "jump")  # families with separate code for float32
CASES = [
    *((number, torch.float64) for number in range(len(GROUPS))),
    *(
        (number, torch.float32)
        for number, names in enumerate(GROUPS)
        if names[0].startswith(SPECIAL_IN_FLOAT32)
    ),
]


def layer_of(number: int, dtype: torch.dtype) -> Any:
    """Return a layer for a group of operations."""
    names = GROUPS[number]
    return ur.Recurrent(group_cell(names), 3, len(names) * WIDTH, dtype=dtype)


@pytest.fixture(scope="module")
def layers() -> Iterator[dict[tuple[int, torch.dtype], Any]]:
    """Return a compiled layer for each case."""
    with BatchCompiler() as batch:
        layers = {case: layer_of(*case) for case in CASES}
        for (number, dtype), layer in layers.items():
            for param in layer.parameters():
                torch.nn.init.normal_(param, 0, 0.4)
            batch.prepare(layer._first, dtype)
            if number % 6 == 5:
                batch.start()
        batch.finish()
        yield layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "dtype"), CASES, ids=lambda k: f"{GROUPS[k][0]} …" if isinstance(k, int) else str(k)
)
def test_matches_reference(layers: Any, number: int, dtype: torch.dtype) -> None:
    layer, names = layers[number, dtype], GROUPS[number]
    tolerance = TOLERANCE[dtype]
    if names == list(CUSTOM):
        tolerance = max(tolerance, 1e-7)  # torch's backward of hardsigmoid uses 1/6 in float32
    x = torch.randn(4, 5, 3, dtype=dtype).requires_grad_()
    _, expected, actual = results_of_engines(layer, x)
    with ur.engine("native"), torch.no_grad():
        inferred = layer(x)[0]
    assert torch.equal(inferred, actual[0])
    for position, name in enumerate(names):
        columns = slice(position * WIDTH, (position + 1) * WIDTH)
        for k, what in ((0, "output"), (3, "gradient of the input weights"), (4, "of the recurrent weights")):
            rows = (..., columns) if what == "output" else columns
            assert_close(actual[k][rows], expected[k][rows], tolerance, f"{name}, {what}")
    assert_close(actual, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GROUPS) - 1), ids=lambda k: f"{GROUPS[k][0]} …")
def test_finite_differences(layers: Any, number: int) -> None:
    layer = layers[number, torch.float64]
    x = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    with ur.engine("native"):
        assert torch.autograd.gradcheck(
            lambda x, *_: tuple(tensors(layer(x))), (x, *layer.parameters()), fast_mode=True
        )

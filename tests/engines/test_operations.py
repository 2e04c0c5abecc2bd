"""Each operation that a step may be written in, on the native engine: numbers, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, TOLERANCE, assert_close, tensors, with_gradients
from helpers.step_batch import Batch
from helpers.step_operations import ANY, JUMPING, PAIRS, PRODUCTS, STOPPING, Get, cell_of, fit

pytestmark = NEEDS_COMPILER

WIDTH, GROUP = 8, 12
EVERY: dict[str, Callable[..., Tensor]] = {
    **{name: lambda v, get, f=f: f(v) for name, f in ANY.items()},
    **{f"jump: {name}": lambda v, get, f=f: f(v) for name, f in JUMPING.items()},
    **{
        f"pair: {name}": lambda v, get, f=f: f(v, v.roll(3, 1) * get(v.shape[1])) for name, f in PAIRS.items()
    },
    **{f"product: {name}": f for name, f in PRODUCTS.items()},
}
STOP = {f"stop: {name}": lambda v, get, f=f: f(v) for name, f in STOPPING.items()}


def group_cell(names: list[str]) -> type[ur.Cell]:
    """A cell whose state goes on through the operations, each on columns of its own."""

    def run(x: Tensor, old: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
        [h] = old
        width = len(names) * WIDTH
        v = linear(x, get(width, 3)) + get(width) * h
        parts = zip(names, v.chunk(len(names), -1), strict=True)
        values = [fit({**EVERY, **STOP}[name](part, get), WIDTH) for name, part in parts]
        return (0.5 * torch.tanh(torch.cat(values, -1)) + 0.3 * h,)

    return cell_of(run, 3, (len(names) * WIDTH,))


GROUPS = [list(EVERY)[k : k + GROUP] for k in range(0, len(EVERY), GROUP)] + [list(STOP)]


COMPUTING = ("activation", "function", "jump")  # what float32 has code of its own for
CASES = [
    *((number, torch.float64) for number in range(len(GROUPS))),
    *((number, torch.float32) for number, names in enumerate(GROUPS) if names[0].startswith(COMPUTING)),
]


def layer_of(number: int, dtype: torch.dtype) -> Any:
    """A layer of a group of operations."""
    names = GROUPS[number]
    return ur.Recurrent(group_cell(names), 3, len(names) * WIDTH, dtype=dtype)


@pytest.fixture(scope="module")
def layers() -> Iterator[dict[tuple[int, torch.dtype], Any]]:
    """A layer for each case, compiled."""
    with Batch() as batch:
        made = {case: layer_of(*case) for case in CASES}
        for (number, dtype), layer in made.items():
            for param in layer.parameters():
                torch.nn.init.normal_(param, 0, 0.4)
            batch.prepare(layer._first, dtype)
            if number % 6 == 5:
                batch.start()
        batch.finish()
        yield made


@pytest.mark.parametrize(
    ("number", "dtype"), CASES, ids=lambda k: f"{GROUPS[k][0]} …" if isinstance(k, int) else str(k)
)
def test_as_the_reference(layers: Any, number: int, dtype: torch.dtype) -> None:
    layer, names = layers[number, dtype], GROUPS[number]
    tolerance = TOLERANCE[dtype]
    if names == list(STOP):
        tolerance = max(tolerance, 1e-7)  # torch's backward of hardsigmoid takes 1/6 in float32
    x = torch.randn(4, 5, 3, dtype=dtype).requires_grad_()
    leaves = [x, *layer.parameters()]
    with ur.engine("reference"):
        weights = [torch.randn_like(value) for value in tensors(layer(x))]
        expected = with_gradients(list(tensors(layer(x))), weights, leaves)
    with ur.engine("native"):
        actual = with_gradients(list(tensors(layer(x))), weights, leaves)
        with torch.no_grad():
            inferred = layer(x)[0]
    assert torch.equal(inferred, actual[0])
    for part, name in enumerate(names):
        columns = slice(part * WIDTH, (part + 1) * WIDTH)
        for k, what in ((0, "output"), (3, "gradient of the input's weights"), (4, "of the recurrent ones")):
            rows = (..., columns) if what == "output" else columns
            assert_close(actual[k][rows], expected[k][rows], tolerance, f"{name}, {what}")
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("number", range(len(GROUPS) - 1), ids=lambda k: f"{GROUPS[k][0]} …")
def test_finite_differences(layers: Any, number: int) -> None:
    layer = layers[number, torch.float64]
    x = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    with ur.engine("native"):
        assert torch.autograd.gradcheck(
            lambda x, *_: tuple(tensors(layer(x))), (x, *layer.parameters()), fast_mode=True
        )

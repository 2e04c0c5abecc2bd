"""Each operation that a step may be written in, on the native engine: numbers, and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from batch import Batch
from kinds import TOLERANCE, assert_close, tensors
from vocabulary import ANY, JUMPING, PAIRS, PRODUCTS, STOPPING, fit

WIDTH, GROUP = 8, 12
EVERY: dict[str, Callable[..., Tensor]] = {
    **{name: lambda v, get, f=f: f(v) for name, f in ANY.items()},
    **{f"jump: {name}": lambda v, get, f=f: f(v) for name, f in JUMPING.items()},
    **{f"pair: {name}": lambda v, get, f=f: f(v, v.flip(1) * get(v.shape[1])) for name, f in PAIRS.items()},
    **{f"product: {name}": f for name, f in PRODUCTS.items()},
}
STOP = {f"stop: {name}": lambda v, get, f=f: f(v) for name, f in STOPPING.items()}


class Shapes:
    """Gives tensors of any shape, and remembers which."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, *shape: int) -> Tensor:
        self.shapes.append(shape)
        return torch.ones(shape)


def group_cell(names: list[str]) -> type[ur.Cell]:
    """A cell with a state for each operation, which goes from one step to the next through it."""
    seen = Shapes()
    counts = []
    for name in names:
        before = len(seen.shapes)
        {**EVERY, **STOP}[name](torch.ones(2, WIDTH), seen)
        counts.append(len(seen.shapes) - before)
    states = [f"s{k}" for k in range(len(names))]
    params = [f"p{k}" for k in range(len(seen.shapes))]

    def step(self: Any, x: Tensor, *old: Tensor) -> Any:
        given = iter([getattr(self, name) for name in params])
        new = []
        for k, name in enumerate(names):
            v = linear(x, self.inputs[k]) + linear(old[k], self.recurrent[k])
            value = fit({**EVERY, **STOP}[name](v, lambda *_: next(given)), WIDTH)
            new.append(0.5 * torch.tanh(value) + 0.3 * old[k])
        return tuple(new)

    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    step.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kinds) for name in ("self", "x", *states)]
    )
    return type(
        "Group",
        (ur.Cell,),
        {
            "state": tuple(states),
            "step": step,
            "inputs": ur.Param(len(names), "hidden", "input"),
            "recurrent": ur.Param(len(names), "hidden", "hidden"),
            **{name: ur.Param(*shape) for name, shape in zip(params, seen.shapes, strict=True)},
        },
    )


def results(layer: Any, x: Tensor, weights: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Every state after every step, and with weights every gradient."""
    output, final = layer(x)
    values = [output, *tensors(final)]
    if weights is None:
        return values, []
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    return values, list(torch.autograd.grad(loss, [x, *layer.parameters()]))


GROUPS = [list(EVERY)[k : k + GROUP] for k in range(0, len(EVERY), GROUP)] + [list(STOP)]


COMPUTING = ("activation", "function", "jump")  # what float32 has code of its own for
CASES = [
    *((number, torch.float64) for number in range(len(GROUPS))),
    *((number, torch.float32) for number, names in enumerate(GROUPS) if names[0].startswith(COMPUTING)),
]


@pytest.fixture(scope="module")
def layers() -> Iterator[dict[tuple[int, torch.dtype], Any]]:
    """A layer for each group of operations and dtype, compiled."""
    made = {}
    with Batch() as batch:
        for number, dtype in CASES:
            layer = made[number, dtype] = ur.Recurrent(group_cell(GROUPS[number]), 3, WIDTH, dtype=dtype)
            for param in layer.parameters():
                torch.nn.init.normal_(param, 0, 0.4)
            ur.engines.native.compiled(layer._first, dtype).prepare_training()
            batch.start()
        batch.finish()
        yield made


@pytest.mark.parametrize(
    ("number", "dtype"), CASES, ids=lambda k: f"{GROUPS[k][0]}, …" if isinstance(k, int) else str(k)
)
def test_as_the_reference(layers: Any, number: int, dtype: torch.dtype) -> None:
    layer = layers[number, dtype]
    tolerance = TOLERANCE[dtype]
    if GROUPS[number] == list(STOP):
        tolerance = max(tolerance, 1e-7)  # torch's backward of hardsigmoid takes 1/6 in float32
    x = torch.randn(4, 5, 3, dtype=dtype).requires_grad_()
    weights = [torch.randn_like(value) for value in results(layer, x)[0]]
    expected, expected_gradients = results(layer, x, weights)
    with ur.engine("native"):
        with torch.no_grad():
            assert_close(results(layer, x)[0], expected, tolerance)
        actual, gradients = results(layer, x, weights)
    assert_close(actual, expected, tolerance)
    assert_close(gradients, expected_gradients, tolerance)


@pytest.mark.parametrize("number", range(len(GROUPS) - 1), ids=lambda k: f"{GROUPS[k][0]} …")
def test_finite_differences(layers: Any, number: int) -> None:
    layer = layers[number, torch.float64]
    x = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_()
    with ur.engine("native"):
        assert torch.autograd.gradcheck(
            lambda x, *_: tuple(tensors(layer(x))), (x, *layer.parameters()), fast_mode=True
        )

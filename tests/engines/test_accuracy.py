"""Errors of the native engine in float32 relative to float64, compared with the errors of torch's own layers.

``pytest -s tests/engines/test_accuracy.py`` prints the table of ratios.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.layer_pairs import LAYERS, NEEDS_COMPILER, pair, tensors
from helpers.user_cell import MGU

pytestmark = NEEDS_COMPILER

# Upper bounds of our error / torch's, as geometric means. Single ratios are too noisy to be tested.
MAX_RATIO = 1.1  # for each quantity, over all sizes
MAX_OVERALL_RATIO = 1.0  # over all quantities

CUSTOM = {"mgu": MGU, "peephole": ur.cells.PeepholeLSTM, "normed": ur.cells.LayerNormLSTM}
SIZES = [  # input, hidden, time, batch
    (3, 5, 20, 4),
    (16, 32, 50, 3),
    (64, 128, 30, 8),
    (100, 200, 20, 2),
    (40, 64, 50, 1),
    (128, 256, 10, 16),
]


def results(layer: Any, x: Tensor, state: Any, weights: list[Tensor]) -> dict[str, list[Tensor]]:
    """Return the output, the final states and the gradients of the weighted sum of both."""
    x = x.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    output, final = layer(x, tuple(state) if len(state) > 1 else state[0])
    values = [output, *tensors(final)]
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=False))
    grad_x, *grads = torch.autograd.grad(loss, [x, *state, *layer.parameters()])
    return {
        "output": [output.detach()],
        "state": [value.detach() for value in values[1:]],
        "grad x": [grad_x],
        "grad state": grads[: len(state)],
        "grad params": grads[len(state) :],
    }


def relative_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Return the root mean square of the errors, each tensor's relative to its own root mean square."""
    squares = [
        float((a.double() - b).square().mean() / b.square().mean().clamp(min=1e-300))
        for a, b in zip(actual, truth, strict=True)
    ]
    return math.sqrt(sum(squares) / len(squares))


def errors(kind: str, sizes: tuple[int, int, int, int], seed: int) -> dict[str, tuple[float, float]]:
    """Return the error of the native engine and that of torch for each quantity."""
    inputs, hidden, time, batch = sizes
    torch.manual_seed(seed)
    if kind in CUSTOM:
        ours = ur.Recurrent(CUSTOM[kind], inputs, hidden)
        if kind == "normed":
            for gain in (ours.gain_ih_l0, ours.gain_hh_l0):
                # As in Cooijmans et al., 2016, section 4. With gains of 1 the step is chaotic: rounding
                # errors grow without bound, and the ratio is chance.
                torch.nn.init.normal_(gain, 0.1, 0.01)
        theirs: Any = ours
    else:
        ours, theirs = pair(kind, inputs, hidden)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(time, batch, inputs)
    state = [torch.randn(1, batch, size) for size in ours._first.state_sizes().values()]
    weights = [torch.randn(time, batch, state[0].shape[-1]), *(torch.randn_like(part) for part in state)]
    doubled = [[part.double() for part in parts] for parts in (state, weights)]
    with ur.engine("reference"):
        truth = results(exact, x.double(), *doubled)
        expected = results(theirs, x, state, weights)
    with ur.engine("native"):
        actual = results(ours, x, state, weights)
    return {
        name: (relative_error(actual[name], truth[name]), relative_error(expected[name], truth[name]))
        for name in truth
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [*LAYERS, "mgu", "peephole", pytest.param("normed", marks=pytest.mark.exhaustive)]
)
def test_at_least_as_accurate_as_torch(kind: str) -> None:
    ratios: dict[str, list[float]] = {}
    print(f"\n{kind}: our float32 error / that of torch, both relative to float64")
    for sizes in SIZES:
        draws = [errors(kind, sizes, seed) for seed in range(3)]
        columns = []
        for name in draws[0]:
            ours, theirs = (math.sqrt(sum(draw[name][k] ** 2 for draw in draws) / 3) for k in (0, 1))
            ratio = ours / max(theirs, 1e-9)
            ratios.setdefault(name, []).append(ratio)
            columns.append(f"{name} {ours:.1e} / {theirs:.1e} = {ratio:.2f}")
        print("  {}×{}×{}×{}: ".format(sizes[2], sizes[3], *sizes[:2]) + ", ".join(columns))
    means = {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in ratios.items()}
    overall = math.exp(sum(map(math.log, means.values())) / len(means))
    print(f"  geometric means {', '.join(f'{k} {v:.2f}' for k, v in means.items())}; overall {overall:.2f}")
    assert max(means.values()) <= MAX_RATIO
    assert overall <= MAX_OVERALL_RATIO

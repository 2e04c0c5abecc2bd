"""How far from float64 the native engine is in float32, beside torch's own layers on the same numbers.

The table of ratios is printed: ``pytest -s tests/engines/test_accuracy.py``.
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

WORST = 1.1  # of any quantity, over all sizes: a single one of three numbers is chance
OVERALL = 1.0  # of all quantities


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
    """Outputs, final states and gradients, by kind."""
    x = x.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    output, final = layer(x, tuple(state) if len(state) > 1 else state[0])
    made = [output, *tensors(final)]
    loss = sum((value * weight).sum() for value, weight in zip(made, weights, strict=False))
    grad_x, *grads = torch.autograd.grad(loss, [x, *state, *layer.parameters()])
    return {
        "output": [output.detach()],
        "state": [value.detach() for value in made[1:]],
        "grad x": [grad_x],
        "grad state": grads[: len(state)],
        "grad params": grads[len(state) :],
    }


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The root of the mean square of all errors, each tensor's against its own size."""
    squares = [
        float((a.double() - b).square().mean() / b.square().mean().clamp(min=1e-300))
        for a, b in zip(found, truth, strict=True)
    ]
    return math.sqrt(sum(squares) / len(squares))


def errors(kind: str, sizes: tuple[int, int, int, int], draw: int) -> dict[str, tuple[float, float]]:
    """For each quantity the error of the native engine, and torch's."""
    inputs, hidden, time, batch = sizes
    torch.manual_seed(draw)
    if kind in CUSTOM:
        ours = ur.Recurrent(CUSTOM[kind], inputs, hidden)
        if kind == "normed":
            for gain in (ours.gain_ih_l0, ours.gain_hh_l0):
                torch.nn.init.normal_(gain, 0.1, 0.01)  # as of Cooijmans et al., 2016, section 4;
            # with 1 the step is chaotic: rounding errors of both grow without bound, and the ratio is luck
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
        torchs = results(theirs, x, state, weights)
    with ur.engine("native"):
        found = results(ours, x, state, weights)
    return {name: (error(found[name], truth[name]), error(torchs[name], truth[name])) for name in truth}


@pytest.mark.parametrize(
    "kind", [*LAYERS, "mgu", "peephole", pytest.param("normed", marks=pytest.mark.exhaustive)]
)
def test_no_less_exact_than_torch(kind: str) -> None:
    ratios: dict[str, list[float]] = {}
    print(f"\n{kind}: error of ours / of torch's float32, each relative to float64")
    for sizes in SIZES:
        drawn = [errors(kind, sizes, draw) for draw in range(3)]
        line = []
        for name in drawn[0]:
            ours, theirs = (math.sqrt(sum(d[name][k] ** 2 for d in drawn) / 3) for k in (0, 1))
            ratio = ours / max(theirs, 1e-9)
            ratios.setdefault(name, []).append(ratio)
            line.append(f"{name} {ours:.1e} / {theirs:.1e} = {ratio:.2f}")
        print("  {}×{}×{}×{}: ".format(sizes[2], sizes[3], *sizes[:2]) + ", ".join(line))
    means = {name: math.exp(sum(map(math.log, found)) / len(found)) for name, found in ratios.items()}
    overall = math.exp(sum(map(math.log, means.values())) / len(means))
    print(f"  geometric means {', '.join(f'{k} {v:.2f}' for k, v in means.items())}; of all {overall:.2f}")
    assert max(means.values()) <= WORST
    assert overall <= OVERALL

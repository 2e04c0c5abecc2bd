"""Times of calls inside torch's transforms, and of what may be asked for, beside the plain ones.

Medians of calls taken in turn, in ms.

python benchmarks/transforms.py
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call, grad, vmap

import unrolled as ur

ROUNDS = 15


def in_turn(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of each call in ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in times.items()}


def per_sample(layer: Any, x: Tensor) -> dict[str, float]:
    """Gradients of every sample: in one call, in a loop over samples, and summed over all of them."""
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()

    samples = [x[:, k : k + 1].contiguous() for k in range(x.shape[1])]
    one, each = grad(loss), vmap(grad(loss), (None, 1))
    summed = list(layer.parameters())
    found = each(parameters, x.unsqueeze(2))
    for k, sample in enumerate(samples):
        for name, value in one(parameters, sample).items():
            torch.testing.assert_close(found[name][k], value, rtol=1e-4, atol=1e-5)
    return in_turn(
        {
            "in one call": lambda: each(parameters, x.unsqueeze(2)),
            "in a loop": lambda: [one(parameters, sample) for sample in samples],
            "summed": lambda: torch.autograd.grad(layer(x)[0].square().sum(), summed),
        }
    )


def compiled(layer: Any, x: Tensor) -> dict[str, float]:
    """Training and inference, plain and compiled."""
    torch._dynamo.reset()
    begun = time.perf_counter()
    fast = torch.compile(layer, fullgraph=True, dynamic=True)
    fast(x)[0].sum().backward()
    first = time.perf_counter() - begun
    assert torch.equal(fast(x)[0], layer(x)[0])

    def train(module: Any) -> None:
        module(x)[0].sum().backward()
        layer.zero_grad()

    @torch.no_grad()
    def infer(module: Any) -> None:
        module(x)

    found = in_turn(
        {
            "inference": lambda: infer(layer),
            "compiled": lambda: infer(fast),
            "training": lambda: train(layer),
            "compiled training": lambda: train(fast),
        }
    )
    return {**found, "first use, s": first}


def asked(layer: Any, x: Tensor, training: bool) -> dict[str, float]:
    """A plain call, one with resets, one in which half of the steps count, and one that gives every state."""
    steps, batch, _ = x.shape
    resets = torch.rand(steps, batch) < 0.05
    half = torch.arange(batch) % 2 * steps // 2 + steps // 4  # a quarter of the steps, or three

    every = {
        "resets": {"resets": resets},
        "half of the steps": {"lengths": half},
        "every state": {"all_states": True},
    }
    for how in ({}, *every.values()):
        with torch.no_grad():
            found = layer(x, **how)[0]
            with ur.engine("reference"):
                torch.testing.assert_close(found, layer(x, **how)[0], rtol=1e-4, atol=1e-5)

    def run(**how: Any) -> None:
        if not training:
            with torch.no_grad():
                layer(x, **how)
            return
        layer.zero_grad()
        layer(x, **how)[0].sum().backward()

    return in_turn({"plain": run, **{name: functools.partial(run, **how) for name, how in every.items()}})


def main() -> None:
    """Print the tables."""
    console = Console()
    rows = {
        "gradients of samples": {
            f"{kind.__name__} {batch}×{steps}×{hidden}": per_sample(
                kind(hidden, hidden), torch.randn(steps, batch, hidden)
            )
            for kind in (ur.RNN, ur.GRU, ur.LSTM)
            for batch, steps, hidden in ((32, 50, 64), (64, 20, 128))
        },
        "what is asked for": {
            f"{kind.__name__} {batch}×{steps}×{hidden}, {'training' if training else 'inference'}": asked(
                kind(hidden, hidden), torch.randn(steps, batch, hidden), training
            )
            for kind in (ur.RNN, ur.GRU, ur.LSTM)
            for batch, steps, hidden in ((32, 100, 128), (64, 100, 512))
            for training in (False, True)
        },
        "torch.compile": {
            f"{what} {batch}×{steps}×{hidden}": compiled(layer, torch.randn(steps, batch, hidden))
            for what, layer, batch, steps, hidden in (
                ("LSTM", ur.LSTM(128, 128), 1, 1, 128),
                ("LSTM", ur.LSTM(128, 128), 8, 100, 128),
                ("LSTM, 6 layers,", ur.LSTM(256, 256, 6), 8, 64, 256),
            )
        },
    }
    for title, found in rows.items():
        table = Table("", *next(iter(found.values())), title=title)
        for name, times in found.items():
            table.add_row(name, *(f"{value:.3g}" for value in times.values()))
        console.print(table)


if __name__ == "__main__":
    main()

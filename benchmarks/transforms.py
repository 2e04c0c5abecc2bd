"""Time calls inside torch's transforms, and calls with per-call options, against plain calls.

The times are medians in ms of calls timed in turn.

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


def median_times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median time of each call in ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def time_per_sample_gradients(layer: Any, x: Tensor) -> dict[str, float]:
    """Time per-sample gradients in one call and in a loop over samples, and the summed gradient."""
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()

    samples = [x[:, k : k + 1].contiguous() for k in range(x.shape[1])]
    gradient, per_sample = grad(loss), vmap(grad(loss), (None, 1))
    leaves = list(layer.parameters())
    gradients = per_sample(parameters, x.unsqueeze(2))
    for k, sample in enumerate(samples):
        for name, value in gradient(parameters, sample).items():
            torch.testing.assert_close(gradients[name][k], value, rtol=1e-4, atol=1e-5)
    return median_times(
        {
            "in one call": lambda: per_sample(parameters, x.unsqueeze(2)),
            "in a loop": lambda: [gradient(parameters, sample) for sample in samples],
            "summed": lambda: torch.autograd.grad(layer(x)[0].square().sum(), leaves),
        }
    )


def time_compiled(layer: Any, x: Tensor) -> dict[str, float]:
    """Time training and inference, with and without torch.compile."""
    torch._dynamo.reset()
    start = time.perf_counter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    compiled(x)[0].sum().backward()
    first = time.perf_counter() - start
    assert torch.equal(compiled(x)[0], layer(x)[0])

    def train(module: Any) -> None:
        module(x)[0].sum().backward()
        layer.zero_grad()

    @torch.no_grad()
    def infer(module: Any) -> None:
        module(x)

    times = median_times(
        {
            "inference": lambda: infer(layer),
            "compiled": lambda: infer(compiled),
            "training": lambda: train(layer),
            "compiled training": lambda: train(compiled),
        }
    )
    return {**times, "first use, s": first}


def time_call_options(layer: Any, x: Tensor, training: bool) -> dict[str, float]:
    """Time a plain call, and calls with resets, with lengths of half of the steps, and with all states."""
    steps, batch, _ = x.shape
    resets = torch.rand(steps, batch) < 0.05
    half = torch.arange(batch) % 2 * steps // 2 + steps // 4  # alternately 1/4 and 3/4 of the steps

    options = {
        "resets": {"resets": resets},
        "half of the steps": {"lengths": half},
        "all states": {"all_states": True},
    }
    for kwargs in ({}, *options.values()):
        with torch.no_grad():
            output = layer(x, **kwargs)[0]
            with ur.engine("reference"):
                torch.testing.assert_close(output, layer(x, **kwargs)[0], rtol=1e-4, atol=1e-5)

    def run(**kwargs: Any) -> None:
        if not training:
            with torch.no_grad():
                layer(x, **kwargs)
            return
        layer.zero_grad()
        layer(x, **kwargs)[0].sum().backward()

    return median_times(
        {"plain": run, **{name: functools.partial(run, **kwargs) for name, kwargs in options.items()}}
    )


def main() -> None:
    """Print the tables."""
    console = Console()
    rows = {
        "per-sample gradients": {
            f"{layer_class.__name__} {batch}×{steps}×{hidden}": time_per_sample_gradients(
                layer_class(hidden, hidden), torch.randn(steps, batch, hidden)
            )
            for layer_class in (ur.RNN, ur.GRU, ur.LSTM)
            for batch, steps, hidden in ((32, 50, 64), (64, 20, 128))
        },
        "call options": {
            f"{layer_class.__name__} {batch}×{steps}×{hidden}, {'training' if training else 'inference'}": (
                time_call_options(layer_class(hidden, hidden), torch.randn(steps, batch, hidden), training)
            )
            for layer_class in (ur.RNN, ur.GRU, ur.LSTM)
            for batch, steps, hidden in ((32, 100, 128), (64, 100, 512))
            for training in (False, True)
        },
        "torch.compile": {
            f"{name} {batch}×{steps}×{hidden}": time_compiled(layer, torch.randn(steps, batch, hidden))
            for name, layer, batch, steps, hidden in (
                ("LSTM", ur.LSTM(128, 128), 1, 1, 128),
                ("LSTM", ur.LSTM(128, 128), 8, 100, 128),
                ("LSTM, 6 layers,", ur.LSTM(256, 256, 6), 8, 64, 256),
            )
        },
    }
    for title, cases in rows.items():
        table = Table("", *next(iter(cases.values())), title=title)
        for name, times in cases.items():
            table.add_row(name, *(f"{value:.3g}" for value in times.values()))
        console.print(table)


if __name__ == "__main__":
    main()

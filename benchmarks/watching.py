"""Measure the cost of unrolled.watch at its default rate: time training steps with and without it, in turn.

Each round has a block of training steps without a watch, and one with a watch that starts with the block. The
times are medians over the rounds.

python benchmarks/watching.py [--rounds 7] [--steps 500] [--only unrolled]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import unrolled as ur

CASES: dict[str, tuple[Any, int, int, int, int]] = {  # layer class, batch, time, input, hidden
    "torch.nn.LSTM 32×100×64×128": (nn.LSTM, 32, 100, 64, 128),
    "unrolled.LSTM 32×100×64×128": (ur.LSTM, 32, 100, 64, 128),
    "torch.nn.GRU 32×100×64×128": (nn.GRU, 32, 100, 64, 128),
    "unrolled.GRU 32×100×64×128": (ur.GRU, 32, 100, 64, 128),
    "torch.nn.LSTM 8×50×16×32": (nn.LSTM, 8, 50, 16, 32),
    "unrolled.LSTM 8×50×16×32": (ur.LSTM, 8, 50, 16, 32),
}


class Model(nn.Module):
    """A recurrent layer and a linear head."""

    def __init__(self, layer_class: Any, features: int, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = layer_class(features, hidden), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the head at every step."""
        output: torch.Tensor = self.head(self.layer(x)[0])
        return output


def train(model: Model, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> float:
    """Train for some steps on the same batch; return the seconds per step."""
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x.mean(-1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    options = parser.parse_args()
    table = Table(
        "model", "ms per step without", "with", "slower by", "time in watch", "samples per block", "at most"
    )
    for name, (layer_class, batch, length, features, hidden) in CASES.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        model, x = Model(layer_class, features, hidden), torch.randn(length, batch, features)
        optimizer = torch.optim.Adam(model.parameters())
        with ur.watch(model, every=1):  # import and compile before timing
            train(model, optimizer, x, 5)
        without, watched, watch_shares, samples = [], [], [], []
        for _ in range(options.rounds):
            without.append(train(model, optimizer, x, options.steps))
            with ur.watch(model) as watch:
                watched.append(train(model, optimizer, x, options.steps))
            watch_shares.append(watch.seconds / (watched[-1] * options.steps))
            samples.append(len({record["call"] for record in watch.records}))
        ratio = statistics.median(b / a for a, b in zip(without, watched, strict=True))
        table.add_row(
            name,
            f"{1e3 * statistics.median(without):.2f}",
            f"{1e3 * statistics.median(watched):.2f}",
            f"{100 * (ratio - 1):+.1f} %",
            f"{100 * statistics.median(watch_shares):.1f} %",
            f"{statistics.median(samples):g}",
            f"{options.steps // 100}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

"""What unrolled.watch costs at its default rate: training steps with and without it, in turn.

Blocks of training steps, one without and one with a watch that begins with the block; medians over rounds.

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

CASES: dict[str, tuple[Any, int, int, int, int]] = {  # the layer; batch, time, input, hidden
    "torch.nn.LSTM 32×100×64×128": (nn.LSTM, 32, 100, 64, 128),
    "unrolled.LSTM 32×100×64×128": (ur.LSTM, 32, 100, 64, 128),
    "torch.nn.GRU 32×100×64×128": (nn.GRU, 32, 100, 64, 128),
    "unrolled.GRU 32×100×64×128": (ur.GRU, 32, 100, 64, 128),
    "torch.nn.LSTM 8×50×16×32": (nn.LSTM, 8, 50, 16, 32),
    "unrolled.LSTM 8×50×16×32": (ur.LSTM, 8, 50, 16, 32),
}


class Model(nn.Module):
    """A recurrent layer and a linear head."""

    def __init__(self, kind: Any, features: int, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = kind(features, hidden), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the head at every step."""
        output: torch.Tensor = self.head(self.layer(x)[0])
        return output


def train(model: Model, optimiser: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> float:
    """Some steps on the same batch; seconds a step."""
    begun = time.perf_counter()
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - x.mean(-1, keepdim=True)).square().mean().backward()
        optimiser.step()
    return (time.perf_counter() - begun) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args()
    table = Table(
        "model", "ms a step without", "with", "slower by", "of it looking", "looks a block", "at most"
    )
    for name, (kind, batch, length, features, hidden) in CASES.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        model, x = Model(kind, features, hidden), torch.randn(length, batch, features)
        optimiser = torch.optim.Adam(model.parameters())
        with ur.watch(model, every=1):  # what is imported and compiled at the first step isn't counted
            train(model, optimiser, x, 5)
        without, watched, looking, looks = [], [], [], []
        for _ in range(options.rounds):
            without.append(train(model, optimiser, x, options.steps))
            with ur.watch(model) as watch:
                watched.append(train(model, optimiser, x, options.steps))
            looking.append(watch.seconds / (watched[-1] * options.steps))
            looks.append(len({record["call"] for record in watch.records}))
        ratio = statistics.median(b / a for a, b in zip(without, watched, strict=True))
        table.add_row(
            name,
            f"{1e3 * statistics.median(without):.2f}",
            f"{1e3 * statistics.median(watched):.2f}",
            f"{100 * (ratio - 1):+.1f} %",
            f"{100 * statistics.median(looking):.1f} %",
            f"{statistics.median(looks):g}",
            f"{options.steps // 100}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

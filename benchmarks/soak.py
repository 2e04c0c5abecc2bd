"""Run a service's mix of calls for ten minutes, and check that its memory doesn't grow.

Each round takes a random layer of random size, and calls it with inputs of random lengths and batch sizes:
as it is, with ``lengths``, packed, frozen, as a stream, in training and recorded. The outputs of short inputs
are compared with the reference engine. After the first minute, the memory may grow by less than 20 MB.

python benchmarks/soak.py [--minutes 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur

LIMIT = 20.0  # MB
STATUS = Path("/proc/self/status")
CELLS = [ur.cells.MGU, ur.cells.LiGRU, ur.cells.SRU, ur.cells.PeepholeLSTM, ur.cells.IndRNN]
LAYERS: list[Callable[..., ur.Recurrent]] = [
    *(ur.RNN, ur.LSTM, ur.GRU),
    *(functools.partial(ur.Recurrent, cell) for cell in CELLS),
]


class Model(nn.Module):
    """A layer between two linear ones."""

    def __init__(self, layer: ur.Recurrent) -> None:
        super().__init__()
        self.encoder = nn.Linear(layer.input_size, layer.input_size)
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.layer(self.encoder(x))[0])


def resident_memory() -> float:
    """Return the resident memory of this process in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def random_input(layer: ur.Recurrent) -> Tensor:
    """Return an input (time, batch, features) of a random length and batch size."""
    return torch.randn(random.randint(1, 400), random.randint(1, 12), layer.input_size)


def run_plain(layer: ur.Recurrent) -> int:
    """Call a layer, and compare the output with the reference engine for short inputs."""
    with torch.no_grad():
        x = random_input(layer)
        output = layer(x)[0]
        if len(x) < 20:
            with ur.engine("reference"):
                torch.testing.assert_close(output, layer(x)[0], atol=1e-4, rtol=1e-4)
    return 1


def run_lengths(layer: ur.Recurrent) -> int:
    """Call a layer with rows of different lengths, padded and packed."""
    x = random_input(layer)
    lengths = [random.randint(1, len(x)) for _ in range(x.shape[1])]
    with torch.no_grad():
        layer(x, lengths=lengths)
        layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    return 2


def run_frozen(layer: ur.Recurrent) -> int:
    """Call a frozen layer with many lengths."""
    with torch.no_grad(), ur.frozen(layer):
        for _ in range(20):
            layer(random_input(layer))
    return 20


def run_stream(layer: ur.Recurrent) -> int:
    """Call a stream over a model with chunks of many lengths."""
    stream, batch = ur.Stream(Model(layer)), random.randint(1, 12)
    for _ in range(20):
        stream(torch.randn(random.randint(1, 400), batch, layer.input_size))
    return 20


def run_training(layer: ur.Recurrent) -> int:
    """Take a training step."""
    model = Model(layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(random_input(layer)).square().mean().backward()
    optimizer.step()
    return 1


def run_record(layer: ur.Recurrent) -> int:
    """Record the steps of a short call."""
    model = Model(layer)
    with torch.no_grad(), ur.record(model):
        model(torch.randn(random.randint(1, 8), 2, layer.input_size))
    return 1


ACTIONS = [run_plain, run_lengths, run_frozen, run_stream, run_training, run_record]


def main() -> None:
    """Run for the given time, and print the memory every half minute."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    # Two layers stay, as in a service: their caches would show growth. The others are new in each round.
    kept = [ur.LSTM(24, 48), ur.GRU(16, 32, num_layers=2)]
    started, reported, calls, after_a_minute = time.monotonic(), 0, 0, 0.0
    while (minutes := (time.monotonic() - started) / 60) < args.minutes:
        kind = random.choice(LAYERS)
        new = kind(random.randint(1, 48), random.randint(1, 64), num_layers=random.randint(1, 2))
        calls += random.choice(ACTIONS)(random.choice([*kept, new]))
        if minutes >= 1 and not after_a_minute:
            after_a_minute = resident_memory()
        if int(2 * minutes) > reported:
            reported = int(2 * minutes)
            print(f"{reported / 2:4.1f} min: {calls:7d} calls, {resident_memory():7.1f} MB", flush=True)
    growth = resident_memory() - after_a_minute
    print(f"{calls} calls; the memory grew by {growth:.1f} MB after the first minute (limit: {LIMIT:.0f} MB)")
    sys.exit(growth >= LIMIT)


if __name__ == "__main__":
    main()

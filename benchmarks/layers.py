"""Our layers beside torch.nn's on this machine: checked against each other, then timed in turn.

Run it alone on the machine. Every figure is a ratio of medians within one run, the two layers
taking turns; above 1 ours is faster. ``--engine`` chooses our engine: reference or native.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import unrolled as ur
from unrolled.drop_in import LAYERS

SHAPES = [(1, 100, 16, 32), (1, 100, 256, 256), (32, 100, 256, 256)]  # batch, time, input, hidden


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row and mode")
    parser.add_argument("--engine", choices=("native", "reference"), default="native")
    given = parser.parse_args()
    seconds = given.seconds
    ur.engine(given.engine)
    title = f"ours ({given.engine} engine) against torch.nn {torch.__version__}"
    table = Table(title=f"{title}, {torch.get_num_threads()} threads")
    for heading in ("layer", "batch", "time", "input", "hidden", "inference", "training", "difference"):
        table.add_column(heading, justify="right")
    rows = [(layer, *shape) for layer in LAYERS for shape in SHAPES]
    for layer, batch, steps, size, hidden in track(rows, "timing", console=Console(stderr=True)):
        theirs: nn.Module = getattr(nn, layer.__name__)(size, hidden)
        ours = layer(size, hidden)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(steps, batch, size)
        difference = _difference(ours, theirs, x)
        ratios = [_ratio(run, ours, theirs, x, seconds) for run in (_infer, _train)]
        name = layer.__name__
        table.add_row(
            name, *map(str, (batch, steps, size, hidden)), *(f"{r:.2f}" for r in ratios), f"{difference:.0e}"
        )
    Console().print(table)


def _difference(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((ours(x)[0] - theirs(x)[0]).abs().max())


def _infer(layer: nn.Module, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return layer(x)


def _train(layer: nn.Module, x: torch.Tensor) -> Any:
    layer(x)[0].sum().backward()


def _ratio(
    run: Callable[[nn.Module, torch.Tensor], Any],
    ours: nn.Module,
    theirs: nn.Module,
    x: torch.Tensor,
    seconds: float,
) -> float:
    """The median time of theirs over the median time of ours."""
    times: dict[nn.Module, list[float]] = {ours: [], theirs: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[ours]) < 6:
        for layer in times:
            start = time.perf_counter()
            run(layer, x)
            times[layer].append(time.perf_counter() - start)
    return statistics.median(times[theirs][1:]) / statistics.median(times[ours][1:])


if __name__ == "__main__":
    main()

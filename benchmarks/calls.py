"""Compare single calls with torch.nn: cells, and layers on one time step, in inference and training.

Both modules have the same weights. They are timed in turn in this process, in blocks of a few milliseconds.
The figures are medians of the blocks, in microseconds, and the ratio of the medians: above 1, ours is faster.
Training is the forward pass, the backward pass from a gradient of the new hidden state to the parameters, and
setting their gradients to None. Results are compared before they are timed. Run it on an otherwise idle
machine: another process changes the ratios, above all with more than one thread.

python benchmarks/calls.py [--modules LSTMCell,GRU] [--hidden 16,128] [--batch 1,8] [--mode inference]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import unrolled as ur
from unrolled.engines.errors import UnavailableError
from unrolled.engines.native.toolchain import build, cpp_files, cpu

MODULES = "RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "LSTM"
HIDDEN = 16, 32, 64, 128, 256, 512, 1024
BATCH = 1, 8, 64, 256
MODES = "inference", "training"

Call = Callable[[], Any]


def first(result: Any) -> Tensor:
    """Return the hidden state or output of a result."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def new_pair(name: str, hidden: int, batch: int, mode: str) -> dict[str, Call]:
    """Return a call of torch.nn's module and a call of ours, after a comparison of their results."""
    theirs, ours = getattr(nn, name)(hidden, hidden), getattr(ur, name)(hidden, hidden)
    ours.load_state_dict(theirs.state_dict())
    shape = (batch, hidden) if name.endswith("Cell") else (1, batch, hidden)
    x, h, grad = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    state = (h, torch.randn(shape)) if name.startswith("LSTM") else h

    def new_call(module: nn.Module) -> Call:
        parameters = list(module.parameters())

        def train() -> None:
            first(module(x, state)).backward(grad)
            for parameter in parameters:
                parameter.grad = None

        return train if mode == "training" else lambda: module(x, state)

    for _ in range(3):  # the last one has a plan
        result, expected = first(ours(x, state)), first(theirs(x, state))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        if mode == "training":
            result, expected = (
                torch.autograd.grad(tensor, list(module.parameters()), grad)
                for tensor, module in ((result, ours), (expected, theirs))
            )
            for ours_grad, theirs_grad in zip(result, expected, strict=True):
                torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-3, atol=1e-3)
    return {"torch.nn": new_call(theirs), "ours": new_call(ours)}


def medians(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Return the median time of each call in microseconds; the calls are timed in turn."""
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        for _ in range(10):
            call()
        began = time.perf_counter()
        for _ in range(10):
            call()
        counts[name] = max(1, int(0.003 / ((time.perf_counter() - began) / 10)))
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(blocks["ours"]) < 5:
            for name, call in calls.items():
                began = time.perf_counter()
                for _ in range(counts[name]):
                    call()
                blocks[name].append((time.perf_counter() - began) / counts[name] * 1e6)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in blocks.items()}


def rows(options: argparse.Namespace) -> Iterator[tuple[str, int, int, str, dict[str, float]]]:
    """Yield the module, sizes, mode and times of each row of the table."""
    for name in options.modules:
        for mode in options.mode:
            for hidden in options.hidden:
                for batch in options.batch:
                    with torch.set_grad_enabled(mode == "training"):
                        calls = new_pair(name, hidden, batch, mode)
                        times = medians(calls, options.seconds)
                    yield name, hidden, batch, mode, times


def main() -> None:
    """Print the table, and the lowest ratio and the mean of each module and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=lambda text: text.split(","), default=MODULES)
    for name, default in (("hidden", HIDDEN), ("batch", BATCH)):
        parser.add_argument(f"--{name}", type=lambda text: [*map(int, text.split(","))], default=default)
    parser.add_argument("--mode", type=lambda text: text.split(","), default=MODES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="for each row")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    with contextlib.suppress(UnavailableError):
        build.load(cpp_files.read("call_plan.cpp"))  # which is otherwise compiled in the background
    table = Table(title=f"{cpu.name()}, torch {torch.__version__}, {options.threads} threads, µs per call")
    for column in ("module", "mode", "batch × hidden", "torch.nn", "ours", "ratio"):
        table.add_column(column, justify="right" if column in ("torch.nn", "ours", "ratio") else "left")
    ratios: dict[tuple[str, str], list[float]] = {}
    for name, hidden, batch, mode, times in rows(options):
        ratio = times["torch.nn"] / times["ours"]
        ratios.setdefault((name, mode), []).append(ratio)
        figures = f"{times['torch.nn']:.1f}", f"{times['ours']:.1f}", f"{ratio:.2f}"
        table.add_row(name, mode, f"{batch} × {hidden}", *figures)
    summary = Table(title="Ratios")
    for column in ("module", "mode", "lowest", "mean"):
        summary.add_column(column)
    for (name, mode), values in ratios.items():
        summary.add_row(name, mode, f"{min(values):.2f}", f"{statistics.fmean(values):.2f}")
    console = Console(width=110)
    console.print(table)
    console.print(summary)


if __name__ == "__main__":
    main()

"""Every published cell beside our LSTM: the time of a step, and what its operations predict.

A step's operations are the multiplications and additions of its matrix products, and those of its other
functions, each weighted by about as many as the loop spends on it. At the LSTM's rate they predict the time.
Each result is checked against the reference engine in float64 before it is timed; a cell is timed in turn
with the LSTM, medians of calls.

python benchmarks/cells.py [--batch 32] [--hidden 128] [--time 100] [--mode inference] [--cells RNN,GRU]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import unrolled as ur
from unrolled.bench.timing import interleave
from unrolled.bench.work import difference
from unrolled.engines import native
from unrolled.engines.native.program import per_row

COSTS = {  # multiplications and additions for a number; 1 where nothing is said
    "div": 4, "sqrt": 4, "rsqrt": 4, "exp": 12, "log": 14, "log1p": 16, "sigmoid": 16, "tanh": 16, "sin": 20,
    "cos": 20, "expand": 0, "clone": 0, "slice": 0, "cat": 0, "permute": 0, "view": 0, "full": 0,
}  # fmt: skip
AGREE = 1e-4  # largest difference of float32 from float64, of the largest magnitude


def operations(layer: ur.Recurrent) -> int:
    """Those of a step of one row, forward."""
    graph = native.compiled(layer._first, torch.float32).captured
    needed, waiting = set(), list(graph.new_states)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    found = 0
    for node in needed:
        if node.op == "call_function" and per_row(node):
            width = node.meta["val"].shape[-1]
            name = node.target.__name__.split(".")[0].lstrip("_")
            if name == "mm":
                found += 2 * width * node.args[0].meta["val"].shape[-1]
            else:
                found += width * COSTS.get(name, 1)
    return found


def work(layer: ur.Recurrent, x: Tensor, mode: str) -> Callable[[], Sequence[Tensor]]:
    """A call of a layer, of inference or of training."""
    if mode == "training":
        leaves = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x)[0].sum(), leaves, allow_unused=True)

    def infer() -> Sequence[Tensor]:
        with torch.no_grad():
            return [layer(x)[0]]

    return infer


def checked(layer: ur.Recurrent, x: Tensor, mode: str) -> float:
    """The largest difference from the reference engine in float64."""
    twin = copy.deepcopy(layer).double()
    with ur.engine("reference"):
        exact = work(twin, x.detach().double().requires_grad_(x.requires_grad), mode)()
    with ur.engine("native"):
        found = work(layer, x, mode)()
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a is not None and b is not None]
    return difference([a for a, _ in pairs], [b for _, b in pairs])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--time", type=int, default=100)
    parser.add_argument("--mode", choices=("inference", "training"), default="inference")
    parser.add_argument("--cells", default="", help="names, separated by commas; all of them")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    options = parser.parse_args()
    torch.manual_seed(0)
    size = options.hidden
    x = torch.randn(options.time, options.batch, size, requires_grad=options.mode == "training")
    lstm = ur.LSTM(size, size)
    known = operations(lstm)
    table = Table(title=f"{options.batch}×{options.time}×{size}×{size}, {options.mode}, float32")
    for column in (
        "cell",
        "µs a step",
        "of the LSTM's",
        "operations",
        "of the LSTM's",
        "time / predicted",
        "from float64",
    ):
        table.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
    for name in filter(None, options.cells.split(",")) if options.cells else ur.cells.__all__:
        layer = ur.Recurrent(getattr(ur.cells, name), size, size)
        apart = checked(layer, x, options.mode)
        if not apart <= AGREE * (10 if options.mode == "training" else 1):
            table.add_row(name, f"not timed: {apart:.1e} from float64")
            continue
        with ur.engine("native"):
            calls = {"ours": work(layer, x, options.mode), "lstm": work(lstm, x, options.mode)}
            found = interleave(calls, options.seconds)
        ratio = found["ours"].seconds / found["lstm"].seconds
        share = operations(layer) / known
        micro = found["ours"].seconds / options.time * 1e6
        table.add_row(
            name,
            f"{micro:.1f}",
            f"{ratio:.2f}",
            str(operations(layer)),
            f"{share:.2f}",
            f"{ratio / share:.2f}",
            f"{apart:.0e}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

"""Compare every published cell with our LSTM: the time per step, and the time predicted from its operations.

The operations of a step are the fused multiply-adds of its matrix products plus the cost of other functions:
1 for a sum, about 16 for a sigmoid. The predicted time assumes the LSTM's rate. Before it is timed, each
result is checked against the reference engine in float64. It must be within 1e-4 (training: 1e-3) of the
largest magnitude, or within three times the float32 error of the reference engine, because some recurrences
amplify rounding errors. Each cell is timed in turn with the LSTM; the times are medians of calls. `--keep`
writes the ratios for the documentation's table of cells to benchmarks/cells.json.

python benchmarks/cells.py [--batch 32] [--hidden 128] [--time 100] [--mode training] [--cells RNN] [--keep]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import unrolled as ur
from unrolled.cli.bench.timing import interleave
from unrolled.cli.bench.workload import max_difference
from unrolled.engines import registry
from unrolled.engines.compiler.ir import BATCH_SYMBOL, ancestors, is_batched

COSTS = {  # operations per element; 1 by default
    "div": 4, "sqrt": 4, "rsqrt": 4, "exp": 12, "log": 14, "log1p": 16, "sigmoid": 16, "tanh": 16, "sin": 20,
    "cos": 20, "expand": 0, "clone": 0, "slice": 0, "cat": 0, "permute": 0, "view": 0, "full": 0,
}  # fmt: skip
RESULTS = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-4  # for float32 against float64, relative to the largest magnitude


def count_operations(layer: ur.Recurrent, mode: str) -> int:
    """Count the operations of a step for one sequence: forward, and in training also backward."""
    graph = registry.compiled(layer._first, torch.float32).captured
    outputs = list(graph.new_states)
    if mode == "training":
        gradients = (*graph.grad_params, graph.grad_x, *graph.grad_states)
        outputs += [node for node in gradients if node is not None]
    operations = 0
    for node in ancestors(outputs):
        if node.op != "call_function" or not any(map(is_batched, (node, *node.all_input_nodes))):
            continue
        name = node.target.__name__.split(".")[0].lstrip("_")
        elements = math.prod(size for size in node.meta["val"].shape if size != BATCH_SYMBOL)
        if name == "mm":
            inner = node.args[0].meta["val"].shape[-1]
            operations += elements * (1 if inner == BATCH_SYMBOL else inner)
        else:
            operations += elements * COSTS.get(name, 1)
    return operations


def new_call(layer: ur.Recurrent, x: Tensor, mode: str) -> Callable[[], Sequence[Tensor]]:
    """Return a function that runs a layer in inference, or computes its gradients in training."""
    if mode == "training":
        leaves = [x, *layer.parameters()]
        torch.manual_seed(1)
        grad_output = torch.randn(*x.shape[:2], layer.hidden_size).to(x)
        return lambda: torch.autograd.grad(layer(x)[0], leaves, grad_output, allow_unused=True)

    def infer() -> Sequence[Tensor]:
        with torch.no_grad():
            return [layer(x)[0]]

    return infer


def errors(layer: ur.Recurrent, x: Tensor, mode: str) -> tuple[float, float]:
    """Return the errors of the native and the reference engine in float32, against float64."""
    double = copy.deepcopy(layer).double()
    with ur.engine("reference"):
        exact = new_call(double, x.detach().double().requires_grad_(x.requires_grad), mode)()

    def error(engine: str) -> float:
        with ur.engine(engine):
            result = new_call(layer, x, mode)()
        pairs = [(a, b) for a, b in zip(result, exact, strict=True) if a is not None and b is not None]
        return max_difference([a for a, _ in pairs], [b for _, b in pairs])

    return error("native"), error("reference")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--time", type=int, default=100)
    parser.add_argument("--mode", choices=("inference", "training"), default="inference")
    parser.add_argument("--cells", default="", help="comma-separated names (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    parser.add_argument("--keep", action="store_true", help="write the ratios to benchmarks/cells.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    ratios = {}
    size = options.hidden
    x = torch.randn(options.time, options.batch, size, requires_grad=options.mode == "training")
    lstm = ur.LSTM(size, size)
    lstm_operations = count_operations(lstm, options.mode)
    table = Table(title=f"{options.batch}×{options.time}×{size}×{size}, {options.mode}, float32")
    for column in (
        "cell",
        "µs per step",
        "/ LSTM",
        "operations",
        "/ LSTM",
        "time / predicted",
        "error",
    ):
        table.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
    for name in filter(None, options.cells.split(",")) if options.cells else ur.cells.__all__:
        layer = ur.Recurrent(getattr(ur.cells, name), size, size)
        error, reference_error = errors(layer, x, options.mode)
        if not error <= max(TOLERANCE * (10 if options.mode == "training" else 1), 3 * reference_error):
            table.add_row(name, f"not timed: error of {error:.1e}")
            continue
        with ur.engine("native"):
            calls = {"ours": new_call(layer, x, options.mode), "lstm": new_call(lstm, x, options.mode)}
            timings = interleave(calls, options.seconds)
        ratio = timings["ours"].seconds / timings["lstm"].seconds
        share = count_operations(layer, options.mode) / lstm_operations
        ratios[name] = round(ratio, 2)
        micro = timings["ours"].seconds / options.time * 1e6
        table.add_row(
            name,
            f"{micro:.1f}",
            f"{ratio:.2f}",
            str(count_operations(layer, options.mode)),
            f"{share:.2f}",
            f"{ratio / share:.2f}",
            f"{error:.0e}",
        )
    Console(width=120).print(table)
    if options.keep:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        setting = f"{options.mode}, {options.batch}×{options.time}×{size}×{size}"
        results[setting] = results.get(setting, {}) | ratios
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

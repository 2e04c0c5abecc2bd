"""Every published cell beside our LSTM: the time of a step, and what its operations predict.

A step's operations are the fused multiply-adds of its matrix products, and what the loop spends on its other
functions: one for a sum, some 16 for a sigmoid. At the LSTM's rate they predict the time. Each result is
checked against the reference engine in float64 before it is timed: within 1e-4 (training 1e-3) of the largest
magnitude, or three times as far from it as that engine itself is in float32, for some recurrences make much
of each rounding. A cell is timed in turn with the LSTM, medians of calls. `--keep` writes what the site's
table of cells shows of it to benchmarks/cells.json.

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
from unrolled.cli.bench.work import difference
from unrolled.engines.compiler.ir import BATCH_SYMBOL, ancestors, is_batched
from unrolled.engines.native import registry

COSTS = {  # operations for a number; 1 where nothing is said
    "div": 4, "sqrt": 4, "rsqrt": 4, "exp": 12, "log": 14, "log1p": 16, "sigmoid": 16, "tanh": 16, "sin": 20,
    "cos": 20, "expand": 0, "clone": 0, "slice": 0, "cat": 0, "permute": 0, "view": 0, "full": 0,
}  # fmt: skip
KEPT = Path(__file__).with_suffix(".json")
AGREE = 1e-4  # largest difference of float32 from float64, of the largest magnitude


def operations(layer: ur.Recurrent, mode: str) -> int:
    """Those of a step of one row: forward, and in training backward too."""
    graph = registry.compiled(layer._first, torch.float32).captured
    wanted = list(graph.new_states)
    if mode == "training":
        gradients = (*graph.grad_params, graph.grad_x, *graph.grad_states)
        wanted += [node for node in gradients if node is not None]
    found = 0
    for node in ancestors(wanted):
        if node.op != "call_function" or not any(map(is_batched, (node, *node.all_input_nodes))):
            continue
        name = node.target.__name__.split(".")[0].lstrip("_")
        numbers = math.prod(size for size in node.meta["val"].shape if size != BATCH_SYMBOL)
        if name == "mm":
            deep = node.args[0].meta["val"].shape[-1]
            found += numbers * (1 if deep == BATCH_SYMBOL else deep)
        else:
            found += numbers * COSTS.get(name, 1)
    return found


def work(layer: ur.Recurrent, x: Tensor, mode: str) -> Callable[[], Sequence[Tensor]]:
    """A call of a layer, of inference or of training, where what is above sends a gradient back."""
    if mode == "training":
        leaves = [x, *layer.parameters()]
        torch.manual_seed(1)
        above = torch.randn(*x.shape[:2], layer.hidden_size).to(x)
        return lambda: torch.autograd.grad(layer(x)[0], leaves, above, allow_unused=True)

    def infer() -> Sequence[Tensor]:
        with torch.no_grad():
            return [layer(x)[0]]

    return infer


def checked(layer: ur.Recurrent, x: Tensor, mode: str) -> tuple[float, float]:
    """How far the native engine, and the reference engine in float32, are from that in float64."""
    twin = copy.deepcopy(layer).double()
    with ur.engine("reference"):
        exact = work(twin, x.detach().double().requires_grad_(x.requires_grad), mode)()

    def apart(engine: str) -> float:
        with ur.engine(engine):
            found = work(layer, x, mode)()
        pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a is not None and b is not None]
        return difference([a for a, _ in pairs], [b for _, b in pairs])

    return apart("native"), apart("reference")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--time", type=int, default=100)
    parser.add_argument("--mode", choices=("inference", "training"), default="inference")
    parser.add_argument("--cells", default="", help="names, separated by commas; all of them")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    parser.add_argument("--keep", action="store_true", help="write the ratios to benchmarks/cells.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    ratios = {}
    size = options.hidden
    x = torch.randn(options.time, options.batch, size, requires_grad=options.mode == "training")
    lstm = ur.LSTM(size, size)
    known = operations(lstm, options.mode)
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
        apart, of_reference = checked(layer, x, options.mode)
        if not apart <= max(AGREE * (10 if options.mode == "training" else 1), 3 * of_reference):
            table.add_row(name, f"not timed: {apart:.1e} from float64")
            continue
        with ur.engine("native"):
            calls = {"ours": work(layer, x, options.mode), "lstm": work(lstm, x, options.mode)}
            found = interleave(calls, options.seconds)
        ratio = found["ours"].seconds / found["lstm"].seconds
        share = operations(layer, options.mode) / known
        ratios[name] = round(ratio, 2)
        micro = found["ours"].seconds / options.time * 1e6
        table.add_row(
            name,
            f"{micro:.1f}",
            f"{ratio:.2f}",
            str(operations(layer, options.mode)),
            f"{share:.2f}",
            f"{ratio / share:.2f}",
            f"{apart:.0e}",
        )
    Console(width=120).print(table)
    if options.keep:
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        setting = f"{options.mode}, {options.batch}×{options.time}×{size}×{size}"
        kept[setting] = kept.get(setting, {}) | ratios
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

"""Time a linear recurrence without matrix products, h = a * h + b, against other scans and the memory speed.

Ours is the compiled step of a cell. The others are accelerated-scan's implementation in torch and torch's
associative scan, eager and compiled. They do redundant work to run in parallel over time. The memory speed is
that of torch.addcmul on the same tensors: a * b + b, without a recurrence. Each result is first checked
against a loop in float64. All are timed in turn; the times are medians of calls.

python benchmarks/scans.py [--seconds 3] [--training]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from accelerated_scan.ref import scan
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

import unrolled as ur
from unrolled.cli.bench.timing import interleave
from unrolled.cli.bench.workload import max_difference

SHAPES = [(1, 65536, 16), (1, 8192, 128), (1, 4096, 1024), (8, 2048, 256), (32, 512, 256), (32, 4096, 512)]
TOLERANCE = 1e-5  # for float32 against float64, relative to the largest magnitude


class Scan(ur.Cell):
    """The recurrence h = a * h + b, with a and b concatenated in x."""

    state = ("h",)

    def step(self, x: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        a, b = x.chunk(2, -1)
        h = a * h + b
        return h


def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine two consecutive steps, or ranges of steps, into one."""
    return left[0] * right[0], left[1] * right[0] + right[1]


def torch_scan(a: Tensor, b: Tensor) -> Tensor:
    """Run torch's associative scan over the first axis."""
    return associative_scan(combine, (a, b), 0, combine_mode="generic")[1]


def loop(a: Tensor, b: Tensor) -> Tensor:
    """Run a Python loop over time."""
    h, states = torch.zeros_like(b[0]), []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


def prepare(
    batch: int, time: int, hidden: int, training: bool
) -> tuple[dict[str, Callable[[], Sequence[Tensor]]], Sequence[Tensor]]:
    """Return the functions to time by name, each with inputs in its own layout, and the expected result."""
    layer = ur.Recurrent(Scan, 2 * hidden, hidden)
    x = torch.cat((torch.rand(time, batch, hidden), torch.randn(time, batch, hidden)), -1)
    time_first = [part.contiguous() for part in x.chunk(2, -1)]
    time_last = [part.permute(1, 2, 0).contiguous() for part in time_first]
    for leaf in (x, *time_first, *time_last):
        leaf.requires_grad_(training)
    compiled = torch.compile(torch_scan)

    def run(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        if training:
            output = function(*leaves)
            return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]
        with torch.no_grad():
            return [function(*leaves)]

    calls = {
        "ours": functools.partial(run, lambda x: layer(x)[0], [x]),
        "accelerated-scan": functools.partial(run, scan, time_last),
        "associative": functools.partial(run, torch_scan, time_first),
    }
    if not training:
        a, b = x.chunk(2, -1)
        calls["memory"] = functools.partial(run, lambda a, b: torch.addcmul(b, a, b), [a, b])
        calls["compiled"] = functools.partial(run, compiled, time_first)
    exact = [leaf.detach().double().requires_grad_(training) for leaf in time_first]
    return calls, run(loop, exact)


def to_time_first(name: str, values: Sequence[Tensor]) -> list[Tensor]:
    """Convert results to the layout with time first."""
    if name == "ours" and len(values) > 1:
        return [values[0], *values[1].chunk(2, -1)]
    return [value.permute(2, 0, 1) for value in values] if name == "accelerated-scan" else list(values)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="for each row")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    options = parser.parse_args()
    torch.manual_seed(0)
    others = ["accelerated-scan", "associative", *([] if options.training else ["compiled"])]
    table = Table(title=f"h = a * h + b, {'training' if options.training else 'inference'}, float32")
    table.add_column("batch×time×units")
    names = ["ns per step", *([] if options.training else ["GB/s", "of memory speed"]), *others, "error"]
    for name in names:
        table.add_column(name, justify="right")
    for batch, time, hidden in SHAPES:
        calls, expected = prepare(batch, time, hidden, options.training)
        our_error = 0.0
        for name, call in calls.items():
            if name != "memory":
                error = max_difference(to_time_first(name, call()), expected)
                assert error <= TOLERANCE, f"{name} has an error of {error:.1e}"
                our_error = error if name == "ours" else our_error
        timings = interleave(calls, options.seconds)
        ours = timings["ours"].seconds
        row = [f"{ours / time * 1e9:.0f}"]
        if not options.training:
            row += [
                f"{3 * 4 * batch * time * hidden / ours / 1e9:.1f}",
                f"{timings['memory'].seconds / ours:.0%}",
            ]
        row += [f"{timings[name].seconds / ours:.1f}×" for name in others]
        table.add_row(f"{batch}×{time}×{hidden}", *row, f"{our_error:.0e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

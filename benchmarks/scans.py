"""A linear recurrence without a product, h = a * h + b: how near the memory's speed it is, and others.

Ours is the step of a cell, compiled. Beside it are accelerated-scan's implementation in torch, and torch's
associative scan, eager and compiled; all of them compute numbers more than once to go through time side by
side. What the memory gives is told by torch.addcmul of the same numbers where they lie: a * b + b, with no
recurrence. Each result is checked against a loop in float64 first; all are timed in turn, medians of calls.

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
from unrolled.cli.bench.work import difference

SHAPES = [(1, 65536, 16), (1, 8192, 128), (1, 4096, 1024), (8, 2048, 256), (32, 512, 256), (32, 4096, 512)]
AGREE = 1e-5  # largest difference of float32 from float64, of the largest magnitude


class Scan(ur.Cell):
    """h = a * h + b, where x holds a and b side by side."""

    state = ("h",)

    def step(self, x: Tensor, h: Tensor) -> Tensor:  # noqa: D102
        a, b = x.chunk(2, -1)
        h = a * h + b
        return h


def joined(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two steps, or two runs of steps, as one."""
    return left[0] * right[0], left[1] * right[0] + right[1]


def associative(a: Tensor, b: Tensor) -> Tensor:
    """Torch's scan, over the first axis."""
    return associative_scan(joined, (a, b), 0, combine_mode="generic")[1]


def looped(a: Tensor, b: Tensor) -> Tensor:
    """One step after another, in torch."""
    h, found = torch.zeros_like(b[0]), []
    for one, other in zip(a, b, strict=True):
        h = one * h + other
        found.append(h)
    return torch.stack(found)


def calls(
    batch: int, time: int, hidden: int, training: bool
) -> tuple[dict[str, Callable[[], Sequence[Tensor]]], Sequence[Tensor]]:
    """What is timed, by name, and what each should find; all in the layout that they want."""
    layer = ur.Recurrent(Scan, 2 * hidden, hidden)
    x = torch.cat((torch.rand(time, batch, hidden), torch.randn(time, batch, hidden)), -1)
    first = [part.contiguous() for part in x.chunk(2, -1)]
    last = [part.permute(1, 2, 0).contiguous() for part in first]
    for leaf in (x, *first, *last):
        leaf.requires_grad_(training)
    compiled = torch.compile(associative)

    def found(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        if training:
            output = function(*leaves)
            return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]
        with torch.no_grad():
            return [function(*leaves)]

    made = {
        "ours": functools.partial(found, lambda x: layer(x)[0], [x]),
        "accelerated-scan": functools.partial(found, scan, last),
        "associative": functools.partial(found, associative, first),
    }
    if not training:
        a, b = x.chunk(2, -1)
        made["memory"] = functools.partial(found, lambda a, b: torch.addcmul(b, a, b), [a, b])
        made["compiled"] = functools.partial(found, compiled, first)
    exact = [leaf.detach().double().requires_grad_(training) for leaf in first]
    return made, found(looped, exact)


def same(name: str, values: Sequence[Tensor]) -> list[Tensor]:
    """Results in the layout of time first."""
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
    names = ["ns a step", *([] if options.training else ["GB/s", "of memory's"]), *others, "from float64"]
    for name in names:
        table.add_column(name, justify="right")
    for batch, time, hidden in SHAPES:
        made, exact = calls(batch, time, hidden, options.training)
        apart = 0.0
        for name, call in made.items():
            if name != "memory":
                error = difference(same(name, call()), exact)
                assert error <= AGREE, f"{name} is {error:.1e} away from float64"
                apart = error if name == "ours" else apart
        timed = interleave(made, options.seconds)
        ours = timed["ours"].seconds
        row = [f"{ours / time * 1e9:.0f}"]
        if not options.training:
            row += [
                f"{3 * 4 * batch * time * hidden / ours / 1e9:.1f}",
                f"{timed['memory'].seconds / ours:.0%}",
            ]
        row += [f"{timed[name].seconds / ours:.1f}×" for name in others]
        table.add_row(f"{batch}×{time}×{hidden}", *row, f"{apart:.0e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

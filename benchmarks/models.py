"""Compare whole models with torch, before and after ``ur.convert``, in inference and training.

The models are in ``whole_models.py``. Their code isn't changed. Both versions have the same weights and are
timed in turn; the figures are medians of a call in milliseconds, and the ratio of the medians: above 1, ours
is faster. Training is a forward and a backward pass. Results and gradients are compared before. With
``--compile``, ``torch.compile`` of torch's model is timed, too: it takes minutes to compile loops. Rows that
other programs disturbed are marked with ``?``.

python benchmarks/models.py [--models Tagger,Policy] [--mode inference] [--compile]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import whole_models
from rich.console import Console
from rich.table import Table
from torch import nn

import unrolled as ur
from unrolled.cli.bench.disturbance import MAX_SLOWDOWN, Probe
from unrolled.cli.bench.timing import interleave
from unrolled.engines.native.toolchain import cpu

MODES = "inference", "training"
NAMES = {model.__name__: model for model in whole_models.MODELS}


def new_call(model: nn.Module, inputs: tuple[torch.Tensor, ...], mode: str) -> Callable[[], torch.Tensor]:
    """Return a function that runs the model once in a mode, and returns its result."""

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return model(*inputs)

    def train() -> torch.Tensor:
        model.zero_grad()
        result = model(*inputs)
        result.square().mean().backward()
        return result.detach()

    return train if mode == "training" else infer


def compare(calls: dict[str, Callable[[], torch.Tensor]], models: dict[str, nn.Module], mode: str) -> None:
    """Raise an error if the results or the gradients of the models differ."""
    expected = calls["torch"]()
    for name, call in calls.items():
        for _ in range(3):  # the first calls compile and record
            torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-4)
        if mode == "training":
            pairs = zip(models[name].parameters(), models["torch"].parameters(), strict=True)
            for ours, theirs in pairs:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=[*NAMES])
    parser.add_argument("--mode", type=lambda text: text.split(","), default=MODES)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each version of a model")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    table = Table(title=f"{cpu.name()}, torch {torch.__version__}, {threads} threads, ms per call")
    versions = ["torch", "torch.compile", "ours"] if options.compile else ["torch", "ours"]
    for column in ("model", "mode", *versions, "ratio"):
        table.add_column(column, justify="left" if column in ("model", "mode") else "right")
    probe = Probe()
    for name in options.models:
        for mode in options.mode:
            torch.manual_seed(0)
            model = NAMES[name]().train(mode == "training")
            models = {"torch": model, "ours": ur.convert(copy.deepcopy(model))}
            if options.compile:
                models["torch.compile"] = torch.compile(copy.deepcopy(model))
            calls = {key: new_call(each, model.inputs, mode) for key, each in models.items()}
            compare(calls, models, mode)
            before = probe.slowdown()
            times = {key: timing.seconds * 1e3 for key, timing in interleave(calls, options.seconds).items()}
            mark = "?" if max(before, probe.slowdown()) > MAX_SLOWDOWN else ""
            figures = [f"{times[key]:.3g}" for key in versions]
            ratio = min(times[key] for key in times if key != "ours") / times["ours"]
            table.add_row(whole_models.MODELS[NAMES[name]], mode, *figures, f"{ratio:.2f}{mark}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""What the examples share: a training loop that can be stopped at any moment and goes on from there."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """Where a run keeps its files, and the settings that its result depends on."""

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The model, the optimizer and the random state after the last finished epoch."""
        return self.folder / f"{self.name}.pt"

    @property
    def page(self) -> Path:
        """The trained layer on a sample, for a browser."""
        return self.folder / f"{self.name}.html"

    def save_scores(self, scores: dict[str, Any]) -> Path:
        """Write the result for programs."""
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps({"settings": self.settings, **scores}, indent=2) + "\n")
        return path

    def save_sample(self, x: Tensor) -> Path:
        """Write a sequence ``(time, features)`` as CSV, rows as time steps."""
        path = self.folder / f"{self.name}_sample.csv"
        np.savetxt(path, x.numpy(), delimiter=",", fmt="%.9g")
        return path


def options(name: str, about: str, epochs: int, hidden: int) -> argparse.ArgumentParser:
    """The arguments that every example takes."""
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--epochs", type=_positive, default=epochs, help=f"passes over the data ({epochs})")
    parser.add_argument("--hidden", type=_positive, default=hidden, help=f"units of the layer ({hidden})")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches (0)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for what is written (runs)")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run")
    return parser


def start(name: str, given: argparse.Namespace) -> Run:
    """Make the folder of a run; with ``--restart`` forget its checkpoint."""
    settings = {key: value for key, value in vars(given).items() if key not in ("runs", "restart")}
    run = Run(name, given.runs, settings)
    run.folder.mkdir(parents=True, exist_ok=True)
    if given.restart:
        run.checkpoint.unlink(missing_ok=True)
    torch.manual_seed(given.seed)
    return run


def train(
    run: Run,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    *,
    batch: int = 32,
    rate: float = 3e-3,
) -> None:
    """Train with Adam, a checkpoint after every epoch; go on from one that is there.

    Killed at any moment and started again, a run ends with the very same weights.

    Args:
        run: where the checkpoint lies, and its settings.
        model: changed in place.
        loss: from the model's output and the targets of a batch.
        data: inputs and targets, a row a sample.
        batch: rows of a batch.
        rate: the learning rate at the start; it falls to a hundredth along a cosine.

    Raises:
        ValueError: a checkpoint that is damaged or was made with other settings.
    """
    epochs = int(run.settings["epochs"])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, rate / 100)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = _resume(run, parts)
    if done:
        going = "Nothing left to train" if done == epochs else f"Going on after epoch {done} of {epochs}"
        console.print(f"{going}: {run.checkpoint} was there.", soft_wrap=True)
    inputs, targets = data
    told = TextColumn("epoch {task.completed} of {task.total}, loss {task.fields[loss]:.4f}")
    bar = (TextColumn("training"), BarColumn(), told, TimeRemainingColumn())
    with Progress(*bar, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=epochs, completed=done, loss=float("nan"))
        for epoch in range(done, epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(len(inputs)), batch):
                value = loss(model(inputs[rows]), targets[rows])
                optimizer.zero_grad()
                torch.autograd.backward(value)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total += value.item() * len(rows)
            schedule.step()
            _save(run, parts, epoch + 1)
            progress.update(task, completed=epoch + 1, loss=total / len(inputs))


def say_how_to_open(run: Run, sample: Path) -> None:
    """Print the command that opens the trained layer on a sample."""
    beside = Path(sys.executable).with_name("unrolled")  # in a virtual environment that is not active
    active = shutil.which("unrolled") == str(beside) or not beside.exists()
    command = "unrolled" if active else os.path.relpath(beside)
    console.print("Every number of the trained layer:")
    console.print(f"  {command} show {run.checkpoint} --input {sample}", soft_wrap=True)


def told(main: Callable[[], None]) -> None:
    """Run an example; what can't be used is told in one line, with exit code 2, as is Ctrl-C with 130."""
    try:
        main()
    except KeyboardInterrupt:
        again = "the same command goes on after the last finished epoch"
        print(f"\n{Path(sys.argv[0]).name}: stopped; {again}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _save(run: Run, parts: dict[str, Any], epoch: int) -> None:
    """Write the whole checkpoint beside the old one, then put it in its place in one step."""
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"epoch": epoch, "random": torch.get_rng_state(), "settings": run.settings}
    beside = run.checkpoint.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(run.checkpoint)


def _resume(run: Run, parts: dict[str, Any]) -> int:
    """Load a checkpoint if there is one; how many epochs are done."""
    if not run.checkpoint.exists():
        return 0
    mend = "delete it, or start with --restart or another --runs folder"
    try:
        content = torch.load(run.checkpoint, weights_only=True)
        settings, epoch = content["settings"], int(content["epoch"])
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{run.checkpoint} is damaged ({type(error).__name__}): {mend}") from error
    if settings != run.settings:
        changed = [key for key in run.settings if settings.get(key) != run.settings[key]]
        raise ValueError(f"{run.checkpoint} was made with another {', '.join(changed)}: {mend}")
    for name, part in parts.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["random"])
    return epoch


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value

"""Shared code of the examples: a training loop that can be interrupted at any time and resumed."""

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
    """The folder of a run, and the settings that its result depends on."""

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The file with the model, the optimizer and the random state after the last finished epoch."""
        return self.folder / f"{self.name}.pt"

    @property
    def page(self) -> Path:
        """The interactive page of the trained layer."""
        return self.folder / f"{self.name}.html"

    def save_scores(self, scores: dict[str, Any]) -> Path:
        """Write the settings and the scores as JSON."""
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps({"settings": self.settings, **scores}, indent=2) + "\n")
        return path

    def save_sample(self, x: Tensor) -> Path:
        """Write a sequence of shape ``(time, features)`` as CSV, one row per time step."""
        path = self.folder / f"{self.name}_sample.csv"
        np.savetxt(path, x.numpy(), delimiter=",", fmt="%.9g")
        return path


def argument_parser(name: str, description: str, epochs: int, hidden: int) -> argparse.ArgumentParser:
    """Create a parser with the arguments of every example."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument(
        "--epochs", type=_positive_int, default=epochs, help=f"passes over the data (default: {epochs})"
    )
    parser.add_argument(
        "--hidden", type=_positive_int, default=hidden, help=f"hidden size of the layer (default: {hidden})"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="output folder (default: runs)")
    parser.add_argument("--restart", action="store_true", help="start again, without the saved checkpoint")
    return parser


def start(name: str, args: argparse.Namespace) -> Run:
    """Create the folder of a run; with ``--restart``, delete its checkpoint."""
    settings = {key: value for key, value in vars(args).items() if key not in ("runs", "restart")}
    run = Run(name, args.runs, settings)
    run.folder.mkdir(parents=True, exist_ok=True)
    if args.restart:
        run.checkpoint.unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    return run


def train(
    run: Run,
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    *,
    batch: int = 32,
    rate: float = 3e-3,
) -> None:
    """Train with Adam and save a checkpoint after every epoch. Resume from a checkpoint if there is one.

    A run that is killed and restarted ends with exactly the same weights.

    Args:
        run: The path of the checkpoint, and the settings.
        model: The model. It is changed in place.
        loss_function: The loss of the model's output and the targets of a batch.
        data: Inputs and targets, one sample per row.
        batch: The batch size.
        rate: The initial learning rate. It falls to a hundredth along a cosine.

    Raises:
        ValueError: If the checkpoint is damaged or was saved with other settings.
    """
    epochs = int(run.settings["epochs"])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, rate / 100)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    finished = _resume(run, parts)
    if finished:
        status = (
            "Nothing left to train" if finished == epochs else f"Resuming after epoch {finished} of {epochs}"
        )
        console.print(f"{status}, from {run.checkpoint}.", soft_wrap=True)
    inputs, targets = data
    status_column = TextColumn("epoch {task.completed} of {task.total}, loss {task.fields[loss]:.4f}")
    columns = (TextColumn("training"), BarColumn(), status_column, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=epochs, completed=finished, loss=float("nan"))
        for epoch in range(finished, epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(len(inputs)), batch):
                loss = loss_function(model(inputs[rows]), targets[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total += loss.item() * len(rows)
            schedule.step()
            _save(run, parts, epoch + 1)
            progress.update(task, completed=epoch + 1, loss=total / len(inputs))


def print_show_command(run: Run, sample: Path) -> None:
    """Print the command that shows the trained layer on a sample."""
    script = Path(sys.executable).with_name("unrolled")  # in a virtual environment that isn't active
    on_path = shutil.which("unrolled") == str(script) or not script.exists()
    command = "unrolled" if on_path else os.path.relpath(script)
    console.print("To see every intermediate value of the trained layer, run:")
    console.print(f"  {command} show {run.checkpoint} --input {sample}", soft_wrap=True)


def run_example(main: Callable[[], None]) -> None:
    """Run an example. Print errors in one line and exit with code 2, or with code 130 after Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        name = Path(sys.argv[0]).name
        print(
            f"\n{name}: stopped; rerun the command to resume after the last finished epoch", file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _save(run: Run, parts: dict[str, Any], epoch: int) -> None:
    """Write the checkpoint to a temporary file, then replace the old one atomically."""
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"epoch": epoch, "random": torch.get_rng_state(), "settings": run.settings}
    temporary = run.checkpoint.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run.checkpoint)


def _resume(run: Run, parts: dict[str, Any]) -> int:
    """Load the checkpoint if there is one, and return the number of finished epochs."""
    if not run.checkpoint.exists():
        return 0
    advice = "delete it, or use --restart or another --runs folder"
    try:
        content = torch.load(run.checkpoint, weights_only=True)
        settings, epoch = content["settings"], int(content["epoch"])
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{run.checkpoint} is damaged ({type(error).__name__}): {advice}") from error
    if settings != run.settings:
        changed = [key for key in run.settings if settings.get(key) != run.settings[key]]
        raise ValueError(f"{run.checkpoint} was saved with a different {', '.join(changed)}: {advice}")
    for name, part in parts.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["random"])
    return epoch


def _positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value

"""Train a forecaster of sunspots with Lightning: our layers are modules like any other.

    python examples/with_lightning.py

The windows, model and loss are those of data_parallel.py. Here the Trainer runs on one CPU; its other
strategies and devices take the same module.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from data_parallel import Forecaster, windows


class Training(lightning.LightningModule):
    """What Lightning asks for: a step and an optimiser."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.model = Forecaster(hidden)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The loss of a batch of windows."""
        past, change = batch
        loss = nn.functional.huber_loss(self.model(past), change)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(training: Training, batches: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Have Lightning train, and write nothing."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(training, batches)


def main() -> None:
    """Train, and say how the loss fell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=32)
    given = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    training = Training(given.hidden)
    batches = DataLoader(TensorDataset(*windows()), batch_size=32, shuffle=True)
    fit(training, batches, given.epochs)
    each = len(batches)
    first, last = sum(training.losses[:each]) / each, sum(training.losses[-each:]) / each
    Console(highlight=False).print(f"loss of the first epoch {first:.4f}, of the last {last:.4f}")


if __name__ == "__main__":
    main()

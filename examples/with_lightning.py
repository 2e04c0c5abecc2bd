"""Train a sunspot forecaster with Lightning. Our layers work like any other module.

    python examples/with_lightning.py

The data, the model and the loss are those of data_parallel.py. Here the Trainer runs on one CPU. Its other
strategies and devices work with the same module.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from data_parallel import Forecaster, load_windows


class Training(lightning.LightningModule):
    """The training step and the optimizer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.model = Forecaster(hidden)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch of windows."""
        past, change = batch
        loss = nn.functional.huber_loss(self.model(past), change)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(training: Training, batches: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Train on one CPU without writing files."""
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
    """Train and print the first and the last loss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=32)
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    training = Training(args.hidden)
    batches = DataLoader(TensorDataset(*load_windows()), batch_size=32, shuffle=True)
    fit(training, batches, args.epochs)
    count = len(batches)
    first, last = sum(training.losses[:count]) / count, sum(training.losses[-count:]) / count
    Console(highlight=False).print(
        f"mean loss of the first epoch: {first:.4f}, of the last epoch: {last:.4f}"
    )


if __name__ == "__main__":
    main()

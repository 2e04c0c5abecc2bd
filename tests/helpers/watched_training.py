"""Training with `unrolled.watch`, and access to its records."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import unrolled as ur


def train(model: nn.Module, x: Any, steps: int = 1, loss: Any = None) -> None:
    """Train with Adam. By default, the loss is the mean square of the first output."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        (loss or (lambda result: result[0].square().mean()))(output).backward()
        optimizer.step()


def records_by_quantity(watch: ur.Watch, **fields: Any) -> dict[str, dict[str, Any]]:
    """Return the records whose fields have the given values, by quantity."""
    return {
        record["quantity"]: record
        for record in watch.records
        if all(record[key] == value for key, value in fields.items())
    }

"""Layers that are broken on purpose, and the report about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import unrolled as ur
from unrolled.tracing.findings import Finding, HealthReport
from unrolled.tracing.thresholds import KINDS


@torch.no_grad()
def broken(cell: Any, change: Callable[[Any], Any], **options: Any) -> ur.Recurrent:
    """A layer of 4 features and 6 units, changed without gradients."""
    torch.manual_seed(1)
    options = {"dtype": torch.float64} | options
    layer = ur.Recurrent(cell, 4, 6, **options)
    change(layer)
    return layer


def inputs(time: int = 30, batch: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(time, batch, 4, dtype=dtype, generator=torch.Generator().manual_seed(2))


def report(layer: ur.Recurrent, x: Any = None, loss: Any = None) -> HealthReport:
    trace = ur.trace(layer, inputs() if x is None else x)
    return (trace if loss is None else trace.backward(loss)).health()


def only(found: HealthReport, kind: str) -> Finding:
    (finding,) = (one for one in found if one.kind == kind)
    assert kind in KINDS
    return finding


def last_sum(output: Tensor) -> Tensor:
    return output[-1].sum()


class Formula(ur.Cell):
    """A cell whose subclasses compute something of the weighted sums."""

    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")

    def sums(self, x: Tensor, h: Tensor) -> Tensor:
        return linear(x, self.weight_ih) + linear(h, self.weight_hh)

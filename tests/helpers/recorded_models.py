"""Models and cells to record: several layers, random steps, dependent rows, and memory measurement."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

import unrolled as ur


class Model(nn.Module):
    """Layers of torch.nn and unrolled at several depths, and some that aren't called."""

    def __init__(self, batch_first: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"batch_first": batch_first, "dtype": dtype}
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=True, **sizes)})
        self.middle = ur.Recurrent(ur.cells.GRU, 8, 5, **sizes)
        self.alias = self.middle
        self.decoder = ur.RNN(5, 6, **sizes)
        self.cell = nn.GRUCell(2, 3)
        self.unused = nn.GRU(2, 2)
        self.head = nn.Linear(6, 2, dtype=dtype)

    def forward(self, x: Any) -> Tensor:
        x, _ = self.encoder["lstm"](x)
        x, state = self.middle(x)
        x, _ = self.decoder(x)
        x = x if isinstance(x, Tensor) else x.data
        return self.head(x).square().mean() + state.sum()


class RandomStep(ur.Cell):
    """A cell whose step draws random numbers."""

    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        kept = dropout(x, 0.5)
        h = torch.tanh(linear(kept, self.weight_ih) + linear(h, self.weight_hh))
        return h


class CoupledRows(RandomStep):
    """A cell in whose step the rows of the batch depend on each other."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        inside = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        h = torch.tanh(inside - inside.mean(0))
        return h


class PeakMemory(RandomStep):
    """Measures the peak memory of all live tensors in bytes, if ``peak`` isn't 0."""

    peak = 0

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        inside = linear(x, self.weight_ih) + linear(h, self.weight_hh)
        wide = torch.cat([inside] * 8, -1)
        h = torch.tanh(wide[..., : self.hidden])
        if not PeakMemory.peak:
            return h
        alive = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}
        PeakMemory.peak = max(PeakMemory.peak, sum(storages.values()))
        return h


class Translator(nn.Module):
    """Two LSTMs with a linear layer between them; the second one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.encoder = nn.LSTM(6, 8, bidirectional=True)
        self.between = nn.Sequential(nn.Linear(16, 5), nn.Tanh())
        self.decoder = ur.LSTM(5, 4)
        self.unused = nn.GRU(2, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        encoded, _ = self.encoder(self.embed(x))
        features = self.between(encoded)
        first, state = self.decoder(features)
        second, _ = self.decoder(features.flip(0), state=state)
        return self.head(first + second)

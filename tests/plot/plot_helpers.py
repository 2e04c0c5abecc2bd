"""Cells and traces for the tests of the plots, and functions that read the contents of an Axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import sigmoid, tanh
from torch.nn.functional import linear

import unrolled as ur


class Echo(ur.Cell):
    """Two states, a gate, and two matrices between the same units.

    Quantities:
        gate: how much is new
    """

    state = ("memory", "trail")
    W, V = ur.Param("hidden", "input"), ur.Param("hidden", "input")
    U = ur.Param("hidden", "hidden")

    def step(self, x, memory, trail):
        gate = sigmoid(linear(x, self.W))
        memory = gate * tanh(linear(x, self.V) + linear(memory, self.U)) + (1 - gate) * memory
        trail = trail / 2 + memory
        return memory, trail


class Transposed(ur.Cell):
    """The input is along the rows of the weight: x @ weight."""

    into = ur.Param("input", "hidden")
    gain = ur.Param("hidden")

    def step(self, x, h):
        h = tanh(x @ self.into + self.gain * h)
        return h


class Diagonal(ur.Cell):
    """No matrix among the parameters."""

    gain = ur.Param("hidden")

    def step(self, x, h):
        h = tanh(x + self.gain * h)
        return h


def random_trace(steps: int = 4, hidden: int = 3, cell: Any = ur.cells.LSTM, **arguments: Any) -> ur.Trace:
    """Trace a layer with random weights on random inputs with two features."""
    return ur.trace(ur.Recurrent(cell, 2, hidden, **arguments), torch.randn(steps, 2))


TRACES: dict[str, Callable[[], Any]] = {
    "one state": lambda: random_trace(cell=ur.cells.RNN),
    "two states": random_trace,
    "own cell": lambda: random_trace(cell=Echo),
    "transposed": lambda: random_trace(cell=Transposed),
    "long and wide": lambda: random_trace(60, 40, cell=ur.cells.GRU),
    "one step, one unit": lambda: random_trace(1, 1),
    "projected": lambda: random_trace(cell=ur.cells.LSTM, proj_size=1),
    "backward": lambda: random_trace(bidirectional=True, num_layers=2),
    "bfloat16": lambda: ur.trace(ur.GRU(2, 3).bfloat16(), torch.ones(4, 2, dtype=torch.bfloat16)),
    "zeros": lambda: ur.trace(ur.RNN(2, 3, bias=False), torch.zeros(4, 2)),
    "not finite": lambda: ur.trace(
        ur.RNN(2, 3, nonlinearity="relu"), torch.tensor([[math.inf, math.nan]] * 4)
    ),
}


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend_labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def marker_rows(ax: Axes) -> list[tuple[str, list[int], float]]:
    """Return the color, the steps and the height of each row of markers outside of the axis scale."""
    lines = [line for line in ax.lines if line.get_linestyle() == "None"]
    return [(line.get_markerfacecolor(), list(line.get_xdata()), line.get_ydata()[0]) for line in lines]


def heat_maps(ax: Axes) -> list[Axes]:
    """Return the panels that are heat maps, without the color bar."""
    return [panel for panel in (ax, *ax.child_axes) if panel.images]


def image_values(ax: Axes) -> np.ma.MaskedArray:
    return ax.images[0].get_array()

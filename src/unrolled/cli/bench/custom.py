"""The cells that torch.nn doesn't have."""

from __future__ import annotations

from unrolled import cells
from unrolled.cells.base import Cell

CUSTOM: tuple[type[Cell], ...] = (cells.PeepholeLSTM, cells.LayerNormLSTM, cells.MGU)
"""Custom cells that are benchmarked by default."""
PUBLISHED: tuple[type[Cell], ...] = tuple(getattr(cells, name) for name in cells.__all__)
"""All published cells, which can be selected by name."""

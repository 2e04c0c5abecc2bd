"""The cells that torch.nn doesn't have: all can be timed, and some of them are unasked."""

from __future__ import annotations

from unrolled import cells
from unrolled.cells.base import Cell

CUSTOM: tuple[type[Cell], ...] = (cells.PeepholeLSTM, cells.LayerNormLSTM, cells.MGU)
PUBLISHED: tuple[type[Cell], ...] = tuple(getattr(cells, name) for name in cells.__all__)

"""The rows that are timed on a GPU, the most important first, because time may run out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from unrolled.cli.bench.gpu.custom import TIMED
from unrolled.cli.bench.rows import Row

HIDDEN = (64, 128, 256, 512, 1024)
BATCH = (1, 32, 256)
TIME = 128
MODES = ("inference", "training")

# Hidden size and batch size; the other combinations follow.
_FIRST = ((256, 32), (64, 1), (1024, 32), (64, 256), (512, 1), (128, 32))


def select_rows(
    cells: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    time: Sequence[int] | None = None,
    mode: str | None = None,
) -> list[Row]:
    """Return the rows: all combinations of the sizes, by default those of this module."""
    sizes = list(dict.fromkeys(itertools.product(hidden or HIDDEN, batch or BATCH)))
    sizes.sort(key=lambda size: _FIRST.index(size) if size in _FIRST else len(_FIRST))
    return [
        Row(cell, b, t, h, m)
        for h, b in sizes
        for t in dict.fromkeys(time or [TIME])
        for m in ([mode] if mode else MODES)
        for cell in dict.fromkeys(cells or TIMED)
    ]

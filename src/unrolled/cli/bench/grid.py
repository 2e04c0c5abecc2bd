"""The rows of the benchmark: which cell, how large, for inference or training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unrolled.cells.base import Cell
from unrolled.cli.bench.custom import CUSTOM, PUBLISHED
from unrolled.layers.torch_layers import LAYERS

STANDARD: dict[str, type[Cell]] = {layer.__name__.lower(): layer.cell_class for layer in LAYERS}
CELLS: dict[str, type[Cell]] = STANDARD | {cell.__name__.lower(): cell for cell in (*CUSTOM, *PUBLISHED)}
MODES = ("inference", "training", "streaming")

_FULL = {"batch": (1, 8, 32, 64), "hidden": (32, 128, 256, 512, 1024), "time": (1, 100, 1000)}
_FULL_CUSTOM = {"batch": (1, 32), "hidden": (128, 512), "time": (100, 1000)}
_QUICK = {"batch": (1, 32), "hidden": (256,), "time": (100,)}
_QUICK_CUSTOM = {"batch": (1,), "hidden": (128,), "time": (100,)}
_STREAMED = {"batch": 1, "time": 100}  # of the rows that are streamed where no mode is asked for
_LARGEST = 10**10  # time × batch × hidden² of the largest row: seconds a call on two cores
_BYTES = 4  # of a float32


@dataclass(frozen=True)
class Row:
    """One row: a layer of one cell over ``(time, batch, input)``, float32.

    Args:
        cell: a name of :data:`CELLS`.
        batch: rows of the batch.
        time: time steps.
        hidden: units of the hidden state.
        mode: ``"inference"``: the output and the final states; ``"training"``: the gradients of the
            sum of the output for the input and all parameters; ``"streaming"``: as inference, a call a time
            step, each with the states that the one before gave.
    """

    cell: str
    batch: int
    time: int
    hidden: int
    mode: str

    @property
    def input(self) -> int:
        """Features of the input: as many as hidden units, 16 where these are 32."""
        return 16 if self.hidden == 32 else self.hidden

    @property
    def standard(self) -> bool:
        """Whether torch.nn has this cell."""
        return self.cell in STANDARD

    def operations(self) -> int:
        """Multiplications and additions of the matrix products; three times as many in training."""
        products = 2 * self.time * self.batch * (self._weights() + self._recurrent())
        return products * (3 if self.mode == "training" else 1)

    def reading(self) -> int:
        """Bytes of weights that must be read: the recurrent ones at every step, the input's once a call."""
        once = self.time if self.mode == "streaming" else 1
        read = _BYTES * (once * self._weights() + self.time * self._recurrent())
        return read * (2 if self.mode == "training" else 1)

    def resident(self) -> int:
        """Bytes of the weight matrices."""
        return _BYTES * (self._weights() + self._recurrent())

    def _weights(self) -> int:
        """Elements of the matrices that multiply the input."""
        return _elements(self.cell, self.input, self.hidden) - self._recurrent()

    def _recurrent(self) -> int:
        """Elements of the matrices that multiply a state: those that an input of no features leaves."""
        return 2 * _elements(self.cell, 1, self.hidden) - _elements(self.cell, 2, self.hidden)


def _elements(cell: str, size: int, hidden: int) -> int:
    shapes = CELLS[cell](size, hidden).shapes().values()
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


def rows(
    full: bool,
    cells: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    time: Sequence[int] | None = None,
    mode: str | None = None,
) -> list[Row]:
    """The rows of the grid, with what is given in the place of its own choice.

    Args:
        full: the whole grid, or the quick one.
        cells: names of :data:`CELLS`.
        batch: rows of the batch.
        hidden: hidden units.
        time: time steps.
        mode: of :data:`MODES`.

    The largest rows are left out, unless batch, hidden and time are all given; streaming is a mode of a few
    rows only, unless it is asked for.
    """
    found = []
    for cell in cells or _cells(full):
        own = cell not in STANDARD
        axes = (_FULL_CUSTOM if own else _FULL) if full else (_QUICK_CUSTOM if own else _QUICK)
        sizes = (batch or axes["batch"], hidden or axes["hidden"], time or axes["time"])
        for b, h, t in itertools.product(*map(_once, sizes)):
            if t * b * h * h <= _LARGEST or (batch and hidden and time):
                streamed = b == _STREAMED["batch"] and t == _STREAMED["time"]
                modes = [mode] if mode else MODES if streamed else [m for m in MODES if m != "streaming"]
                found += [Row(cell, b, t, h, m) for m in modes]
    return found


def _cells(full: bool) -> list[str]:
    return [*STANDARD, *(cell.__name__.lower() for cell in (CUSTOM if full else CUSTOM[:1]))]


def _once(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))

"""The rows of the benchmark: cell, batch size, sequence length, hidden size and mode."""

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
_STREAMED = {"batch": 1, "time": 100}  # rows with these sizes are also streamed, unless a mode is given
_MAX_SIZE = 10**10  # time × batch × hidden² of the largest row: a call takes seconds on two cores
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Row:
    """One row of the benchmark: a float32 layer with an input of shape ``(time, batch, input)``.

    Args:
        cell: The name of a cell in :data:`CELLS`.
        batch: The batch size.
        time: The sequence length.
        hidden: The hidden size.
        mode: ``"inference"`` computes the output and the final states. ``"training"`` computes the gradients
            of the summed output with respect to the input and all parameters. ``"streaming"`` is inference
            with one call per time step, passing the states from call to call.
    """

    cell: str
    batch: int
    time: int
    hidden: int
    mode: str

    @property
    def input(self) -> int:
        """The number of input features: 16 for 32 hidden units, otherwise the hidden size."""
        return 16 if self.hidden == 32 else self.hidden

    @property
    def standard(self) -> bool:
        """Whether torch.nn has this cell."""
        return self.cell in STANDARD

    def operations(self) -> int:
        """Count the multiplications and additions of the matrix products, three times as many in training."""
        products = 2 * self.time * self.batch * (self._input_weights() + self._recurrent_weights())
        return products * (3 if self.mode == "training" else 1)

    def weight_traffic(self) -> int:
        """Count the bytes of weights that must be read.

        The recurrent weights are read at every step, the input weights once per call.
        """
        calls = self.time if self.mode == "streaming" else 1
        traffic = _FLOAT_BYTES * (calls * self._input_weights() + self.time * self._recurrent_weights())
        return traffic * (2 if self.mode == "training" else 1)

    def weight_bytes(self) -> int:
        """Return the size of the weight matrices in bytes."""
        return _FLOAT_BYTES * (self._input_weights() + self._recurrent_weights())

    def _input_weights(self) -> int:
        """Count the elements of the matrices that multiply the input."""
        return _matrix_elements(self.cell, self.input, self.hidden) - self._recurrent_weights()

    def _recurrent_weights(self) -> int:
        """Count the elements of the matrices that multiply a state.

        The number of elements is linear in the input size, so extrapolate to an input size of 0.
        """
        return 2 * _matrix_elements(self.cell, 1, self.hidden) - _matrix_elements(self.cell, 2, self.hidden)


def _matrix_elements(cell: str, size: int, hidden: int) -> int:
    shapes = CELLS[cell](size, hidden).shapes().values()
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


def select_rows(
    full: bool,
    cells: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    time: Sequence[int] | None = None,
    mode: str | None = None,
) -> list[Row]:
    """Return all combinations of the sizes to benchmark.

    The largest combinations are omitted, unless batch, hidden and time are all given. Most rows omit
    streaming, unless the mode is given.

    Args:
        full: Whether to use the full default sizes or the quick ones.
        cells: Names of cells in :data:`CELLS`, instead of the default ones.
        batch: Batch sizes, instead of the default ones.
        hidden: Hidden sizes, instead of the default ones.
        time: Sequence lengths, instead of the default ones.
        mode: One of :data:`MODES`, instead of all.
    """
    rows = []
    for cell in cells or default_cells(full):
        custom = cell not in STANDARD
        defaults = (_FULL_CUSTOM if custom else _FULL) if full else (_QUICK_CUSTOM if custom else _QUICK)
        sizes = (batch or defaults["batch"], hidden or defaults["hidden"], time or defaults["time"])
        for b, h, t in itertools.product(*map(_unique, sizes)):
            if t * b * h * h <= _MAX_SIZE or (batch and hidden and time):
                streamed = b == _STREAMED["batch"] and t == _STREAMED["time"]
                modes = [mode] if mode else MODES if streamed else [m for m in MODES if m != "streaming"]
                rows += [Row(cell, b, t, h, m) for m in modes]
    return rows


def default_cells(full: bool) -> list[str]:
    """Return the names of the cells that are benchmarked by default."""
    return [*STANDARD, *(cell.__name__.lower() for cell in (CUSTOM if full else CUSTOM[:1]))]


def _unique(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))

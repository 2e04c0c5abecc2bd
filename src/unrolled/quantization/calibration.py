"""Calibration: find the largest activations of each layer for batches of data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.cells.quantized_products import LARGEST, SMALLEST, ProductMode
from unrolled.cells.wrappers import CellWrapper
from unrolled.engines._torch_private import tree_leaves
from unrolled.engines.selection import engine
from unrolled.layers.module import CellModule


def calibrate(
    module: nn.Module, layers: Mapping[str, CellModule], batches: Iterable[Any]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return fixed activation scales for the matrix products of each layer.

    Args:
        module: The module, in float32.
        layers: The layers to calibrate, by name.
        batches: Inputs of the module: a tensor or a tuple of arguments for each call.

    Returns:
        For each layer, and each suffix of its cells, one scale per product, in the order of the step.

    Raises:
        TypeError: If ``batches`` isn't an iterable of tensors or tuples.
        ValueError: If there are no batches, or a batch contains NaN or can't be passed to the module.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibration should be a list of inputs, got {type(batches).__name__}: pass calibration=[x]"
        )
    with _observed(layers) as maxima, torch.no_grad(), engine("reference"):
        count = 0
        for batch in batches:
            _run(module, batch, f"calibration batch {count}")
            count += 1
    if not count:
        raise ValueError("calibration is empty: pass at least one input of the module")
    for name, cells in maxima.items():
        if not all(torch.isfinite(torch.tensor(values)).all() for values in cells.values()):
            raise ValueError(
                f"{name or 'the layer'} computes infinity or NaN during calibration: add it to keep"
            )
        if not all(cells.values()):
            raise ValueError(
                f"no calibration batch runs {name or 'the layer'}: add the layer to keep, or add more batches"
            )
    return {
        name: {suffix: tuple(map(_scale, values)) for suffix, values in cells.items()}
        for name, cells in maxima.items()
    }


def _scale(largest: float) -> float:
    """Return a fixed scale. 0 if all values are treated as zeros: each row then has its own scale."""
    return largest / LARGEST if largest >= SMALLEST else 0.0


def _run(module: nn.Module, batch: Any, label: str) -> None:
    """Run the module on a batch."""
    arguments = tuple(batch) if type(batch) in (tuple, list) else (batch,)
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{label} contains NaN or infinity: remove it")
    try:
        module(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{label} can't be passed to the module: {error}") from error


@contextmanager
def _observed(layers: Mapping[str, CellModule]) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Record the largest value of each product of each cell."""
    maxima: dict[str, dict[str, list[float]]] = {}
    own_cells = {name: layer._cells for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            observers = {suffix: _ObservedCell(cell) for suffix, cell in layer._cells.items()}
            maxima[name] = {suffix: cell.maxima for suffix, cell in observers.items()}
            layer._cells = {**observers}
        yield maxima
    finally:
        for name, layer in layers.items():
            layer._cells = own_cells[name]


class _ObservedCell(CellWrapper):
    """Record the largest absolute value that enters each product of the step.

    Attributes:
        maxima: The values, in the order of the products. Bound copies share the list.
    """

    stored_name = "Observed"

    def __init__(self, inner: Cell) -> None:
        super().__init__(inner)
        self.maxima: list[float] = []

    def step(self, x: Tensor, *states: Tensor) -> Any:
        """Run the inner step."""
        with _Maxima(x, states, self.maxima):
            return self.inner_step(x, *states)


class _Maxima(ProductMode):  # type: ignore[no-untyped-call]
    def __init__(self, x: Tensor, states: tuple[Tensor, ...], maxima: list[float]) -> None:
        super().__init__(x, states)
        self._maxima, self._position = maxima, 0

    def product(self, x: Tensor, matrix: Tensor, from_state: bool) -> Tensor:
        """Return the product, and record the largest value of its first factor."""
        largest = float(x.abs().max()) if x.numel() else 0.0
        if self._position == len(self._maxima):
            self._maxima.append(0.0)
        current = self._maxima[self._position]
        self._maxima[self._position] = largest if largest != largest else max(current, largest)
        self._position += 1
        return x @ matrix

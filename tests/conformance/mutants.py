"""Cells with one deliberate mistake each. A conformance suite that doesn't detect them proves nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import unrolled as ur
from unrolled.cells.base import Cell


def swap_gates(cell: Cell) -> Cell:
    """Swap the recurrent weights of the first two gates."""
    blocks = cell.weight_hh.shape[0] // cell.hidden

    def swap(tensor: Tensor) -> Tensor:
        first, second, *rest = tensor.chunk(blocks)
        return torch.cat((second, first, *rest))

    return cell.bind(
        {name: swap(getattr(cell, name)) for name in cell.shapes() if blocks > 1 and name != "weight_hr"}
    )


def drop_bias(cell: Cell) -> Cell:
    """Set the recurrent bias to zero."""
    return cell.bind({"bias_hh": torch.zeros_like(cell.bias_hh)}) if cell.bias else cell


def transpose_weights(cell: Cell) -> Cell:
    """Transpose the recurrent weights of each gate."""
    blocks = cell.weight_hh.split(cell.hidden)
    if blocks[0].shape[0] != blocks[0].shape[1]:
        return cell
    return cell.bind({"weight_hh": torch.cat([block.T for block in blocks])})


class _TanhForSigmoid(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.tanh if func is torch.sigmoid else func)(*args, **(kwargs or {}))


def tanh_for_sigmoid(cell: Cell) -> Cell:
    """Leave the parameters unchanged: :func:`mutate` replaces the function."""
    return cell


def mutate(cell_class: type[Cell], change: Callable[[Cell], Cell]) -> type[Cell]:
    """Return a subclass of a cell whose step runs with changed parameters."""

    def step(self: Any, x: Tensor, *states: Tensor) -> Any:
        changed = change(self)
        if change is tanh_for_sigmoid:
            with _TanhForSigmoid():
                return cell_class.step(changed, x, *states)
        return cell_class.step(changed, x, *states)

    step.__signature__ = inspect.signature(cell_class.step)  # type: ignore[attr-defined]
    return type(cell_class.__name__, (cell_class,), {"step": step})


# Each mistake with the cells that it applies to: a simple RNN has no gates and no sigmoid.
CHANGES: dict[str, tuple[Callable[[Cell], Cell], tuple[str, ...]]] = {
    "two gates swapped": (swap_gates, ("GRU", "LSTM")),
    "a bias dropped": (drop_bias, ("RNN", "GRU", "LSTM")),
    "a weight transposed": (transpose_weights, ("RNN", "GRU", "LSTM")),
    "tanh for sigmoid": (tanh_for_sigmoid, ("GRU", "LSTM")),
}
MUTANTS = [(change, kind) for change, (_, kinds) in CHANGES.items() for kind in kinds]


def classes_with(change: str, kind: str) -> dict[str, Any]:
    """Return this library's classes by torch.nn's names, with a mistake in those of one kind.

    Args:
        change: A key of ``CHANGES``.
        kind: ``"RNN"``, ``"GRU"`` or ``"LSTM"``.
    """
    classes: dict[str, Any] = {}
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"):
        ours = getattr(ur, name)
        classes[name] = ours
        if name.removesuffix("Cell") == kind:
            wrong = mutate(ours.cell_class, CHANGES[change][0])
            classes[name] = type(ours.__name__, (ours,), {"cell_class": wrong})
    return classes

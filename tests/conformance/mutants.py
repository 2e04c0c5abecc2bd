"""Cells that are wrong in one place each: what a suite of others must notice, or it proves nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import unrolled as ur
from unrolled.cells.base import Cell


def swapped(cell: Cell) -> Cell:
    """The first two gates exchanged."""
    blocks = cell.weight_hh.shape[0] // cell.hidden

    def swap(tensor: Tensor) -> Tensor:
        first, second, *rest = tensor.chunk(blocks)
        return torch.cat((second, first, *rest))

    return cell.bind(
        {name: swap(getattr(cell, name)) for name in cell.shapes() if blocks > 1 and name != "weight_hr"}
    )


def without_a_bias(cell: Cell) -> Cell:
    """The bias of the recurrent product dropped."""
    return cell.bind({"bias_hh": torch.zeros_like(cell.bias_hh)}) if cell.bias else cell


def transposed(cell: Cell) -> Cell:
    """The recurrent weights of each gate transposed."""
    blocks = cell.weight_hh.split(cell.hidden)
    if blocks[0].shape[0] != blocks[0].shape[1]:
        return cell
    return cell.bind({"weight_hh": torch.cat([block.T for block in blocks])})


class _TanhForSigmoid(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.tanh if func is torch.sigmoid else func)(*args, **(kwargs or {}))


def tanh_for_sigmoid(cell: Cell) -> Cell:
    """Nothing of the parameters: see :func:`mutated`."""
    return cell


def mutated(cell_class: type[Cell], change: Callable[[Cell], Cell]) -> type[Cell]:
    """A cell whose step is that of another one, changed."""

    def step(self: Any, x: Tensor, *states: Tensor) -> Any:
        changed = change(self)
        if change is tanh_for_sigmoid:
            with _TanhForSigmoid():
                return cell_class.step(changed, x, *states)
        return cell_class.step(changed, x, *states)

    step.__signature__ = inspect.signature(cell_class.step)  # type: ignore[attr-defined]
    return type(cell_class.__name__, (cell_class,), {"step": step})


# Each with the classes that it changes: a simple RNN has no gates and no sigmoid.
CHANGES: dict[str, tuple[Callable[[Cell], Cell], tuple[str, ...]]] = {
    "two gates swapped": (swapped, ("GRU", "LSTM")),
    "a bias dropped": (without_a_bias, ("RNN", "GRU", "LSTM")),
    "a weight transposed": (transposed, ("RNN", "GRU", "LSTM")),
    "tanh for sigmoid": (tanh_for_sigmoid, ("GRU", "LSTM")),
}
MUTANTS = [(what, kind) for what, (_, kinds) in CHANGES.items() for kind in kinds]


def classes_with(what: str, kind: str) -> dict[str, Any]:
    """Our classes by torch.nn's names, those of one kind mutated."""
    found: dict[str, Any] = {}
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"):
        ours = getattr(ur, name)
        found[name] = ours
        if name.removesuffix("Cell") == kind:
            wrong = mutated(ours.cell_class, CHANGES[what][0])
            found[name] = type(ours.__name__, (ours,), {"cell_class": wrong})
    return found

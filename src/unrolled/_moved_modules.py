"""Aliases for modules that have moved, so that layers pickled before the move still load."""

from __future__ import annotations

import sys
from types import ModuleType

from unrolled.cells.base import Cell, Param
from unrolled.layers.module import CellModule
from unrolled.layers.regularization import RecurrentRegularization
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

_MOVED: dict[str, dict[str, type]] = {
    "unrolled.cell": {"Cell": Cell, "Param": Param},
    "unrolled.cell_module": {"CellModule": CellModule},
    "unrolled.drop_in": {
        "GRU": GRU,
        "GRUCell": GRUCell,
        "LSTM": LSTM,
        "LSTMCell": LSTMCell,
        "RNN": RNN,
        "RNNCell": RNNCell,
    },
    "unrolled.regularised": {"Regularised": RecurrentRegularization},
    "unrolled.single_step": {"SingleStep": SingleStep},
}


def register() -> None:
    """Make the old module names importable. ``unrolled.layers`` is still a name and needs no alias."""
    for name, classes in _MOVED.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        vars(module).update(classes)

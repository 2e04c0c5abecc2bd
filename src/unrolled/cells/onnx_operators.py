"""The cells that ONNX has an operator for, see https://onnx.ai/onnx/operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.gru import GRU
from unrolled.cells.lstm import LSTM
from unrolled.cells.reset_before_gru import ResetBeforeGRU
from unrolled.cells.rnn import RNN


class OnnxOperator(NamedTuple):
    """An ONNX operator.

    Attributes:
        name: Its name.
        gates: For each of its gates, the index of the gate in the cell's parameters.
    """

    name: str
    gates: tuple[int, ...]

    def reorder(self, parameter: Tensor) -> Tensor:
        """Return a parameter of the cell, ``(gates * hidden, ...)``, with the gates in ONNX's order."""
        if len(self.gates) == 1:
            return parameter
        size = parameter.shape[0] // len(self.gates)
        return torch.cat([parameter[index * size : (index + 1) * size] for index in self.gates])


_OPERATORS: dict[type[Cell], OnnxOperator] = {
    RNN: OnnxOperator("RNN", (0,)),
    GRU: OnnxOperator("GRU", (1, 0, 2)),
    ResetBeforeGRU: OnnxOperator("GRU", (1, 0, 2)),
    LSTM: OnnxOperator("LSTM", (0, 3, 1, 2)),
}


def onnx_operator(cell: Cell, dtype: torch.dtype) -> OnnxOperator | None:
    """Return the ONNX operator of a cell. None if there is none, also for projections and other dtypes."""
    operator = _OPERATORS.get(type(cell))
    projected = len(set(cell.state_sizes().values())) > 1
    return None if projected or dtype is not torch.float32 else operator


def onnx_attributes(cell: Cell, directions: int) -> dict[str, Any]:
    """Return the attributes of the operator's node.

    Args:
        cell: A cell with an operator.
        directions: 2 for both directions of a layer.
    """
    attributes: dict[str, Any] = {"hidden_size": cell.hidden}
    attributes["direction"] = "bidirectional" if directions == 2 else "forward"
    if type(cell) is GRU:
        attributes["linear_before_reset"] = 1
    if cell.chosen_options().get("nonlinearity") == "relu":
        attributes["activations"] = ["Relu"] * directions
    return attributes

"""Cells of the parts of a model without a layer: functions of one time step, and causal convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.export.program import Value


@dataclass(eq=False)
class Call:
    """A function of values of the same time step.

    Attributes:
        function: Takes a tensor ``(batch, width)`` for each operand, followed by the weights.
        operands: Values, or results of other calls.
        weights: Tensors that it reads.
    """

    function: Callable[..., Tensor]
    operands: list[Call | Value]
    weights: list[Tensor]

    @property
    def width(self) -> int:
        """Number of columns of the result."""
        operands = [torch.zeros(2, operand.width) for operand in self.operands]
        with torch.no_grad():
            return int(self.function(*operands, *self.weights).shape[-1])

    def values(self) -> list[Value]:
        """Return the values that the call and its operands read, each once."""
        found: dict[Value, None] = {}
        for operand in self.operands:
            found |= dict.fromkeys([operand] if isinstance(operand, Value) else operand.values())
        return list(found)


class Stateless(Cell):
    """A cell whose step is a call. Its state is only its output."""

    state = ("y",)

    def __init__(self, call: Call) -> None:
        values = call.values()
        super().__init__(sum(value.width for value in values), call.width)
        self.call = call
        self.columns: dict[Value, slice] = {}
        start = 0
        for value in values:
            self.columns[value] = slice(start, start + value.width)
            start += value.width
        self.names: dict[Call, list[str]] = {}
        self._name_weights(call)

    def _name_weights(self, call: Call) -> None:
        """Make the weights of calls attributes of the cell, which are replaced while it is captured."""
        first = sum(len(names) for names in self.names.values())
        self.names[call] = [f"weight_{first + k}" for k in range(len(call.weights))]
        self.__dict__.update(zip(self.names[call], call.weights, strict=True))
        for operand in call.operands:
            if isinstance(operand, Call):
                self._name_weights(operand)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the call."""

        def compute(one: Call | Value) -> Tensor:
            if isinstance(one, Value):
                return x[:, self.columns[one]]
            operands = [compute(operand) for operand in one.operands]
            return one.function(*operands, *[getattr(self, name) for name in self.names[one]])

        return compute(self.call)


class Convolution(Cell):
    """A causal convolution: its state is the past input that it still needs, oldest first.

    Options:
        past_size: Number of values of the past input.
    """

    state = {"y": "hidden", "past": "past_size"}  # noqa: RUF012
    past_size: int

    def step(self, x: Tensor, y: Tensor, past: Tensor) -> Any:
        """Compute one time step."""
        weight, offset = self.weight, self.offset  # type: ignore[attr-defined]
        channels, taps = x.shape[1], weight.shape[2]
        window = torch.cat((past, x), 1)
        spacing = (window.shape[1] - channels) // (taps - 1)
        rows = [window[:, k * spacing : k * spacing + channels] for k in range(taps)]
        return weighted_sum(rows, weight, offset), window[:, channels:]


def weighted_sum(rows: list[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the output of a convolution for one time step.

    Args:
        rows: The input at each tap, ``(batch, channels)``, oldest first.
        weight: ``(output, channels of a group, taps)``.
        bias: ``(output,)``, or None.
    """
    inputs = weight.shape[1]
    groups = rows[0].shape[1] // inputs
    outputs = weight.shape[0] // groups
    if inputs == outputs == 1:
        y = rows[0] * weight[:, 0, 0]
        for k in range(1, len(rows)):
            y = y + rows[k] * weight[:, 0, k]
    else:
        parts = []
        for g in range(groups):
            columns = torch.cat([row[:, g * inputs : (g + 1) * inputs] for row in rows], 1)
            matrix = weight[g * outputs : (g + 1) * outputs].transpose(1, 2).reshape(outputs, -1)
            parts.append(torch.nn.functional.linear(columns, matrix))
        y = torch.cat(parts, 1) if groups > 1 else parts[0]
    return y if bias is None else y + bias


def convolution(module: nn.Conv1d) -> Cell:
    """Return the cell of a causal convolution with several taps."""
    past = (module.kernel_size[0] - 1) * module.dilation[0] * module.in_channels
    cell = Convolution(module.in_channels, module.out_channels, past_size=past)
    bias = None if module.bias is None else module.bias.detach()
    cell.__dict__.update(weight=module.weight.detach(), offset=bias)
    return cell

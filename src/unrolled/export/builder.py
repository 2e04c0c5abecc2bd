"""Collect the stages of a program."""

from __future__ import annotations

from torch import nn

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import ZoneoutWrapper
from unrolled.export.program import Lookup, Stage, Value
from unrolled.export.stateless import Call, Stateless, convolution
from unrolled.layers.recurrent import Recurrent


class Builder:
    """Collects the stages of a program."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.lookup: Lookup | None = None
        self._values: dict[Call, Value] = {}

    def layer(self, name: str, layer: Recurrent, x: Call | Value) -> Value:
        """Add the cells of all layers and directions, and return the output."""
        value = self.value(name, x)
        noise = layer._noise
        for suffixes in layer._stack:
            cells = [self._cell(layer, suffix) for suffix in suffixes]
            widths = [next(iter(cell.state_sizes().values())) for cell in cells]
            output = Value(sum(widths))
            for index, (suffix, cell) in enumerate(zip(suffixes, cells, strict=True)):
                initial = []
                if layer.initial_state == "learned":
                    names = layer._first.state
                    initial = [getattr(layer, f"initial_{state}{suffix}").detach() for state in names]
                if noise is not None and noise.is_active(training=False):
                    cell = ZoneoutWrapper(cell, noise.zoneout, False)
                stage = Stage(f"{name}{suffix}", cell, [value], output, sum(widths[:index]), bool(index))
                stage.initial = initial or stage.initial
                self.stages.append(stage)
            value = output
        return value

    @staticmethod
    def _cell(layer: Recurrent, suffix: str) -> Cell:
        cell = layer._bind(suffix)
        cell.training = False
        return cell

    def convolution(self, name: str, module: nn.Conv1d, x: Call | Value) -> Value:
        """Add a causal convolution with several taps."""
        value = self.value(name, x)
        output = Value(module.out_channels)
        self.stages.append(Stage(name, convolution(module), [value], output))
        return output

    def embedding(self, module: nn.Embedding) -> Value:
        """Add the embedding of the input."""
        output = Value(module.embedding_dim)
        self.lookup = Lookup(module.weight.detach(), output)
        return output

    def value(self, name: str, one: Call | Value) -> Value:
        """Return a value; for a call, add a stage that computes it."""
        if isinstance(one, Value):
            return one
        if one not in self._values:
            output = Value(one.width)
            self.stages.append(Stage(name, Stateless(one), one.values(), output, has_state=False))
            self._values[one] = output
        return self._values[one]

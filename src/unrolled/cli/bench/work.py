"""What a row computes: our layer, torch's with the same weights, the input, and when results agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.cli.bench.grid import CELLS, Row
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS

Call = Callable[[], Sequence[Any]]

# Largest difference of two float32 runtimes that agree, of the largest magnitude of a result: sums of
# 1000 steps and more, added up in another order.
TOLERANCE = {"inference": 1e-4, "training": 1e-3, "streaming": 1e-4}

_DROP_IN = {layer.__name__.lower(): layer for layer in LAYERS}


class Work:
    """A row made ready to compute, drawn with a fixed seed.

    Attributes:
        row: the row.
        ours: our layer.
        theirs: torch.nn's layer with the same parameters, or a Python loop over the step where it has
            none; its parameters come in the order of ``ours``.
        x: the input, ``(time, batch, input)``; it takes gradients in training.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.x = torch.randn(row.time, row.batch, row.input)
            self.ours = _layer(row)
        if row.standard:
            torch_class: Callable[..., nn.Module] = _DROP_IN[row.cell].torch_class
            self.theirs = torch_class(row.input, row.hidden)
            self.theirs.load_state_dict(self.ours.state_dict())
        else:
            self.theirs = Loop(Step(self.ours))
        self.x.requires_grad_(row.mode == "training")

    def weights(self) -> list[Any]:
        """The parameters as NumPy arrays, in the order of the layer."""
        return [parameter.detach().numpy() for parameter in self.ours.parameters()]

    def call(self, module: Callable[..., Any], parameters: Iterable[Tensor]) -> Call:
        """A call of a torch module that computes the row.

        Args:
            module: takes the input, and the states where they are streamed; returns the output and the
                final states.
            parameters: for which gradients are computed in training.
        """
        x, leaves = self.x, [self.x, *parameters]

        def infer() -> list[Tensor]:
            with torch.no_grad():
                output, state = module(x)
            return [output, *(state if isinstance(state, (tuple, list)) else (state,))]

        def train() -> Sequence[Tensor]:
            return torch.autograd.grad(module(x)[0].sum(), leaves)

        return {"inference": infer, "training": train, "streaming": self.streamed(module)}[self.row.mode]

    def streamed(self, module: Callable[..., Any]) -> Call:
        """A call that computes the row one step after another; ``module`` as for :meth:`call`."""
        steps: tuple[Tensor, ...] = torch.split(self.x, 1)

        def stream() -> list[Tensor]:
            outputs, state = [], None
            with torch.no_grad():
                for now in steps:
                    output, state = module(now, state)
                    outputs.append(output)
            return [torch.cat(outputs), *(state if isinstance(state, (tuple, list)) else (state,))]

        return stream

    def exact(self) -> Sequence[Tensor]:
        """What torch computes of the row in float64."""
        twin, module = copy.copy(self), copy.deepcopy(self.theirs).double()
        twin.x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        return twin.call(module, module.parameters())()


def _layer(row: Row) -> Recurrent:
    if row.standard:
        return _DROP_IN[row.cell](row.input, row.hidden)
    return Recurrent(CELLS[row.cell], row.input, row.hidden)


class Step(nn.Module):
    """One step of a layer's cell as a module: input and states to new states, with its parameters."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        cell: Cell = layer.cell(layer.input_size, layer.hidden_size)
        names = list(cell.shapes())
        parameters = dict(zip(names, layer.parameters(), strict=True))
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.sizes = list(cell.state_sizes().values())
        self.bound = cell.bind(parameters)

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        """``(batch, input)`` and the states to the new states; a tuple where there are several."""
        return self.bound.step(x, *state)

    def states(self, x: Tensor) -> list[Tensor]:
        """The states before the first step of ``(time, batch, input)``: zeros."""
        return [x.new_zeros(x.shape[1], size) for size in self.sizes]


class Loop(nn.Module):
    """A step in a Python loop over time, as people write it.

    Args:
        step: its parameters and its sizes.
        run: what is called in its place, such as the step compiled.
    """

    def __init__(self, step: Step, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.step = step
        self.run = run or step.bound.step

    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """``(time, batch, input)`` to the output of every step and the final states."""
        outputs = []
        state = self.step.states(x) if state is None else state
        for now in x.unbind(0):
            new = self.run(now, *state)
            state = list(new) if isinstance(new, tuple) else [new]
            outputs.append(state[0])
        return torch.stack(outputs), state


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference of two results, each tensor's of its own largest magnitude.

    Raises:
        ValueError: there are not as many tensors, or not of the same sizes.
    """
    if len(found) != len(expected):
        raise ValueError(f"it gave {len(found)} results, expected {len(expected)}")
    apart = [0.0]
    for a, b in zip(map(_array, found), map(_array, expected), strict=True):
        if a.size != b.size:
            raise ValueError(f"it gave a result of the shape {a.shape}, expected {b.shape}")
        scale = max(float(numpy.abs(b).max()), 1e-30)
        apart.append(float(numpy.abs(a.reshape(b.shape) - b).max()) / scale)
    return float(numpy.max(apart))  # NaN where any is


def _array(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    return numpy.asarray(value, dtype=numpy.float64)

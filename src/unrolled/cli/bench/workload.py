"""The computation of a row: our layer, torch's layer with the same weights, the input and the tolerance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unrolled.cells.base import Cell
from unrolled.cli.bench.rows import CELLS, Row
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS

Call = Callable[[], Sequence[Any]]

# Largest accepted difference between two float32 runtimes, relative to the largest magnitude of a result:
# they add up sums of 1000 steps and more in different orders.
TOLERANCE = {"inference": 1e-4, "training": 1e-3, "streaming": 1e-4}

_CPU = torch.device("cpu")
_DROP_IN = {layer.__name__.lower(): layer for layer in LAYERS}


class Workload:
    """The layers and the input of a row, initialized with a fixed seed.

    Args:
        row: The row.
        device: The device of the layers and the input.

    Attributes:
        row: The row.
        ours: Our layer.
        theirs: The layer of torch.nn with the same parameters. If torch.nn doesn't have the cell, a Python
            loop over its step, with the parameters in the order of ``ours``.
        x: The input of shape ``(time, batch, input)``. It requires gradients in training.
    """

    def __init__(self, row: Row, device: torch.device = _CPU) -> None:
        self.row = row
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.x = torch.randn(row.time, row.batch, row.input).to(device)
            self.ours = _new_layer(row).to(device)
        if row.standard:
            torch_class: Callable[..., nn.Module] = _DROP_IN[row.cell].torch_class
            self.theirs = torch_class(row.input, row.hidden).to(device)
            self.theirs.load_state_dict(self.ours.state_dict())
        else:
            self.theirs = Loop(Step(self.ours))
        self.x.requires_grad_(row.mode == "training")

    def weights(self) -> list[Any]:
        """Return the parameters of the layer in order, as NumPy arrays."""
        return [parameter.detach().numpy() for parameter in self.ours.parameters()]

    def call(self, module: Callable[..., Any], parameters: Iterable[Tensor]) -> Call:
        """Return a function that computes the row with a torch module.

        Args:
            module: A module that takes the input and, for streaming, the states, and returns the output and
                the final states.
            parameters: The parameters to compute gradients for in training.
        """
        x, leaves = self.x, [self.x, *parameters]

        def infer() -> list[Tensor]:
            with torch.no_grad():
                output, state = module(x)
            return [output, *(state if isinstance(state, (tuple, list)) else (state,))]

        def train() -> Sequence[Tensor]:
            return torch.autograd.grad(module(x)[0].sum(), leaves)

        return {"inference": infer, "training": train, "streaming": self._streaming_call(module)}[
            self.row.mode
        ]

    def _streaming_call(self, module: Callable[..., Any]) -> Call:
        """Return a function that calls the module once per time step; ``module`` as for :meth:`call`."""
        steps: tuple[Tensor, ...] = torch.split(self.x, 1)

        def stream() -> list[Tensor]:
            outputs, state = [], None
            with torch.no_grad():
                for x_t in steps:
                    output, state = module(x_t, state)
                    outputs.append(output)
            return [torch.cat(outputs), *(state if isinstance(state, (tuple, list)) else (state,))]

        return stream

    def float64_result(self) -> Sequence[Tensor]:
        """Return the result of torch in float64."""
        double, module = copy.copy(self), copy.deepcopy(self.theirs).double()
        double.x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        return double.call(module, module.parameters())()


def _new_layer(row: Row) -> Recurrent:
    if row.standard:
        return _DROP_IN[row.cell](row.input, row.hidden)
    return Recurrent(CELLS[row.cell], row.input, row.hidden)


class Step(nn.Module):
    """One step of a layer's cell as a module from input and states to new states."""

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
        """Return the new states, a tuple if there are several, for an input of shape ``(batch, input)``."""
        return self.bound.step(x, *state)

    def zero_states(self, x: Tensor) -> list[Tensor]:
        """Return initial states of zeros for an input of shape ``(time, batch, input)``."""
        return [x.new_zeros(x.shape[1], size) for size in self.sizes]


class Loop(nn.Module):
    """A Python loop over time, as people write it by hand.

    Args:
        step: The step, which has the parameters and the sizes of the states.
        run: A function to call instead of the step, such as the compiled step.
    """

    def __init__(self, step: Step, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.step = step
        self.run = run or step.bound.step

    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the output of all steps and the final states; ``x`` has shape ``(time, batch, input)``."""
        outputs = []
        state = self.step.zero_states(x) if state is None else state
        for x_t in x.unbind(0):
            new = self.run(x_t, *state)
            state = list(new) if isinstance(new, tuple) else [new]
            outputs.append(state[0])
        return torch.stack(outputs), state


def max_difference(result: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference between two results, relative to the largest magnitude of each tensor.

    Raises:
        ValueError: If the numbers of tensors or their sizes differ.
    """
    if len(result) != len(expected):
        raise ValueError(f"expected {len(expected)} results, got {len(result)}")
    differences = [0.0]
    for a, b in zip(map(_to_array, result), map(_to_array, expected), strict=True):
        if a.size != b.size:
            raise ValueError(f"expected a result of shape {b.shape}, got {a.shape}")
        scale = max(float(numpy.abs(b).max()), 1e-30)
        differences.append(float(numpy.abs(a.reshape(b.shape) - b).max()) / scale)
    return float(numpy.max(differences))  # unlike max, NaN if any difference is NaN


def _to_array(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return numpy.asarray(value, dtype=numpy.float64)

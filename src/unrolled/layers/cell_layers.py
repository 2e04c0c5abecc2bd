"""Single-step cells as layers: a step is a sequence of one time step."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from unrolled.layers.module import parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.tensors import map_tensors
from unrolled.layers.torch_layers import CELLS, DropInCell

SingleStepModule = SingleStep | nn.RNNCellBase


def is_single_step(module: Any) -> TypeGuard[SingleStepModule]:
    """Whether a module is a cell that its caller runs step by step."""
    return isinstance(module, (SingleStep, nn.RNNCellBase))


def layer_of_cell(module: nn.Module) -> Recurrent:
    """Return a layer that computes each of its time steps as a single-step cell does.

    The layer shares the parameters of the cell and has its mode.

    Args:
        module: A single-step cell of this library, or a torch.nn.RNNCell, LSTMCell or GRUCell.

    Raises:
        TypeError: If ``module`` isn't such a cell.
    """
    options: dict[str, Any] = {"bias": bool(module.bias), "device": "meta"}
    if isinstance(module, SingleStep):
        cell = module.cell
        options |= module.chosen_options()
    else:
        cell = _drop_in(module).cell_class
        if "nonlinearity" in cell.options():
            options["nonlinearity"] = module.nonlinearity
    layer: Any = Recurrent(cell, int(module.input_size), int(module.hidden_size), **options)  # type: ignore[arg-type]
    with parametrizations_in_eval_mode(module):
        for name in layer._first.shapes():
            delattr(layer, f"{name}_l0")
            setattr(layer, f"{name}_l0", getattr(module, name))
    result: Recurrent = layer.train(module.training)
    return result


def cell_forward(module: nn.Module) -> list[Any]:
    """Return the forward methods of this library or torch.nn that a single-step cell can have."""
    if isinstance(module, SingleStep):
        return [DropInCell.forward, SingleStep.forward]
    return [_drop_in(module).torch_class.forward]


def as_sequence(value: Any) -> Any:
    """Add the axis of time, or of layers, to the input or the states of a single step."""
    return map_tensors(value, lambda tensor: tensor.unsqueeze(0))


def first_state(state: Any) -> Tensor:
    """Return the first state of a single-step cell, which is its output."""
    output: Tensor = state[0] if isinstance(state, tuple) else state
    return output


def _drop_in(module: nn.Module) -> type[DropInCell]:
    for ours in CELLS:
        if isinstance(module, ours.torch_class):
            return ours
    names = ", ".join(f"torch.nn.{ours.torch_class.__name__}" for ours in CELLS)
    raise TypeError(f"expected a single-step cell of unrolled, {names}, got {type(module).__name__}")

"""Single-step cells as layers: a step is a sequence of one time step."""

from __future__ import annotations

from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from unrolled.layers.module import parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.tensors import map_tensors
from unrolled.layers.torch_layers import CELLS, DropInCell

SingleStepModule = SingleStep | nn.RNNCell | nn.LSTMCell | nn.GRUCell


def is_single_step(module: Any) -> TypeGuard[SingleStepModule]:
    """Whether a module is a cell that its caller runs step by step."""
    return isinstance(module, SingleStepModule)


def layer_of_cell(module: nn.Module) -> Recurrent:
    """Return a layer that computes each of its time steps as a single-step cell does.

    The layer shares the parameters of the cell and has its mode.

    Args:
        module: A single-step cell of this library, or a torch.nn.RNNCell, LSTMCell or GRUCell.

    Raises:
        TypeError: If ``module`` isn't such a cell.
    """
    template = _template(module)
    with parametrizations_in_eval_mode(module):
        weights = {name: getattr(module, name) for name in template._first.shapes()}
    layer = template.with_cells([template._first.bind(weights)])
    layer.training = module.training
    if isinstance(module, SingleStep) and module.weight_storage is not None:
        layer.weight_storage = module.weight_storage
        vars(layer)["_cells"] = dict.fromkeys(layer._cells, module._first)
    return layer


def _template(module: nn.Module) -> Recurrent:
    """Return a layer without weights for a cell. It is kept, since creating one takes long."""
    arguments: dict[str, Any] = {"bias": bool(module.bias)}
    if isinstance(module, SingleStep):
        cell = module.cell
        arguments |= module.chosen_options()
    else:
        cell = _drop_in(module).cell_class
        if "nonlinearity" in cell.options():
            arguments["nonlinearity"] = module.nonlinearity
    sizes: Any = module.input_size, module.hidden_size
    key = cell, sizes, arguments
    kept = _templates.get(module)
    if kept is None or kept[0] != key:
        kept = _templates[module] = key, Recurrent(cell, *sizes, device="meta", **arguments)
    return kept[1]


_templates: WeakKeyDictionary[nn.Module, tuple[Any, Recurrent]] = WeakKeyDictionary()


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

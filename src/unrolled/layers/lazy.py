"""Layers whose number of input features is taken from their first input, as in torch.nn.LazyLinear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import Cell


def stacked_cells(
    cell: type[Cell],
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    **options: Any,
) -> dict[str, Cell]:
    """Return the cells of stacked layers by suffix, such as ``_l0_reverse``.

    Args:
        cell: The class of the cells.
        input_size: Number of input features of layer 0. The others read the output of the layer below.
        hidden_size: Number of units in the hidden state.
        num_layers: Number of layers.
        bidirectional: Whether each layer has a second direction.
        options: ``bias`` and the options of the cell.
    """
    cells: dict[str, Cell] = {}
    features, directions = input_size, ("", "_reverse") if bidirectional else ("",)
    for k in range(num_layers):
        for direction in directions:
            unbound = cells[f"_l{k}{direction}"] = cell(features, hidden_size, **options)
        features = len(directions) * next(iter(unbound.state_sizes().values()))
    return cells


def uninitialized_parameter(device: Any, dtype: Any) -> nn.Parameter:
    """Return a parameter that has no shape yet."""
    create: Any = nn.UninitializedParameter
    parameter: nn.Parameter = create(device=device, dtype=dtype)
    return parameter


def take_input_size(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Create the parameters of a module for the features of its input: a forward pre-hook.

    Raises:
        RuntimeError: If torch.compile or another transform records the call.
        ValueError: If the cell doesn't support this number of features.
    """
    x = args[0] if args else kwargs.get("x", kwargs.get("input"))
    x = x.data if isinstance(x, PackedSequence) else x
    if not isinstance(x, Tensor) or x.dim() == 0:
        return  # the call raises an error
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{type(module).__name__} doesn't know its input_size yet: call it once before you compile or "
            "export it"
        )
    set_input_size(module, x.shape[-1])
    module.reset_parameters()
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


def set_input_size(module: Any, input_size: int) -> None:
    """Create the parameters of a module, without values.

    Args:
        module: A module of cells whose ``input_size`` is not known yet.
        input_size: Number of input features.

    Raises:
        ValueError: If the cell doesn't support this number of features.
    """
    module._set_cells(module._new_cells(input_size))
    for suffix, cell in module._cells.items():
        for name, shape in cell.shapes().items():
            parameter = module._parameters[name + suffix]
            if is_lazy(parameter):
                parameter.materialize(shape)
    module.input_size = input_size
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is take_input_size:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def find_input_size(module: Any, tensors: Mapping[str, Any], prefix: str) -> int | None:
    """Return the number of input features for which a module has parameters of given shapes.

    Args:
        module: A module of cells whose ``input_size`` is not known yet.
        tensors: Tensors by name, such as a state dict.
        prefix: What the names of the module's own parameters begin with.

    Returns:
        The number, or None if the shapes fit no number.
    """
    names = [f"{name}{suffix}" for suffix, cell in module._cells.items() for name in cell.shapes()]
    given = [tensors.get(prefix + name) for name in names]
    if any(not isinstance(tensor, Tensor) or is_lazy(tensor) for tensor in given):
        return None
    shapes = [tuple(tensor.shape) for tensor in given if tensor is not None]
    axes = sorted({size for shape in shapes for size in shape})
    candidates: list[int] = axes + [size - module.hidden_size for size in axes]
    for input_size in candidates:
        try:
            cells = module._new_cells(input_size)
        except ValueError:
            continue
        if [shape for cell in cells.values() for shape in cell.shapes().values()] == shapes:
            return input_size
    return None

"""torch.nn's recurrent layers as ours, and ours as torch.nn's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unrolled.cell import Cell
from unrolled.cell_module import CellModule
from unrolled.drop_in import CELLS, LAYERS, DropInCell, DropInLayer
from unrolled.layers import Recurrent
from unrolled.recording import at_rest

_Layer = TypeVar("_Layer", bound=nn.Module)


def drop_in_of(cell: type[Cell]) -> type[DropInLayer] | None:
    """The drop-in layer that computes with exactly this cell, if torch.nn has one like it."""
    return next((layer for layer in LAYERS if layer.cell_class is cell), None)


def recurrent(module: nn.Module) -> Recurrent:
    """The layer of this library that computes what a module does: the module itself if it is one.

    Raises:
        TypeError: any other module than a recurrent layer, or a subclass that computes something of its own.
    """
    if not isinstance(module, Recurrent):
        return from_torch(module)
    if _forward(module) not in (Recurrent.forward, DropInLayer.forward):
        base = next(base for base in type(module).__mro__ if base.__module__.startswith("unrolled."))
        raise _overrides(module, f"unrolled.{base.__name__}")
    return module


def from_torch(module: nn.Module) -> Recurrent:
    """Our layer with the very parameters of a torch.nn.RNN, LSTM or GRU, in its mode.

    Raises:
        TypeError: any other module, or a subclass that computes something of its own.
    """
    for ours in LAYERS:
        if isinstance(module, ours.torch_class):
            break
    else:
        names = ", ".join(f"torch.nn.{ours.torch_class.__name__}" for ours in LAYERS)
        raise TypeError(
            f"expected a recurrent layer, one of unrolled's or {names}, got {type(module).__name__}"
        )
    if _forward(module) is not ours.torch_class.forward:
        raise _overrides(module, f"torch.nn.{ours.torch_class.__name__}")
    layer = _quietly(ours, **_arguments(module, ours), device="meta")
    with at_rest(module):
        for name in [name for name, _ in layer.named_parameters()]:
            delattr(layer, name)
            setattr(layer, name, getattr(module, name))
    return layer.train(module.training)


def to_torch(layer: Recurrent, weights: Mapping[str, Tensor] | None = None) -> nn.RNNBase:
    """The layer of torch.nn that computes the same, with copies of the parameters, in its mode.

    Args:
        layer: a layer whose cell torch.nn has.
        weights: what to take in the place of the layer's own parameters, by name.

    Raises:
        ValueError: torch.nn has no such cell.
    """
    ours = drop_in_of(layer.cell)
    if ours is None:
        raise ValueError(f"torch.nn has no layer that computes {layer.cell.__name__}")
    if not layer.plain:
        raise ValueError(
            f"torch.nn has no {ours.torch_class.__name__} with learned initial states, dropout over time or "
            f"zoneout, as {layer} has"
        )
    weights = weights or layer.state_dict()
    like = next(iter(weights.values()))
    twin = _quietly(ours.torch_class, **_arguments(layer, ours), device="meta", dtype=like.dtype)
    twin = twin.to_empty(device=like.device)  # built without drawing random numbers
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[name])
    return twin.train(layer.training)


def like(module: nn.Module, kind: Any) -> nn.Module:
    """A module of this class with the arguments of another one, ours or torch.nn's, without data."""
    known: tuple[Any, ...] = (*LAYERS, *CELLS)
    ours = next(one for one in known if kind in (one, one.torch_class))
    made: nn.Module = _quietly(kind, **_arguments(module, ours), device="meta")
    return made.train(module.training)


def _forward(module: nn.Module) -> Any:
    """The function that a call of a module runs, which a wrapper may have put upon this one alone."""
    own = vars(module).get("forward", type(module).forward)
    return own.__func__ if getattr(own, "__self__", None) is module else own


def _overrides(module: nn.Module, base: str) -> TypeError:
    how = "has its own forward in the place of that" if "forward" in vars(module) else "overrides the forward"
    return TypeError(
        f"{type(module).__name__} {how} of {base}: what it computes can't be read from its parameters"
    )


def _quietly(make: type[_Layer], **arguments: Any) -> _Layer:
    """A layer like one that there is already: of what its arguments warn, its maker has been told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropout option adds dropout")
        return make(**arguments)


def _arguments(layer: nn.Module, ours: type[DropInLayer] | type[DropInCell]) -> dict[str, Any]:
    names = ["input_size", "hidden_size", "bias"]
    if issubclass(ours, DropInLayer):
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
    arguments: dict[str, Any] = {name: getattr(layer, name) for name in names}
    for name in ours.cell_class.options():
        chosen = layer.chosen_options() if isinstance(layer, CellModule) else vars(layer)
        if name in inspect.signature(ours).parameters:  # of a single step not all are
            arguments[name] = chosen[name]
    return arguments

"""Every recurrent layer and cell of a model swapped for its counterpart: torch.nn's for ours, and back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unrolled.cells.base import Cell
from unrolled.layers.module import CellModule, at_rest
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import CELLS, LAYERS, DropInCell, DropInLayer

_Module = TypeVar("_Module", bound=nn.Module)

_KNOWN: tuple[Any, ...] = (*LAYERS, *CELLS)
_OURS: dict[type[nn.Module], Any] = {ours.torch_class: ours for ours in _KNOWN}
_THEIRS: dict[type[nn.Module], Any] = {ours: theirs for theirs, ours in _OURS.items()}
_ALONE = frozenset(vars(nn.Module()))  # what every module holds: parameters, buffers, hooks, mode


def convert(model: _Module) -> Any:
    """Swap every recurrent layer and cell of torch.nn in a model for ours.

    ::

        model = unrolled.convert(model)

    The new ones hold the very parameters of the old ones, so that optimisers and state dicts stay as they
    are, and their mode, device and hooks. They stand where the old ones stood: the model is changed in place.
    A subclass of torch.nn's, a layer with parametrizations, and one on which an attribute was put whose name
    ours use themselves (``lstm.cell = …``) is left alone with a warning: what it computes may be something of
    its own.

    Args:
        model: any module. A recurrent layer itself can't be changed into another: use what is returned.

    Returns:
        The model, or the layer that takes its place where it is a recurrent layer itself.

    Raises:
        TypeError: it is no module. Whatever is raised, the model is as it was.
    """
    return _swapped(model, _OURS, _left_by_convert)


def revert(model: _Module) -> Any:
    """Swap every recurrent layer and cell of ours in a model for torch.nn's: the reverse of :func:`convert`.

    A layer that torch.nn has no counterpart of, of another cell or with learned initial states for instance,
    is left alone with a warning.

    Args:
        model: any module.

    Returns:
        The model, or the layer that takes its place where it is a recurrent layer itself.

    Raises:
        TypeError: it is no module. Whatever is raised, the model is as it was.
    """
    return _swapped(model, _THEIRS, _left_by_revert)


def _swapped(model: Any, table: dict[type[nn.Module], Any], left: Callable[[nn.Module], str | None]) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    new: dict[int, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for path, module in model.named_modules():
        why = left(module)
        if why is None and type(module) in table:
            made = like(module, table[type(module)])
            usual = like(module, type(module))
            why = _obstacle(module, made, usual)
            if why is None:
                new[id(module)] = _filled(made, module, usual)
        if why is not None:
            name = f"module {path!r}" if path else "the model"
            warnings.warn(f"{name}, of the class {type(module).__name__}, is left alone: {why}", stacklevel=3)
        for name, child in module._modules.items():
            if child is not None:
                places.append((module, name, child))
    for parent, name, child in places:  # all are made by now: nothing can fail half way
        if id(child) in new:
            parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def _obstacle(module: nn.Module, made: nn.Module, usual: nn.Module) -> str | None:
    """Why a module can't go on as another one, made like it; None where it can.

    Args:
        module: as its users have it.
        made: of the other class.
        usual: of the same class, as it comes.
    """
    for name in _names(module) - _names(usual):
        if name in _names(made) or name in dir(made):
            return f"its attribute {name!r}, which its class doesn't have, has a meaning in the other class"
    for name, parameter in made._parameters.items():
        held = module._parameters.get(name)
        if held is not None and parameter is not None and held.shape != parameter.shape:
            shapes = f"{tuple(held.shape)}, and its sizes ask for {tuple(parameter.shape)}"
            return f"its {name} has the shape {shapes}"
    return None


def _names(module: nn.Module) -> set[str]:
    """All that a module holds, by name."""
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def _filled(made: nn.Module, module: nn.Module, usual: nn.Module) -> nn.Module:
    """A module of another class with what a module holds, and what users have put on it."""
    own = {*vars(made), *vars(usual)}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            held = vars(made)[name]
            held.clear()
            held.update(value)
        elif name in _ALONE or name not in own:
            vars(made)[name] = value
    if isinstance(made, nn.RNNBase):
        made._init_flat_weights()
    return made


def _left_by_convert(module: nn.Module) -> str | None:
    """Why a module that looks like one to convert isn't converted; None where that's no question."""
    if not isinstance(module, tuple(_OURS)) or type(module) in _OURS:
        return None
    if parametrize.is_parametrized(module):
        return "its parametrizations are of torch.nn's layer; remove them, convert, and register them again"
    return "a subclass may compute something of its own"


def _left_by_revert(module: nn.Module) -> str | None:
    if not isinstance(module, (Recurrent, SingleStep)):
        return None
    if type(module) not in _THEIRS:
        return "torch.nn has no counterpart of it"
    if isinstance(module, Recurrent) and not module.plain:
        options = ("initial_state", "variational_dropout", "recurrent_dropout", "zoneout")
        has = [
            f"{name}={getattr(module, name)!r}"
            for name in options
            if getattr(module, name) not in ("zeros", 0)
        ]
        return f"torch.nn has no option {', '.join(has)}"
    return None


_Layer = TypeVar("_Layer", bound=nn.Module)


def drop_in_layer(cell: type[Cell]) -> type[DropInLayer] | None:
    """The drop-in layer that computes with exactly this cell, if torch.nn has one like it."""
    return next((layer for layer in LAYERS if layer.cell_class is cell), None)


def as_recurrent(module: nn.Module) -> Recurrent:
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
    ours = drop_in_layer(layer.cell)
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

"""Conversion of recurrent layers and cells between torch.nn and this library."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unrolled.cells.base import Cell
from unrolled.layers.module import CellModule, parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import CELLS, LAYERS, DropInCell, DropInLayer

_Module = TypeVar("_Module", bound=nn.Module)

_DROP_INS: tuple[Any, ...] = (*LAYERS, *CELLS)
_FROM_TORCH: dict[type[nn.Module], Any] = {ours.torch_class: ours for ours in _DROP_INS}
_TO_TORCH: dict[type[nn.Module], Any] = {ours: theirs for theirs, ours in _FROM_TORCH.items()}
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, training mode and so on


def convert(model: _Module) -> Any:
    """Replace every torch.nn recurrent layer and cell in a model by its counterpart in this library.

    ::

        model = unrolled.convert(model)

    The model is changed in place. The new modules share the parameters of the old ones, so optimizers and
    state dicts remain valid. They also keep the mode, the device and the hooks.

    Modules that may compute something else aren't replaced, and a warning names them. These are subclasses,
    modules with parametrizations, and modules with an additional attribute whose name the new class uses,
    such as ``lstm.cell = …``.

    Args:
        model: Any module. If it is a recurrent layer itself, it isn't changed: use the returned layer.

    Returns:
        The model. If it is a recurrent layer itself, the new layer.

    Raises:
        TypeError: If ``model`` isn't a module. After any exception the model is unchanged.
    """
    return _replace_modules(model, _our_class, _reason_not_to_convert)


def revert(model: _Module) -> Any:
    """Replace every recurrent layer and cell of this library by its torch.nn counterpart.

    This is the inverse of :func:`convert`. It also replaces ``Recurrent(unrolled.cells.LSTM, …)``. Layers
    without a counterpart in torch.nn aren't replaced, and a warning names them: layers of other cells, or
    with learned initial states, for instance.

    Args:
        model: Any module.

    Returns:
        The model. If it is a recurrent layer itself, the new layer.

    Raises:
        TypeError: If ``model`` isn't a module. After any exception the model is unchanged.
    """
    return _replace_modules(model, _torch_class, _reason_not_to_revert)


def _our_class(module: nn.Module) -> Any:
    """Return the class of this library that replaces a module of torch.nn. None for all other modules."""
    return _FROM_TORCH.get(type(module))


def _torch_class(module: nn.Module) -> Any:
    """Return the class of torch.nn that replaces a module of this library. None for all other modules."""
    if type(module) in (Recurrent, SingleStep):
        drop_ins: tuple[Any, ...] = LAYERS if isinstance(module, Recurrent) else CELLS
        return next((ours.torch_class for ours in drop_ins if ours.cell_class is module.cell), None)
    return _TO_TORCH.get(type(module))


def _replace_modules(
    model: Any,
    new_class: Callable[[nn.Module], Any],
    reason_to_skip: Callable[[nn.Module], str | None],
) -> Any:
    """Replace the modules of a model by their counterparts, and warn about those that can't be replaced.

    Args:
        model: The model, changed in place.
        new_class: Returns the class that replaces a module, or None if it isn't to be replaced.
        reason_to_skip: Returns why a module must not be replaced, or None.

    Returns:
        The model, or its counterpart if it has one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    replacements: dict[int, nn.Module] = {}
    children: list[tuple[nn.Module, str, nn.Module]] = []
    for path, module in model.named_modules():
        reason = reason_to_skip(module)
        cls = new_class(module) if reason is None else None
        if cls is not None:
            replacement = empty_counterpart(module, cls)
            pristine = empty_counterpart(module, _opposite(cls))
            reason = _find_conflict(module, replacement, pristine)
            if reason is None:
                replacements[id(module)] = _transfer_contents(replacement, module, pristine)
        if reason is not None:
            name = f"module {path!r}" if path else "the model"
            warnings.warn(f"{name} ({type(module).__name__}) is not converted: {reason}", stacklevel=3)
        for name, child in module._modules.items():
            if child is not None:
                children.append((module, name, child))
    for parent, name, child in children:  # the model changes only now, when nothing can fail any more
        if id(child) in replacements:
            parent._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)


def _opposite(cls: type[nn.Module]) -> Any:
    """Return the class of the same layer or cell in the other library."""
    return _FROM_TORCH.get(cls) or _TO_TORCH[cls]


def _find_conflict(module: nn.Module, replacement: nn.Module, pristine: nn.Module) -> str | None:
    """Return why a module's contents can't be transferred to its replacement, or None if they can.

    Args:
        module: The user's module.
        replacement: Its empty counterpart of the other class.
        pristine: An empty module of the same class, to find attributes that users added.
    """
    for name in _attribute_names(module) - _attribute_names(pristine):
        if name in _attribute_names(replacement) or name in dir(replacement):
            return f"its additional attribute {name!r} has a meaning in the other class"
    for name, expected in replacement._parameters.items():
        parameter = module._parameters.get(name)
        if parameter is not None and expected is not None and parameter.shape != expected.shape:
            return f"its {name} has the shape {tuple(parameter.shape)}, expected {tuple(expected.shape)}"
    return None


def _attribute_names(module: nn.Module) -> set[str]:
    """Return the names of all attributes of an instance, including parameters, buffers and submodules."""
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def _transfer_contents(replacement: nn.Module, module: nn.Module, pristine: nn.Module) -> nn.Module:
    """Give a module's parameters, submodules, hooks and additional attributes to its replacement.

    Args:
        replacement: The empty counterpart of the other class.
        module: The user's module.
        pristine: An empty module of the same class.

    Returns:
        The replacement.
    """
    class_attributes = {*vars(replacement), *vars(pristine)}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            contents = vars(replacement)[name]
            contents.clear()
            contents.update(value)
        elif name in _MODULE_ATTRIBUTES or name not in class_attributes:
            vars(replacement)[name] = value
    if isinstance(replacement, nn.RNNBase):
        replacement._init_flat_weights()
    return replacement


def _reason_not_to_convert(module: nn.Module) -> str | None:
    """Return why a variant of a torch.nn layer must not be converted. None for all other modules."""
    if not isinstance(module, tuple(_FROM_TORCH)) or type(module) in _FROM_TORCH:
        return None
    if parametrize.is_parametrized(module):
        return "it has parametrizations; remove them, convert the layer, and register them again"
    return "it is a subclass, which may compute something else"


def _reason_not_to_revert(module: nn.Module) -> str | None:
    """Return why a layer of this library has no counterpart in torch.nn. None for all other modules."""
    if not isinstance(module, (Recurrent, SingleStep)):
        return None
    if isinstance(module, tuple(_TO_TORCH)) and type(module) not in _TO_TORCH:
        return "it is a subclass, which may compute something else"
    if _torch_class(module) is None:
        return f"torch.nn has no {module.cell.__name__}"
    if isinstance(module, SingleStep) and module.chosen_options().get("proj_size"):
        return f"torch.nn's cell has no option proj_size={module.chosen_options()['proj_size']}"
    if isinstance(module, Recurrent) and not module.plain:
        options = ("initial_state", "variational_dropout", "recurrent_dropout", "zoneout")
        unsupported = [
            f"{name}={getattr(module, name)!r}"
            for name in options
            if getattr(module, name) not in ("zeros", 0)
        ]
        return f"torch.nn has no option {', '.join(unsupported)}"
    return None


_Layer = TypeVar("_Layer", bound=nn.Module)


def drop_in_layer(cell: type[Cell]) -> type[DropInLayer] | None:
    """Return the drop-in layer class for exactly this cell, or None if torch.nn has no such layer."""
    return next((layer for layer in LAYERS if layer.cell_class is cell), None)


def as_recurrent(module: nn.Module) -> Recurrent:
    """Return a layer of this library that computes the same as a module.

    Args:
        module: A layer of this library, which is returned itself, or a torch.nn.RNN, LSTM or GRU.

    Raises:
        TypeError: If ``module`` isn't a recurrent layer, or overrides ``forward``.
    """
    if not isinstance(module, Recurrent):
        return from_torch(module)
    if _forward(module) not in (Recurrent.forward, DropInLayer.forward):
        base = next(base for base in type(module).__mro__ if base.__module__.startswith("unrolled."))
        raise _forward_error(module, f"unrolled.{base.__name__}")
    return module


def from_torch(module: nn.Module) -> Recurrent:
    """Return a layer of this library with the parameters and mode of a torch.nn.RNN, LSTM or GRU.

    The layers share the parameters.

    Raises:
        TypeError: If ``module`` isn't such a layer, or overrides ``forward``.
    """
    for ours in LAYERS:
        if isinstance(module, ours.torch_class):
            break
    else:
        names = ", ".join(f"torch.nn.{ours.torch_class.__name__}" for ours in LAYERS)
        raise TypeError(f"expected a recurrent layer of unrolled, {names}, got {type(module).__name__}")
    if _forward(module) is not ours.torch_class.forward:
        raise _forward_error(module, f"torch.nn.{ours.torch_class.__name__}")
    layer = _construct_without_warnings(ours, **_constructor_arguments(module, ours), device="meta")
    with parametrizations_in_eval_mode(module):
        for name in [name for name, _ in layer.named_parameters()]:
            delattr(layer, name)
            setattr(layer, name, getattr(module, name))
    return layer.train(module.training)


def to_torch(layer: Recurrent, weights: Mapping[str, Tensor] | None = None) -> nn.RNNBase:
    """Return the torch.nn layer that computes the same, with copies of the parameters, in the same mode.

    Args:
        layer: The layer.
        weights: Tensors by parameter name, used instead of the layer's own parameters.

    Raises:
        ValueError: If torch.nn doesn't have the layer's cell or options.
    """
    ours = drop_in_layer(layer.cell)
    if ours is None:
        raise ValueError(f"torch.nn has no layer that computes {layer.cell.__name__}")
    if not layer.plain:
        raise ValueError(
            f"torch.nn has no {ours.torch_class.__name__} with learned initial states, dropout over time or "
            f"zoneout, but the layer is {layer}"
        )
    weights = weights or layer.state_dict()
    weight = next(iter(weights.values()))
    arguments = _constructor_arguments(layer, ours)
    twin = _construct_without_warnings(ours.torch_class, **arguments, device="meta", dtype=weight.dtype)
    twin = twin.to_empty(device=weight.device)  # the meta device avoids drawing random numbers
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[name])
    return twin.train(layer.training)


def empty_counterpart(module: nn.Module, cls: Any) -> nn.Module:
    """Return a module of a class with the arguments and mode of another one, on the meta device.

    Args:
        module: A layer or cell of this library or of torch.nn.
        cls: The class of the same layer or cell in either library.
    """
    ours = next(drop_in for drop_in in _DROP_INS if cls in (drop_in, drop_in.torch_class))
    arguments = _constructor_arguments(module, ours)
    counterpart: nn.Module = _construct_without_warnings(cls, **arguments, device="meta")
    return counterpart.train(module.training)


def _forward(module: nn.Module) -> Any:
    """Return the function that a call of the module runs. It may be an attribute of the instance."""
    forward = vars(module).get("forward", type(module).forward)
    return forward.__func__ if getattr(forward, "__self__", None) is module else forward


def _forward_error(module: nn.Module, base: str) -> TypeError:
    """Return the error for a module that doesn't use the forward method of its base class."""
    change = "replaces the forward method" if "forward" in vars(module) else "overrides the forward method"
    return TypeError(
        f"{type(module).__name__} {change} of {base}, so its parameters don't determine what it computes"
    )


def _construct_without_warnings(cls: type[_Layer], **arguments: Any) -> _Layer:
    """Construct a copy of a layer without repeating the warning about its dropout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropout option adds dropout")
        return cls(**arguments)


def _constructor_arguments(layer: nn.Module, ours: type[DropInLayer] | type[DropInCell]) -> dict[str, Any]:
    """Return the arguments that a layer was constructed with, except device and dtype.

    Args:
        layer: A layer or cell of this library or of torch.nn.
        ours: Its class in this library.
    """
    names = ["input_size", "hidden_size", "bias"]
    if issubclass(ours, DropInLayer):
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
    arguments: dict[str, Any] = {name: getattr(layer, name) for name in names}
    for name in ours.cell_class.options():
        options = layer.chosen_options() if isinstance(layer, CellModule) else vars(layer)
        if name in inspect.signature(ours).parameters:  # LSTMCell has no proj_size
            arguments[name] = options[name]
    return arguments

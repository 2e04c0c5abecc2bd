"""Conversion of recurrent layers and cells between torch.nn and this library."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unrolled.cells.base import Cell
from unrolled.layers import subclasses
from unrolled.layers.module import CellModule, parametrizations_in_eval_mode
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.replacements import Report, class_name, find_conflict, replace_modules, transfer_contents
from unrolled.layers.single_step import SingleStep
from unrolled.layers.torch_layers import CELLS, LAYERS, DropInCell, DropInLayer

_Module = TypeVar("_Module", bound=nn.Module)

_DROP_INS: tuple[Any, ...] = (*LAYERS, *CELLS)
_FROM_TORCH: dict[type[nn.Module], Any] = {ours.torch_class: ours for ours in _DROP_INS}
_OWN_CLASSES: tuple[type[nn.Module], ...] = (Recurrent, SingleStep, *_DROP_INS)


def convert(model: _Module, *, report: bool = False, keep_types: bool = False) -> Any:
    """Replace every torch.nn recurrent layer and cell in a model by its counterpart in this library.

    ::

        model = unrolled.convert(model)

    The model is changed in place. The new modules share the parameters of the old ones, so optimizers and
    state dicts remain valid. They also keep the mode, the device, the hooks and additional attributes.

    Instances of a subclass, such as ``class Mine(nn.LSTM)``, keep their class, and ``super()`` in its methods
    refers to the layer of this library.

    Modules that may compute something else aren't replaced, and a warning names them: subclasses whose
    ``forward`` doesn't call ``super().forward``, modules with parametrizations, scripted modules, and modules
    with an additional attribute whose name the new class uses, such as ``lstm.cell = …``.

    Args:
        model: Any module. If it is a recurrent layer itself, it isn't changed: use the returned layer.
        report: If True, print which modules were replaced, which weren't, and why, instead of warnings. The
            same report goes to the logger ``unrolled.convert`` at INFO.
        keep_types: If True, the new modules are also instances of the classes that they replace, for code
            that asks for ``isinstance(layer, nn.LSTM)``. ``torch.compile`` then refuses them, as it refuses
            ``nn.LSTM``, unless ``torch._dynamo.config.allow_rnn`` is True. Without it, layers are instances
            of ``nn.RNNBase``. Single-step cells are always instances of the class that they replace.

    Returns:
        The model. If it is a recurrent layer itself, the new layer.

    Raises:
        TypeError: If ``model`` isn't a module. After any exception the model is unchanged.
    """
    found = Report("converted")
    result = replace_modules(_check_module(model), functools.partial(_convert_module, keep_types), found)
    found.publish(report, stacklevel=2)
    return result


def revert(model: _Module, *, report: bool = False) -> Any:
    """Replace every recurrent layer and cell of this library by its torch.nn counterpart.

    This is the inverse of :func:`convert`. It also replaces ``Recurrent(unrolled.cells.LSTM, …)``. Layers
    without a counterpart in torch.nn aren't replaced, and a warning names them: layers of other cells, or
    with learned initial states, for instance.

    Args:
        model: Any module.
        report: If True, print which modules were replaced, which weren't, and why, instead of warnings.

    Returns:
        The model. If it is a recurrent layer itself, the new layer.

    Raises:
        TypeError: If ``model`` isn't a module. After any exception the model is unchanged.
    """
    found = Report("reverted")
    result = replace_modules(_check_module(model), _revert_module, found)
    found.publish(report, stacklevel=2)
    return result


def _check_module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    return model


def _convert_module(keep_type: bool, module: nn.Module) -> nn.Module | str | None:
    """Return the module that replaces one of torch.nn, a reason why there is none, or None for all others."""
    if isinstance(module, CellModule):
        return None
    base: Any = next((theirs for theirs in _FROM_TORCH if isinstance(module, theirs)), None)
    if base is None:
        return _reason_not_to_convert(module)
    if parametrize.is_parametrized(module):
        return "it has parametrizations; remove them, convert the layer, and register them again"
    cls: Any = type(module)
    ours = _FROM_TORCH[base]
    reason = None if cls is base else subclasses.reason_to_keep(cls, ours, base)
    if reason is not None:
        return reason
    replacement, pristine = empty_counterpart(module, ours), empty_counterpart(module, base)
    reason = find_conflict(module, replacement, pristine)
    if reason is not None:
        return reason
    if keep_type or cls is not base:
        replacement = subclasses.with_class(replacement, subclasses.converted_class(cls, ours, base))
    return transfer_contents(replacement, module, pristine)


def _reason_not_to_convert(module: nn.Module) -> str | None:
    """Return why another recurrent module isn't converted. None for modules that aren't recurrent."""
    known = class_name(module) in {theirs.__name__ for theirs in _FROM_TORCH}
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced: convert it before torch.jit" if known else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "it is a recurrent module, but none of the classes of torch.nn that can be converted"
    if known and type(module).__module__.startswith("torch.ao."):
        return "it is quantized: convert it before quantization"
    return None


def _revert_module(module: nn.Module) -> nn.Module | str | None:
    """Return the module of torch.nn that replaces one of this library, a reason, or None for all others."""
    if not isinstance(module, (Recurrent, SingleStep)):
        return None
    original = subclasses.original_class(type(module))
    base = _torch_class(module)
    reason = _reason_not_to_revert(module, base)
    if reason is not None:
        return reason
    replacement, pristine = empty_counterpart(module, base), empty_counterpart(module, _FROM_TORCH[base])
    reason = find_conflict(module, replacement, pristine)
    if reason is not None:
        return reason
    if original is not None:
        replacement = subclasses.with_class(replacement, original)
    return transfer_contents(replacement, module, pristine)


def _torch_class(module: Recurrent | SingleStep) -> Any:
    """Return the class of torch.nn that computes the same as a module, None if there is none."""
    if subclasses.original_class(type(module)) is None and type(module) not in _OWN_CLASSES:
        return None
    drop_ins: tuple[Any, ...] = LAYERS if isinstance(module, Recurrent) else CELLS
    return next((ours.torch_class for ours in drop_ins if ours.cell_class is module.cell), None)


def _reason_not_to_revert(module: Recurrent | SingleStep, base: Any) -> str | None:
    """Return why a module of this library has no counterpart, or None if ``base`` is it."""
    if base is None and type(module) not in _OWN_CLASSES:
        return "it is a subclass, which may compute something else"
    if base is None:
        return f"torch.nn has no {module.cell.__name__}"
    if module.weight_storage is not None:
        return f"it has {module.weight_storage.weights} weights"
    if module.input_size == 0:
        return "its input_size isn't known before its first call"
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

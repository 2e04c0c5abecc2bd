"""``quantize``: recurrent layers with int8, bfloat16 or float16 weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from unrolled.cells.quantized_products import FORMATS, LARGEST_FLOAT16, MAX_TERMS
from unrolled.cells.wrappers import QuantizedWrapper
from unrolled.layers.convert import convert
from unrolled.layers.module import CellModule
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep
from unrolled.quantization.calibration import calibrate
from unrolled.quantization.packed_calls import PackedCalls
from unrolled.quantization.report import ReportFunction
from unrolled.quantization.storage import Storage, stored_dims

_Module = TypeVar("_Module", bound=nn.Module)


def quantize(
    module: _Module,
    weights: str = "int8",
    calibration: Iterable[Any] | None = None,
    *,
    keep: Iterable[str] = (),
    quantize_input: bool = True,
) -> _Module:
    """Return a copy of a module with int8, bfloat16 or float16 weights, for inference on a CPU.

    ::

        small = unrolled.quantize(model.eval())
        y = small(x)
        print(small.report([x]))                   # the error of each layer and state
        torch.save(small.state_dict(), "small.pt")

    All recurrent layers and single-step cells are quantized, those of torch.nn and of this library. Only
    their matrix products with weights change. All other operations are computed in float32.

    - ``"int8"``: each row of a weight matrix has a scale. Activations, the values that the weights are
      multiplied by, are rounded to int8, too, with a scale for each row of the batch. Products are
      accumulated exactly in int32, so outputs don't depend on the batch size or the number of threads. If a
      row of the batch contains infinity or NaN, its result is NaN.
    - ``"bfloat16"`` and ``"float16"``: weights are rounded to 16 bits, and products are computed in float32.

    Weights that are also used outside of matrix products stay in float32. Use the copy like the original, for
    instance in :class:`unrolled.Stream`. Its weights stay packed between calls. Its state dict contains the
    quantized weights and their scales. The copy can also load the state dict of the original. It can be
    exported to C and ONNX, but not traced by :func:`unrolled.trace`.

    Args:
        module: A layer or a model in eval mode, in float32. It isn't changed.
        weights: The format of the weights: ``"int8"``, ``"bfloat16"`` or ``"float16"``.
        calibration: For int8: inputs of the module, each a tensor or a tuple of arguments. The largest
            activations in these batches determine fixed scales, and larger activations are clipped. By
            default, the scales are computed in each call, for each row of the batch.
        keep: Names of layers that stay in float32, such as ``"decoder"``. The name of a submodule keeps all
            layers in it.
        quantize_input: If False, products that depend only on the input of a layer stay in float32. The error
            is smaller. These products are computed for many time steps at once, so they take less time than
            those with a state.

    Returns:
        The copy. Call its attribute ``report`` to compare it with the original, see
        :class:`unrolled.quantization.report.ReportFunction`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the module has no layer to quantize, a layer can't be quantized, or an argument has an
            invalid value.
    """
    _check_arguments(module, weights, calibration, quantize_input)
    kept = _names(keep)
    result: Any = convert(copy.deepcopy(module))
    layers = {name: one for name, one in result.named_modules() if isinstance(one, (Recurrent, SingleStep))}
    for name in kept:
        if not any(_is_inside(layer, name) for layer in layers):
            known = ", ".join(map(repr, layers)) or "none"
            raise ValueError(
                f"keep contains {name!r}, which isn't a recurrent layer: the recurrent layers are {known}"
            )
    layers = {name: one for name, one in layers.items() if not any(_is_inside(name, k) for k in kept)}
    storages = {}
    for name, layer in layers.items():
        _check_layer(name or type(layer).__name__, layer)
        storage = _storage(layer, weights, quantize_input)
        if storage is not None:
            storages[name] = storage
    if not storages:
        raise ValueError(
            f"{type(module).__name__} has no recurrent layer with a matrix product that can be quantized"
            + (f", apart from those in keep ({', '.join(kept)})" if kept else "")
        )
    layers = {name: layers[name] for name in storages}
    scales = {} if calibration is None else calibrate(result, layers, calibration)
    result.requires_grad_(False)
    for name, layer in layers.items():
        _quantize_layer(name, layer, storages[name], quantize_input, scales.get(name, {}))
    result.__dict__["report"] = ReportFunction(result, module, list(layers))
    return result  # type: ignore[no-any-return]


def _check_arguments(module: Any, weights: Any, calibration: Any, quantize_input: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"quantize expects a torch.nn.Module, got {type(module).__name__}")
    if weights not in FORMATS:
        raise ValueError(f"weights should be {' or '.join(map(repr, FORMATS))}, got {weights!r}")
    if calibration is not None and weights != "int8":
        raise ValueError(f"calibration needs weights='int8', got weights={weights!r}: remove one of them")
    if not isinstance(quantize_input, bool):
        raise TypeError(f"quantize_input should be a bool, got {type(quantize_input).__name__}")


def _names(keep: Any) -> list[str]:
    names = [keep] if isinstance(keep, str) else keep
    names = list(names) if isinstance(names, Iterable) else [names]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"keep should be a list of layer names, got {name!r}")
    return names


def _is_inside(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def _check_layer(name: str, layer: CellModule) -> None:
    """Raise ValueError if a layer can't be quantized."""
    if layer.weight_storage is not None:
        raise ValueError(
            f"{name} already has {layer.weight_storage.weights} weights: quantize the float32 model instead"
        )
    if layer.training:
        raise ValueError(f"{name} is in training mode: call .eval() on the model before quantize")
    if layer.input_size == 0:
        raise ValueError(f"{name} has no weights yet: run the model once before quantize")
    for named in layer._named.values():
        for _, full_name, _ in named:
            parameter = layer._parameters.get(full_name)
            if parameter is None:
                raise ValueError(
                    f"{name}.{full_name} isn't a parameter, because of a parametrization or pruning: remove "
                    "that before quantize, or add the layer to keep"
                )
            if parameter.dtype is not torch.float32:
                raise ValueError(
                    f"{name}.{full_name} should be float32, got {parameter.dtype}: call model.float() first"
                )
            if not parameter.is_cpu:
                raise ValueError(
                    f"{name}.{full_name} should be on the CPU, but is on {parameter.device}: call model.cpu()"
                )
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name}.{full_name} contains NaN or infinity")


def _storage(layer: CellModule, weights: str, quantize_input: bool) -> Storage | None:
    """Return how the weights of a layer are stored, or None if there is nothing to quantize."""
    dims: dict[str, int] = {}
    count = 0
    for suffix in layer._cells:
        cell_dims, products = stored_dims(layer._bind(suffix), quantize_input)
        dims |= {name + suffix: dim for name, dim in cell_dims.items()}
        count += products
    for name, dim in dims.items():
        parameter = layer._parameters[name]
        assert parameter is not None
        if weights == "int8" and parameter.shape[dim] > MAX_TERMS:
            raise ValueError(
                f"products with {name} have {parameter.shape[dim]} terms, but int8 supports up to "
                f"{MAX_TERMS}: use bfloat16"
            )
        largest = float(parameter.detach().abs().max())
        if weights == "float16" and largest > LARGEST_FLOAT16:
            raise ValueError(
                f"{name} has values up to {largest:.3g}, but float16 only reaches 65504: use bfloat16"
            )
    return Storage(weights, dims) if count else None


def _quantize_layer(
    name: str,
    layer: Recurrent | SingleStep,
    storage: Storage,
    quantize_input: bool,
    scales: dict[str, tuple[float, ...]],
) -> None:
    """Round the weights of a layer, and wrap its cells."""
    with torch.no_grad():
        for parameter_name in storage.dims:
            parameter: Any = layer._parameters[parameter_name]
            parameter.copy_(storage.rounded(parameter_name, parameter))
    layer._cells = {
        suffix: QuantizedWrapper(cell, storage.weights, quantize_input, scales.get(suffix, ()))
        for suffix, cell in layer._cells.items()
    }
    layer.weight_storage = storage
    if isinstance(layer, Recurrent):
        layer._frozen = PackedCalls(layer)
    else:
        layer._packed = PackedCalls(layer)

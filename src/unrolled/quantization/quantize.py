"""``quantize``: recurrent layers with weights in int8, bfloat16 or float16."""

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
    """Return a copy of a module whose recurrent layers have weights in fewer bits, for inference on a CPU.

    ::

        small = unrolled.quantize(model.eval())
        y = small(x)
        print(small.report([x]))                   # what it costs, for each layer and state
        torch.save(small.state_dict(), "small.pt")

    It applies to every recurrent layer and single-step cell of this library or of torch.nn, with any cell.
    Matrix products with weights change, and everything else is computed in float32:

    - ``"int8"``: weights have one scale per row. The values that enter a product are rounded to int8, too,
      with a scale for each row of the batch. Sums are exact in int32, so outputs don't depend on the batch
      size or the number of threads. A row with an infinity or NaN gives NaN.
    - ``"bfloat16"`` and ``"float16"``: weights are rounded to 16 bits, and products are those of float32.

    Weights that other operations read, too, such as those that multiply a state element by element, stay in
    float32. The copy is used like the original: in :class:`unrolled.Stream` and :class:`unrolled.frozen`, for
    instance. Its weights stay packed between calls. Its state dict contains the weights in fewer bits, and
    their scales. It can also load the state dict of the original.

    Args:
        module: A layer or a model in eval mode, in float32. It isn't changed.
        weights: The format of the weights.
        calibration: For int8: inputs of the module, each a tensor or a tuple of arguments. The scales of the
            values that enter products are then those of the largest values in these batches, and larger
            values are clipped. By default each row of the batch has its own scale.
        keep: Names of layers that stay in float32, such as ``"decoder"``. A name includes all layers inside
            of the module of this name.
        quantize_input: If False, products that depend only on the input of a layer stay in float32. They are
            computed for many time steps at once, but the error is smaller.

    Returns:
        The copy. Its attribute ``report`` compares it with the original, see
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
                f"keep names {name!r}, which is no recurrent layer; the recurrent layers are {known}"
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
            f"{type(module).__name__} has no recurrent layer with matrix products to quantize"
            + (f", except for those in keep ({', '.join(kept)})" if kept else "")
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
        raise ValueError(f"calibration is for weights='int8': only the weights are rounded in {weights}")
    if not isinstance(quantize_input, bool):
        raise TypeError(f"quantize_input should be of type bool, got: {type(quantize_input).__name__}")


def _names(keep: Any) -> list[str]:
    names = [keep] if isinstance(keep, str) else keep
    names = list(names) if isinstance(names, Iterable) else [names]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"keep should be a list of names of layers, got {name!r}")
    return names


def _is_inside(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def _check_layer(name: str, layer: CellModule) -> None:
    """Raise ValueError if a layer can't be quantized."""
    if layer.weight_storage is not None:
        raise ValueError(
            f"{name} has weights in {layer.weight_storage.weights} already: quantize the float model"
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
                    f"{name}.{full_name} is computed in each call: remove the parametrization or pruning "
                    "first, or add the layer to keep"
                )
            if parameter.dtype is not torch.float32:
                raise ValueError(
                    f"{name}.{full_name} is in {parameter.dtype}: convert the model with .float()"
                )
            if not parameter.is_cpu:
                raise ValueError(f"{name}.{full_name} is on {parameter.device}: move the model with .cpu()")
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name}.{full_name} contains NaN or infinity")


def _storage(layer: CellModule, weights: str, quantize_input: bool) -> Storage | None:
    """Return how the weights of a layer are stored, or None if it has no products to quantize."""
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
            raise ValueError(f"{name} has sums of {parameter.shape[dim]} products, int8 supports {MAX_TERMS}")
        largest = float(parameter.detach().abs().max())
        if weights == "float16" and largest > LARGEST_FLOAT16:
            raise ValueError(
                f"{name} has values up to {largest:.3g}, but float16 ends at 65504: use bfloat16"
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

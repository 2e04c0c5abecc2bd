"""Read the weights of a layer as plain CPU tensors, and convert arrays of other libraries to tensors."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep

Array = numpy.ndarray[Any, Any]


def layer_weights(layer: Any, caller: str) -> dict[str, Tensor]:
    """Return the weights of a layer by name, detached and on the CPU.

    Parametrized weights, such as those of weight_norm, are returned as computed.

    Args:
        layer: A layer of unrolled.
        caller: The name of the public function that needs the weights, for error messages.

    Raises:
        TypeError: If `layer` isn't a recurrent layer of unrolled.
        ValueError: If a weight isn't float32 or float64, or is on the meta device.
    """
    if not isinstance(layer, Recurrent):
        advice = "pass its recurrent layers one by one"
        if isinstance(layer, nn.RNNBase):
            advice = "convert it with unrolled.convert first"
        elif isinstance(layer, (SingleStep, nn.RNNCellBase)):
            advice = "pass a layer of this cell instead"
        raise TypeError(
            f"{caller} expects a recurrent layer of unrolled, got {type(layer).__name__}: {advice}"
        )
    weights: dict[str, Tensor] = {}
    for suffix, cell in layer._cells.items():
        bound = layer._bind(suffix)
        weights |= {name + suffix: getattr(bound, name).detach() for name in cell.shapes()}
    if layer.initial_state == "learned":
        weights |= {
            name: value.detach() for name, value in layer.named_parameters() if name.startswith("initial_")
        }
    for name, value in weights.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{caller} supports float32 and float64, but {name} is {value.dtype}")
        if value.is_meta:
            raise ValueError(f"{caller} needs the values of the weights, but {name} is on the meta device")
    return {name: value.cpu() for name, value in weights.items()}


def array_to_tensor(array: Any, description: str) -> Tensor:
    """Copy an array of another library into a tensor.

    Args:
        array: Anything that NumPy converts to an array.
        description: What the array is, for error messages.

    Raises:
        ValueError: If it isn't an array of float16, float32 or float64.
    """
    try:
        values = numpy.array(array)
    except Exception:  # an object that isn't an array can raise anything
        values = numpy.empty(0, object)
    if values.dtype not in (numpy.float16, numpy.float32, numpy.float64):
        actual = values.dtype if values.dtype != object else type(array).__name__
        raise ValueError(f"{description}: expected an array of float16, float32 or float64, got {actual}")
    return torch.from_numpy(values)

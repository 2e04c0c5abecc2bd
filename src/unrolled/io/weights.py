"""The weights of layers as plain numbers, and arrays of other libraries as tensors, checked."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unrolled.layers.recurrent import Recurrent
from unrolled.layers.single_step import SingleStep

Array = numpy.ndarray[Any, Any]


def weights_of(layer: Any, reader: str) -> dict[str, Tensor]:
    """The parameters of a layer's cells by name, whatever they are computed of, on the CPU.

    Args:
        layer: one of ours.
        reader: what they are for, for messages.

    Raises:
        TypeError: no layer of ours.
        ValueError: of a dtype that others don't take, or without numbers.
    """
    if not isinstance(layer, Recurrent):
        mend = "give its layers one by one"
        if isinstance(layer, nn.RNNBase):
            mend = "unrolled.convert makes one of it"
        elif isinstance(layer, (SingleStep, nn.RNNCellBase)):
            mend = "make the layer of this cell"
        raise TypeError(f"{reader} takes a recurrent layer of unrolled, got {type(layer).__name__}: {mend}")
    found: dict[str, Tensor] = {}
    for suffix, cell in layer._cells.items():
        bound = layer._bind(suffix)
        found |= {name + suffix: getattr(bound, name).detach() for name in cell.shapes()}
    if layer.initial_state == "learned":
        found |= {
            name: value.detach() for name, value in layer.named_parameters() if name.startswith("initial_")
        }
    for name, value in found.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{reader} takes float32 and float64, the layer's {name} is of {value.dtype}")
        if value.is_meta:
            raise ValueError(
                f"{reader} takes numbers, and the layer's {name} has none: it is on the device meta"
            )
    return {name: value.cpu() for name, value in found.items()}


def tensor_of(array: Any, what: str) -> Tensor:
    """An array of another library as a tensor of its own.

    Raises:
        ValueError: it is no array of float16, float32 or float64.
    """
    try:
        found = numpy.array(array)
    except Exception:  # whatever an object raises that is none
        found = numpy.empty(0, object)
    if found.dtype not in (numpy.float16, numpy.float32, numpy.float64):
        kind = found.dtype if found.dtype != object else type(array).__name__
        raise ValueError(f"{what} should be an array of float16, float32 or float64, got {kind}")
    return torch.from_numpy(found)

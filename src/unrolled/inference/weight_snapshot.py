"""The weights of a layer as they are now: watched for changes, and packed as its loops read them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from unrolled.engines import dispatch
from unrolled.engines.native import registry
from unrolled.engines.native.prepacked import PrepackedKernel, Weights
from unrolled.layers.recurrent import Recurrent


class IOLayout:
    """How inputs of one shape and their outputs lie in memory where loops read and write them.

    Args:
        shape: of the inputs, as the layer takes them.
        width: of an output.
        held: the layer's weights.
    """

    def __init__(self, shape: torch.Size, width: int, held: WeightSnapshot) -> None:
        batch_first = held.layer.batch_first
        batch, time = shape[:2] if batch_first else (shape[1], shape[0])
        self._batch, self._dtype = batch, held.dtype
        self._turned = batch_first and time > 1 and batch > 1  # else both layouts are one in memory
        ahead = (batch, time) if batch_first and not self._turned else (time, batch)
        # outputs are made like this one
        self._output = torch.empty(*ahead, width, dtype=held.dtype, device="cpu")


class WeightSnapshot:
    """The weights of a layer.

    Attributes:
        dtype: of the parameters; None where there are none, or none that torch watches for changes.
        trains: whether a parameter takes gradients.
    """

    def __init__(self, layer: Recurrent) -> None:
        self.layer = layer
        params = list(layer.parameters())
        # a parametrization may read buffers; a subclass may compute something of its own
        self._watched = [*params, *layer.buffers()]
        watched = params and not any(tensor.is_inference() for tensor in self._watched)
        watched = watched and type(layer).unroll is Recurrent.unroll
        self._named, self._registered = layer._parameters, list(layer._parameters.values())
        self._versions = [tensor._version for tensor in self._watched] if watched else []
        self._places = [tensor.data_ptr() for tensor in self._watched] if watched else []
        self.trains = any(param.requires_grad for param in params)
        self.dtype = params[0].dtype if watched else None
        self._weights: list[list[Weights | None]] | None = None  # by layer and direction

    def changed(self) -> bool:
        """Whether a weight was changed, as far as torch notices, or replaced; where there are any."""
        if self.dtype is None:
            return False
        watched = self._watched
        if [tensor._version for tensor in watched] != self._versions:
            return True
        if [tensor.data_ptr() for tensor in watched] != self._places:  # as after module.to(), share_memory_()
            return True
        return not all(map(operator.is_, self._named.values(), self._registered))

    def takes(self, x: Any) -> bool:
        """Whether a layer's packed weights may serve a call with this input at all."""
        if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or x.is_neg():
            return False
        layer = self.layer
        if (layer.training and layer.dropout > 0) or not layer.plain:
            return False
        return dispatch.chosen() != "reference" and not dispatch.in_transform()

    def routes(self, shape: torch.Size, threads: int) -> list[list[PrepackedKernel]] | None:
        """The routes of an input shape by layer and direction; None where the native engine can't take it."""
        layer = self.layer
        if len(shape) != 3 or 0 in shape or shape[2] != layer.input_size:
            return None
        batch, time = shape[:2] if layer.batch_first else (shape[1], shape[0])
        if self._weights is None:
            self._weights = [
                [registry.weights(layer._bind(suffix)) for suffix in suffixes] for suffixes in layer._stack
            ]
        rows = []
        for row in self._weights:
            routes = [
                PrepackedKernel(weights, time, batch, back, 1 if len(row) == 2 == threads else threads)
                for weights, back in zip(row, (False, True), strict=False)
                if weights is not None
            ]
            if len(routes) < len(row):
                return None
            rows.append(routes)
        return rows

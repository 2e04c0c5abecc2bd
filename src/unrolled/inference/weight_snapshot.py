"""A snapshot of a layer's weights: packed once for its kernels, and checked for later changes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from unrolled.engines import dispatch
from unrolled.engines.native import registry
from unrolled.engines.native.prepacked import PrepackedKernel, Weights
from unrolled.layers.recurrent import Recurrent

MAX_PLANS = 100  # plans by input shape that are kept; inputs of ever-changing lengths would fill the memory


class IOLayout:
    """Memory layout of inputs of one shape, and of their outputs, as kernels read and write them.

    Args:
        shape: Shape of the inputs, as the layer takes them.
        width: Number of features of an output.
        snapshot: The layer's weights.
    """

    def __init__(self, shape: torch.Size, width: int, snapshot: WeightSnapshot) -> None:
        batch_first = snapshot.layer.batch_first
        batch, time = shape[:2] if batch_first else (shape[1], shape[0])
        self._batch, self._dtype = batch, snapshot.dtype
        # With one row or one time step, (batch, time) and (time, batch) are the same in memory.
        self._transposed = batch_first and time > 1 and batch > 1
        first_axes = (batch, time) if batch_first and not self._transposed else (time, batch)
        self._output_template = torch.empty(*first_axes, width, dtype=snapshot.dtype, device="cpu")


class WeightSnapshot:
    """The weights of a layer at one moment.

    Attributes:
        layer: The layer.
        dtype: Dtype of the parameters. None if the layer has no parameters, or changes can't be detected.
        requires_grad: Whether any parameter requires gradients.
    """

    def __init__(self, layer: Recurrent) -> None:
        self.layer = layer
        params = list(layer.parameters())
        # Buffers count too, because a parametrization may read them.
        self._tensors = [*params, *layer.buffers()]
        detectable = params and not any(tensor.is_inference() for tensor in self._tensors)
        # A subclass with its own unroll may compute something else from the weights.
        detectable = detectable and type(layer).unroll is Recurrent.unroll
        self._parameter_dict, self._parameters = layer._parameters, list(layer._parameters.values())
        self._versions = [tensor._version for tensor in self._tensors] if detectable else []
        self._addresses = [tensor.data_ptr() for tensor in self._tensors] if detectable else []
        self.requires_grad = any(param.requires_grad for param in params)
        self.dtype = params[0].dtype if detectable else None
        self._weights: list[list[Weights | None]] | None = None  # by layer and direction

    def is_stale(self) -> bool:
        """Return whether a weight was replaced or changed since, as far as torch can detect it."""
        if self.dtype is None:
            return False
        tensors = self._tensors
        if [tensor._version for tensor in tensors] != self._versions:
            return True
        if [tensor.data_ptr() for tensor in tensors] != self._addresses:  # module.to(), share_memory_()
            return True
        return not all(map(operator.is_, self._parameter_dict.values(), self._parameters))

    def supports(self, x: Any) -> bool:
        """Return whether a call with this input can use the packed weights."""
        if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or x.is_neg():
            return False
        layer = self.layer
        if (layer.training and layer.dropout > 0) or not layer.plain:
            return False
        return dispatch.current_engine() != "reference" and not dispatch.in_transform()

    def prepacked_kernels(self, shape: torch.Size, threads: int) -> list[list[PrepackedKernel]] | None:
        """Return the kernels for an input shape, by layer and direction.

        Args:
            shape: Shape of the input, as the layer takes it.
            threads: Number of threads.

        Returns:
            The kernels, or None if the native engine doesn't support the cell or the shape.
        """
        layer = self.layer
        if len(shape) != 3 or 0 in shape or shape[2] != layer.input_size:
            return None
        batch, time = shape[:2] if layer.batch_first else (shape[1], shape[0])
        if self._weights is None:
            self._weights = [
                [registry.weights(layer._bind(suffix)) for suffix in suffixes] for suffixes in layer._stack
            ]
        kernels_by_layer = []
        for layer_weights in self._weights:
            # Two directions run at the same time; with two threads, each gets one.
            direction_threads = 1 if len(layer_weights) == 2 == threads else threads
            kernels = [
                PrepackedKernel(weights, time, batch, reverse, direction_threads)
                for weights, reverse in zip(layer_weights, (False, True), strict=False)
                if weights is not None
            ]
            if len(kernels) < len(layer_weights):
                return None
            kernels_by_layer.append(kernels)
        return kernels_by_layer

"""A snapshot of a layer's weights: packed once for its kernels, and checked for later changes."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer

from unrolled.engines import dispatch
from unrolled.engines.compiler.batch_layout import Layout
from unrolled.engines.compiler.ir import UnsupportedError
from unrolled.engines.compiler.step_values import StepValues, step_values
from unrolled.engines.memory import all_readable
from unrolled.engines.native.kernel import run_at_once
from unrolled.engines.native.prepacked import PrepackedKernel, Weights
from unrolled.engines.packed_weights import packed_weights
from unrolled.engines.selection import current_engine
from unrolled.layers.recurrent import Recurrent

_UNROLL = Recurrent.unroll
_version = operator.attrgetter("_version")


class WeightSnapshot:
    """The weights of a layer at one moment.

    Only weights that are parameters of the layer are packed. A wrapper that sets them as plain attributes
    (weight drop) and a parametrization compute new ones in each call.

    Attributes:
        layer: The layer.
        dtype: Dtype of the parameters. None if they can't be packed, or if changes can't be detected.
        plans: The plans that use the packed weights, by what they depend on.
    """

    def __init__(self, layer: Recurrent) -> None:
        self.layer = layer
        self.plans: dict[Any, Any] = {}
        self._parameters = dict(layer._parameters)
        self._values = list(self._parameters.values())
        self._names = [name for name, value in self._parameters.items() if value is not None]
        self._tensors = [value for value in self._values if value is not None]
        self._training, self._default_dtype = layer.training, torch.get_default_dtype()
        weights = [self._parameters.get(name) for named in layer._named.values() for _, name, _ in named]
        packable = weights and all(type(weight) is Parameter and is_plain(weight) for weight in weights)
        # Nothing records a change of an inference tensor.
        packable = packable and not any(tensor.is_inference() for tensor in self._tensors)
        # A subclass with its own unroll may compute something else from the weights.
        if packable and type(layer).unroll is _UNROLL:
            self.dtype: torch.dtype | None = self._tensors[0].dtype
            self._versions = [tensor._version for tensor in self._tensors]
            # While these tensors exist, no other memory can have their addresses.
            self._memory = [tensor.detach() for tensor in self._tensors]
            self._addresses = [tensor.data_ptr() for tensor in self._memory]
            _notice_fused_optimizers()
            _snapshots[id(self)] = self
        else:
            self.dtype = None
        self._weights: list[list[Weights | None]] | None = None  # by layer and direction
        self._step_values: list[StepValues] = []  # of the cells whose kernels are prepared

    def is_stale(self) -> bool:
        """Return whether a weight, the mode or a value that a step reads has changed since."""
        layer, values = self.layer, self.layer._parameters.values()
        if len(values) != len(self._values) or not all(map(operator.is_, values, self._values)):
            return True
        if self.dtype is not None:
            tensors = self._tensors
            if list(map(_version, tensors)) != self._versions:
                return True
            if list(map(Tensor.data_ptr, tensors)) != self._addresses:  # module.to(), share_memory_()
                return True
        # A cell's step can depend on both.
        if layer.training is not self._training or torch.get_default_dtype() is not self._default_dtype:
            return True
        for read in self._step_values:  # noqa: SIM110  # a generator would cost 0.2 microseconds
            if not read.unchanged():
                return True
        return False

    def changes(self) -> list[str]:
        """Return what has happened to the weights since, such as ``"weight_hh_l0 was replaced"``."""
        if self.dtype is None:
            return []
        old, new = self._parameters, self.layer._parameters
        changes = [f"{name} was removed" for name in old if name not in new]
        changes += [f"{name} was added" for name in new if name not in old]
        changes += [f"{name} was replaced" for name in new if name in old and new[name] is not old[name]]
        before = zip(self._names, self._tensors, self._versions, self._addresses, strict=True)
        for name, tensor, version, address in before:
            if new.get(name) is tensor and (tensor._version != version or tensor.data_ptr() != address):
                changes.append(f"{name} was changed")
        return changes

    def requires_grad(self) -> bool:
        """Return whether any parameter requires gradients."""
        return any(tensor.requires_grad for tensor in self._tensors)

    def supports(self, x: Any) -> bool:
        """Return whether a call with this input can use the packed weights."""
        if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or x.is_nested:
            return False
        if x.is_neg() or not all_readable([x]):
            return False
        layer = self.layer
        if (layer.training and layer.dropout > 0) or not layer.plain or "unroll" in layer.__dict__:
            return False
        return current_engine() != "reference" and not dispatch.in_transform()

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
            cells = [[layer._bind(suffix) for suffix in suffixes] for suffixes in layer._stack]
            with contextlib.suppress(UnsupportedError):
                self._step_values = [step_values(cell) for directions in cells for cell in directions]
            self._weights = [[packed_weights(cell) for cell in directions] for directions in cells]
        kernels_by_layer = []
        for layer_weights in self._weights:
            weights = [part for part in layer_weights if part is not None]
            if len(weights) < len(layer_weights):
                return None
            layout = Layout(time, batch)
            arguments = [
                part.compiled.inference.arguments(layout, False, threads, 0, packed=True) for part in weights
            ]
            kernel_threads = 1 if run_at_once(arguments, threads) else threads
            kernels = [
                PrepackedKernel(part, time, batch, reverse, kernel_threads)
                for part, reverse in zip(weights, (False, True), strict=False)
            ]
            kernels_by_layer.append(kernels)
        return kernels_by_layer


def is_plain(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor lie in the CPU's memory as they are."""
    return tensor.is_cpu and not (tensor.is_nested or tensor.is_neg()) and all_readable([tensor])


_snapshots: weakref.WeakValueDictionary[int, WeightSnapshot] = weakref.WeakValueDictionary()


@functools.cache
def _notice_fused_optimizers() -> None:
    """From now on, mark snapshots as stale after a step of a fused optimizer.

    Fused optimizers change parameters without a change of their version, which other operations increment.
    """
    optimizer.register_optimizer_step_post_hook(_after_step)


def _after_step(stepped: optimizer.Optimizer, args: Any, kwargs: Any) -> None:
    changed = {id(param) for group in stepped.param_groups if group.get("fused") for param in group["params"]}
    for reference in _snapshots.valuerefs() if changed else ():
        snapshot = reference()
        if snapshot is not None:
            for index, tensor in enumerate(snapshot._tensors):
                if id(tensor) in changed:
                    snapshot._versions[index] = -1

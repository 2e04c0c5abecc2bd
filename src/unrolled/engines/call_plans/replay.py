"""Recorded launches as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from unrolled.engines.call_plans import native_replay
from unrolled.engines.call_plans.conditions import address_of
from unrolled.engines.call_plans.launches import RecordedFunction
from unrolled.engines.call_plans.native_replay import NativeReplay
from unrolled.engines.memory import all_readable


class Replay:
    """Recorded launches as a function of tensors.

    Args:
        function: The launches.
    """

    def __init__(self, function: RecordedFunction) -> None:
        self.function = function
        self._native: NativeReplay | None = None
        # An empty tensor is created faster like another one, which must have the strides of a contiguous one.
        shapes = function.inputs
        self._strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
        self._templates = [shapes.index(shape) if shape in shapes else None for shape in function.results]

    def run(self, tensors: Sequence[Any]) -> Sequence[Tensor] | None:
        """Return new tensors with the results, or None if the inputs aren't those of the recorded call.

        Args:
            tensors: The inputs, of any memory layout.

        Raises:
            MemoryError: If there is not enough memory for a kernel's buffers.
        """
        if self._native is None:
            self._native = native_replay.new_replay(self.function)
        if self._native is None:
            return self._run_in_python(tensors)
        results: Sequence[Tensor] | None = self._native.run(*tensors)
        if results is None:
            try:
                contiguous = list(map(_contiguous, tensors))
            except RuntimeError:  # a batch of gradients, which has no copy, or no memory left
                return None
            if any(copy is not tensor for copy, tensor in zip(contiguous, tensors, strict=True)):
                results = self._native.run(*contiguous)
        return results

    def _run_in_python(self, tensors: Sequence[Any]) -> Sequence[Tensor] | None:
        addresses, function = [0], self.function
        try:
            contiguous = list(map(_contiguous, tensors))
            for tensor, shape in zip(contiguous, function.inputs, strict=True):
                addresses.append(address_of(tensor, shape, function.dtype))
            if not all(addresses[1:]):
                return None
            results = [
                torch.empty_like(contiguous[index])
                if index is not None and contiguous[index].stride() == self._strides[index]
                else contiguous[0].new_empty(shape)
                for index, shape in zip(self._templates, function.results, strict=True)
            ]
        except RuntimeError:  # a tensor without memory, or no memory left
            return None
        addresses += [result.data_ptr() for result in results]
        function.launches.run(addresses)
        return results


def _contiguous(tensor: Any) -> Any:
    """Return a contiguous tensor with the same values, or the value itself if it isn't an ordinary tensor."""
    kind = type(tensor)
    if (kind is not Tensor and kind is not Parameter) or tensor.is_contiguous():
        return tensor
    if tensor.layout is not torch.strided or not tensor.is_cpu or tensor.is_nested or tensor.is_neg():
        return tensor
    if not all_readable([tensor]):
        return tensor
    return tensor.detach().contiguous()

"""The fast path of a stream over a single layer: kernels that alternate between two buffers of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module

from unrolled.engines.native.prepacked import BoundKernel, PrepackedKernel
from unrolled.inference.weight_snapshot import MAX_PLANS, IOLayout, WeightSnapshot
from unrolled.layers.module import State
from unrolled.layers.recurrent import Recurrent

_Buffers = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class DoubleBuffer:
    """A layer with two buffers of states: each call reads one buffer and writes the other.

    The states have the same addresses in every second call. A call therefore only has to fill in the
    addresses of its input and output.

    Attributes:
        index: Index of the buffer that holds the current states. None if the states are not in a buffer.
    """

    def __init__(self, layer: Recurrent) -> None:
        self._layer, self._snapshot = layer, WeightSnapshot(layer)
        self._plans: dict[Any, _StreamPlan | None] = {}  # by input shape and number of threads
        self._buffers: dict[Any, _Buffers] = {}  # of the last batch size and dtype
        self._active: _Buffers | None = None  # the buffers that hold the current states
        self.index: int | None = None

    def run(self, x: Any, states: dict[str, State]) -> Tensor | None:
        """Run the layer on the next chunk.

        Args:
            x: The chunk, as the layer takes it.
            states: The stream's states. They move to the buffers, and the dictionary is cleared.

        Returns:
            The output, or None if the layer itself must be called.
        """
        layer = self._layer
        if has_custom_call(layer):
            return None
        if self._snapshot.is_stale():
            self._snapshot = WeightSnapshot(self._layer)
            self._plans.clear()
        if not self._snapshot.supports(x):
            return None
        key = (x.shape, torch.get_num_threads())
        try:
            plan = self._plans[key]
        except KeyError:
            plan = self._create_plan(*key)
        if plan is None:
            return None
        if self.index is None:
            if not plan.load(states.get("")):
                return None
            states.clear()
            self._active, self.index = plan.buffers, 0
        elif plan.buffers is not self._active:  # another batch size
            return None
        output = plan.run(x, self.index)
        self.index = 1 - self.index
        return output

    def _create_plan(self, shape: torch.Size, threads: int) -> _StreamPlan | None:
        snapshot, plan = self._snapshot, None
        kernels_by_layer = snapshot.prepacked_kernels(shape, threads)
        if kernels_by_layer is not None:
            batch = shape[0 if snapshot.layer.batch_first else 1]
            key = batch, snapshot.dtype
            if key not in self._buffers:
                self._buffers = {key: _create_buffers(snapshot, batch)}
            forward_kernels = [kernels[0] for kernels in kernels_by_layer]
            plan = _StreamPlan(forward_kernels, shape, snapshot, self._buffers[key])
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[shape, threads] = plan
        return plan

    def take_state(self) -> State:
        """Return the current states and mark the buffers as empty."""
        assert self.index is not None
        assert self._active is not None
        tensors = tuple(part.clone() for part in self._active[self.index])
        self.index = None
        return tensors if len(tensors) > 1 else tensors[0]


class _StreamPlan(IOLayout):
    """The kernels of all stacked layers for chunks of one shape.

    Attributes:
        buffers: The two buffers of states.
    """

    def __init__(
        self, kernels: list[PrepackedKernel], shape: torch.Size, snapshot: WeightSnapshot, buffers: _Buffers
    ) -> None:
        super().__init__(shape, kernels[0].widths[0], snapshot)
        self._hidden = [torch.empty_like(self._output_template) for _ in kernels[1:]]  # between layers
        self.buffers = buffers
        self._bound_kernels = [_bind_kernels(kernels, *buffers), _bind_kernels(kernels, *buffers[::-1])]

    def load(self, state: State | None) -> bool:
        """Copy states to the first buffer, zeros if None; return False if they don't fit."""
        if state is None:
            for buffer in self.buffers[0]:
                buffer.zero_()
            return True
        tensors = state_tensors(state)
        if len(tensors) != len(self.buffers[0]):
            return False
        for buffer, tensor in zip(self.buffers[0], tensors, strict=True):
            if type(tensor) is not Tensor or tensor.shape != buffer.shape or tensor.dtype is not buffer.dtype:
                return False
            if not tensor.is_cpu:
                return False
        for buffer, tensor in zip(self.buffers[0], tensors, strict=True):
            buffer.copy_(tensor.detach())  # of any memory layout
        return True

    def run(self, x: Tensor, index: int) -> Tensor:
        """Return the output of a chunk, reading states from one buffer and writing them to the other."""
        x = (x.transpose(0, 1) if self._transposed else x).contiguous()
        output = torch.empty_like(self._output_template)
        kernels = self._bound_kernels[index]
        if len(kernels) == 1:
            kernels[0].run(x.data_ptr(), output.data_ptr())
            return output.transpose(0, 1) if self._transposed else output
        source = x.data_ptr()
        for kernel, hidden in zip(kernels, self._hidden):  # noqa: B905  # the last kernel writes the output
            kernel.run(source, source := hidden.data_ptr())
        kernels[-1].run(source, output.data_ptr())
        return output.transpose(0, 1) if self._transposed else output


def has_custom_call(layer: Recurrent) -> bool:
    """Return whether a call of a layer runs hooks, or a forward that is set on the instance."""
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        return True
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def _create_buffers(snapshot: WeightSnapshot, batch: int) -> _Buffers:
    layer = snapshot.layer
    sizes = layer._first.state_sizes().values()
    with torch.inference_mode(False):  # outside of inference mode they are written to as well
        first, second = (
            tuple(
                torch.empty(layer.num_layers, batch, size, dtype=snapshot.dtype, device="cpu")
                for size in sizes
            )
            for _ in range(2)
        )
    return first, second


def _bind_kernels(
    kernels: list[PrepackedKernel], source: tuple[Tensor, ...], target: tuple[Tensor, ...]
) -> list[BoundKernel]:
    """Bind each layer's kernel to the buffer that it reads states from and the buffer that it writes to."""
    return [
        kernel.bind([part[k].data_ptr() for part in source], [part[k].data_ptr() for part in target])
        for k, kernel in enumerate(kernels)
    ]


def state_tensors(state: Any) -> tuple[Any, ...]:
    """Return the tensors of a state as a tuple."""
    return state if isinstance(state, tuple) else (state,)

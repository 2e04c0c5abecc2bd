"""The fast path of a stream over a single layer: kernels that alternate between two buffers of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.engines.memory import all_readable
from unrolled.engines.native.prepacked import BoundKernel, PrepackedKernel
from unrolled.inference.custom_calls import has_custom_call
from unrolled.inference.plans import Plan, PlanCache
from unrolled.inference.weight_snapshot import WeightSnapshot
from unrolled.layers.module import State
from unrolled.layers.recurrent import Recurrent

_Buffers = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

_SCRATCH_SIZE = 4096  # elements; longer outputs between layers are allocated in each call


class DoubleBuffer(PlanCache["_StreamPlan"]):
    """A layer with two buffers of states: each call reads one buffer and writes the other.

    The states have the same addresses in every second call. A call therefore only has to fill in the
    addresses of its input and output.

    Attributes:
        index: Index of the buffer that holds the current states. None if the states are not in a buffer.
    """

    def __init__(self, layer: Recurrent) -> None:
        super().__init__(layer, allow_changes=True)
        self._key: Any = None  # the last batch size and dtype, which the buffers are for
        self._buffers: _Buffers = (), ()
        self._scratch = torch.empty(0)  # for short outputs between layers
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
        if has_custom_call(self._layer):
            return None
        plan = self.find_plan(x)
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

    def _create_plan(
        self, kernels: list[list[PrepackedKernel]], shape: torch.Size, snapshot: WeightSnapshot
    ) -> _StreamPlan:
        batch = shape[0 if snapshot.layer.batch_first else 1]
        key = batch, snapshot.dtype
        if self._key != key:
            snapshot.plans.clear()  # their buffers have another size
            self._key, self._buffers = key, _create_buffers(snapshot, batch)
            self._scratch = torch.empty(2, _SCRATCH_SIZE, dtype=snapshot.dtype, device="cpu")
        forward_kernels = [first for first, *_ in kernels]
        return _StreamPlan(forward_kernels, shape, snapshot, self._buffers, self._scratch)

    def take_state(self) -> State:
        """Return the current states and mark the buffers as empty."""
        assert self.index is not None
        assert self._active is not None
        tensors = tuple(part.clone() for part in self._active[self.index])
        self.index = None
        return tensors if len(tensors) > 1 else tensors[0]


class _StreamPlan(Plan):
    """The kernels of all stacked layers for chunks of one shape.

    Attributes:
        buffers: The two buffers of states.
    """

    def __init__(
        self,
        kernels: list[PrepackedKernel],
        shape: torch.Size,
        snapshot: WeightSnapshot,
        buffers: _Buffers,
        scratch: Tensor,
    ) -> None:
        super().__init__(shape, kernels[0].widths[0], snapshot)
        self.buffers = buffers
        self._bound_kernels = [_bind_kernels(kernels, *buffers), _bind_kernels(kernels, *buffers[::-1])]
        self._output_size = self._output_template.numel()
        self._scratch = scratch if self._output_size <= _SCRATCH_SIZE else None

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
            if not tensor.is_cpu or not all_readable([tensor]):
                return False
        for buffer, tensor in zip(self.buffers[0], tensors, strict=True):
            buffer.copy_(tensor.detach())  # of any memory layout
        return True

    def run(self, x: Tensor, index: int) -> Tensor:
        """Return the output of a chunk, reading states from one buffer and writing them to the other."""
        x = (x.transpose(0, 1) if self._transposed else x).contiguous()
        source = x.data_ptr()
        output = torch.empty_like(self._output_template)
        lower, top = self._bound_kernels[index]
        if lower:
            scratch = x.new_empty(2, self._output_size) if self._scratch is None else self._scratch
            first = scratch.data_ptr()
            targets = first, first + scratch.nbytes // 2
            for k, kernel in enumerate(lower):
                kernel.run(source, source := targets[k % 2])
        top.run(source, output.data_ptr())
        return output.transpose(0, 1) if self._transposed else output


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
) -> tuple[list[BoundKernel], BoundKernel]:
    """Bind each layer's kernel to the buffer that it reads states from and the buffer that it writes to.

    Returns:
        The kernels of all layers but the last, and that of the last.
    """
    *lower, top = [
        kernel.bind([part[k].data_ptr() for part in source], [part[k].data_ptr() for part in target])
        for k, kernel in enumerate(kernels)
    ]
    return lower, top


def state_tensors(state: Any) -> tuple[Any, ...]:
    """Return the tensors of a state as a tuple."""
    return state if isinstance(state, tuple) else (state,)

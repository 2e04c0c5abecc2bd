"""Plans: the kernels of a layer, prepared for inputs of one shape."""

from __future__ import annotations

import abc
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from unrolled.engines.native.prepacked import PrepackedKernel
from unrolled.engines.threads import thread_count
from unrolled.inference.weight_snapshot import WeightSnapshot
from unrolled.layers.recurrent import Recurrent

MAX_PLANS = 100  # per layer; inputs of ever-changing lengths would fill the memory


class Plan:
    """The kernels of a layer for inputs of one shape. It holds no memory for inputs, outputs or states.

    Args:
        shape: Shape of the inputs, as the layer takes them.
        width: Number of features of an output of one direction.
        snapshot: The layer's weights.
    """

    def __init__(self, shape: torch.Size, width: int, snapshot: WeightSnapshot) -> None:
        batch_first = snapshot.layer.batch_first
        batch, time = shape[:2] if batch_first else (shape[1], shape[0])
        self._batch, self._dtype = batch, snapshot.dtype
        # With one row or one time step, (batch, time) and (time, batch) are the same in memory.
        self._transposed = batch_first and time > 1 and batch > 1
        first_axes = (batch, time) if batch_first and not self._transposed else (time, batch)
        # Of one direction, in the layout that kernels write. Allocating from a template is faster.
        self._output_template = memoryless(*first_axes, width, dtype=snapshot.dtype)


def memoryless(*shape: int, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor with memory for one element. ``torch.empty_like`` of it is contiguous."""
    return torch.empty([1] * len(shape), dtype=dtype, device="cpu").expand(shape)


_Plan = TypeVar("_Plan", bound=Plan)


class PlanCache(abc.ABC, Generic[_Plan]):
    """The packed weights of a layer, and its plans.

    Args:
        layer: The layer.
        allow_changes: Pack the weights again if they have changed. If False, a change is an error.

    Attributes:
        label: Name of the layer, for error messages.
    """

    def __init__(self, layer: Recurrent, allow_changes: bool) -> None:
        self._layer, self._allow_changes = layer, allow_changes
        self._snapshot = WeightSnapshot(layer)
        self.label = type(layer).__name__

    def find_plan(self, x: Any) -> _Plan | None:
        """Return the plan for an input, or None if the layer must run as usual.

        Raises:
            RuntimeError: If a weight has changed.
        """
        snapshot = self._snapshot
        if snapshot.is_stale():
            snapshot = self._renew_snapshot()
        if not snapshot.supports(x):
            return None
        key = (x.shape, thread_count(), self._layer.batch_first)
        try:
            plan: _Plan | None = snapshot.plans[key]
        except KeyError:
            plan = self._add_plan(snapshot, key)
        return plan

    def _renew_snapshot(self) -> WeightSnapshot:
        changes = [] if self._allow_changes else self._snapshot.changes()
        if changes:
            raise RuntimeError(
                f"{self.label}: {changes[0]} inside unrolled.frozen(...). Change weights outside of the block"
            )
        self._snapshot = snapshot = WeightSnapshot(self._layer)
        return snapshot

    def _add_plan(self, snapshot: WeightSnapshot, key: tuple[torch.Size, int, bool]) -> _Plan | None:
        shape, threads, _ = key
        kernels = snapshot.prepacked_kernels(shape, threads)
        plan = None if kernels is None else self._create_plan(kernels, shape, snapshot)
        if len(snapshot.plans) >= MAX_PLANS:
            snapshot.plans.clear()
        snapshot.plans[key] = plan
        return plan

    @abc.abstractmethod
    def _create_plan(
        self, kernels: list[list[PrepackedKernel]], shape: torch.Size, snapshot: WeightSnapshot
    ) -> _Plan:
        """Return the plan for inputs of a shape.

        Args:
            kernels: The kernels, by layer and direction.
            shape: Shape of the inputs, as the layer takes them.
            snapshot: The layer's weights.
        """

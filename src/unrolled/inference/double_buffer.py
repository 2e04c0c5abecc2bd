"""A layer alone, run piece by piece at the least cost: its states go to and fro between two places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module

from unrolled.engines.native.prepacked import BoundKernel, PrepackedKernel
from unrolled.inference.weight_snapshot import IOLayout, WeightSnapshot
from unrolled.layers.module import State
from unrolled.layers.recurrent import Recurrent

_Places = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
_MOST_WAYS = 100


class DoubleBuffer:
    """A layer whose states go to and fro between two places.

    Attributes:
        at: the place where the states are; None: elsewhere.
    """

    def __init__(self, layer: Recurrent) -> None:
        self._layer, self._held = layer, WeightSnapshot(layer)
        self._ways: dict[Any, _StreamPlan | None] = {}
        self._places: dict[Any, _Places] = {}  # those of the last number of rows and dtype
        self._now: _Places | None = None
        self.at: int | None = None

    def run(self, x: Any, states: dict[str, State]) -> Tensor | None:
        """The output of the next piece; None where the layer has to be called itself."""
        layer = self._layer
        if hooked(layer):
            return None
        if self._held.changed():
            self._held = WeightSnapshot(self._layer)
            self._ways.clear()
        if not self._held.takes(x):
            return None
        key = (x.shape, torch.get_num_threads())
        try:
            way = self._ways[key]
        except KeyError:
            way = self._made(*key)
        if way is None:
            return None
        if self.at is None:
            if not way.load(states.get("")):
                return None
            states.clear()
            self._now, self.at = way.places, 0
        elif way.places is not self._now:  # another number of rows
            return None
        output = way.run(x, self.at)
        self.at = 1 - self.at
        return output

    def _made(self, shape: torch.Size, threads: int) -> _StreamPlan | None:
        held, way = self._held, None
        routes = held.routes(shape, threads)
        if routes is not None:
            batch = shape[0 if held.layer.batch_first else 1]
            key = batch, held.dtype
            if key not in self._places:
                self._places = {key: _places(held, batch)}
            way = _StreamPlan([row[0] for row in routes], shape, held, self._places[key])
        if len(self._ways) >= _MOST_WAYS:  # pieces of lengths that always differ
            self._ways.clear()
        self._ways[shape, threads] = way
        return way

    def unload(self) -> State:
        """The states, which are then no longer here."""
        assert self.at is not None
        assert self._now is not None
        parts = tuple(part.clone() for part in self._now[self.at])
        self.at = None
        return parts if len(parts) > 1 else parts[0]


class _StreamPlan(IOLayout):
    """A layer's loops, one on the other, for pieces of one shape.

    Attributes:
        places: of the states, before and after a call or the reverse.
    """

    def __init__(
        self, routes: list[PrepackedKernel], shape: torch.Size, held: WeightSnapshot, places: _Places
    ) -> None:
        super().__init__(shape, routes[0].widths[0], held)
        self._inner = [torch.empty_like(self._output) for _ in routes[1:]]  # from loop to loop
        self.places = places
        self._bound_kernels = [_bound_kernels(routes, *places), _bound_kernels(routes, *places[::-1])]

    def load(self, state: State | None) -> bool:
        """Put the states in the first place; False where they don't fit."""
        if state is None:
            for place in self.places[0]:
                place.zero_()
            return True
        parts = parts_of(state)
        if len(parts) != len(self.places[0]):
            return False
        for place, part in zip(self.places[0], parts, strict=True):
            if type(part) is not Tensor or part.shape != place.shape or part.dtype is not place.dtype:
                return False
            if not part.is_cpu:
                return False  # a copy takes care of all the rest
        for place, part in zip(self.places[0], parts, strict=True):
            place.copy_(part.detach())
        return True

    def run(self, x: Tensor, at: int) -> Tensor:
        """The output of a piece, from the states in one place to the other."""
        x = (x.transpose(0, 1) if self._turned else x).contiguous()
        output = torch.empty_like(self._output)
        hops = self._bound_kernels[at]
        if len(hops) == 1:
            hops[0].run(x.data_ptr(), output.data_ptr())
            return output.transpose(0, 1) if self._turned else output
        read = x.data_ptr()
        for hop, inner in zip(hops, self._inner):  # noqa: B905  # the last hop writes the output
            hop.run(read, read := inner.data_ptr())
        hops[-1].run(read, output.data_ptr())
        return output.transpose(0, 1) if self._turned else output


def hooked(layer: Recurrent) -> bool:
    """Whether a call of a layer is more than its forward, or its forward another one than its class has."""
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        return True
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def _places(held: WeightSnapshot, batch: int) -> _Places:
    layer = held.layer
    sizes = layer._first.state_sizes().values()
    with torch.inference_mode(False):  # they are written to outside of it, too
        a, b = (
            tuple(
                torch.empty(layer.num_layers, batch, size, dtype=held.dtype, device="cpu") for size in sizes
            )
            for _ in range(2)
        )
    return a, b


def _bound_kernels(
    routes: list[PrepackedKernel], starts: tuple[Tensor, ...], ends: tuple[Tensor, ...]
) -> list[BoundKernel]:
    """The calls of the loops from states in one place to states in the other."""
    return [
        route.between([part[k].data_ptr() for part in starts], [part[k].data_ptr() for part in ends])
        for k, route in enumerate(routes)
    ]


def parts_of(state: Any) -> tuple[Any, ...]:
    """The tensors of a state."""
    return state if isinstance(state, tuple) else (state,)

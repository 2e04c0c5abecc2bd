"""Calls inside a torch transform: compile and export, vmap and torch.func, forward mode, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec
from unrolled.engines import backends
from unrolled.engines._torch_private import (
    TransformType,
    any_autocast_enabled,
    constant_for_dynamo,
    current_dispatch_mode,
    forward_mode_active,
    functorch_interpreter,
    functorch_interpreters,
    jit_tracing_state,
)
from unrolled.engines.torch_ops import operators
from unrolled.engines.torch_ops.recording import in_pre_dispatch

States = tuple[Tensor, ...]

_ops: Any = torch.ops.unrolled
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
_AUTOCAST_DEVICES = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))
_is_compiling = torch.compiler.is_compiling


def active() -> bool:
    """Return whether a torch transform is active, so that compiled loops must be called as operators."""
    return (
        _is_compiling()
        or jit_tracing_state() is not None
        or functorch_interpreter() is not None
        or current_dispatch_mode() is not None
        or forward_mode_active()
        or in_pre_dispatch()
    )


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is active. The operators don't support it."""
    levels = functorch_interpreters() or ()
    jvp = TransformType.Jvp
    return forward_mode_active() or any(level.key() == jvp for level in levels)


@constant_for_dynamo
def in_functorch() -> bool:
    """Return whether a transform of torch.func is active. Under vmap, values of a tensor can't be read."""
    return functorch_interpreter() is not None


def maybe_autocast() -> bool:
    """Return False if autocast is off for every device; cheaper than :func:`autocast_enabled`."""
    return any_autocast_enabled() or _is_compiling()


def autocast_enabled(device: str) -> bool:
    """Return whether autocast is enabled for a device type, False if the device type doesn't support it."""
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def cast_for_autocast(
    cells: Sequence[Cell], x: Tensor, states: Sequence[States | None]
) -> tuple[list[Cell], Tensor, list[States | None]]:
    """Cast bound cells, their input and their states to autocast's dtype.

    Everything is cast, so that a state has the same dtype at each time step. float64 is left as it is, as
    autocast itself does.
    """
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    cast_cells = [cell.bind({name: cast(getattr(cell, name)) for name in cell.shapes()}) for cell in cells]
    cast_states = [None if state is None else tuple([cast(part) for part in state]) for state in states]
    return cast_cells, cast(x), cast_states


def run(
    cells: Sequence[Cell],
    x: Tensor,
    states: Sequence[States | None],
    sizes: list[int] | Tensor | None,
    wrapper_specs: Sequence[WrapperSpec],
) -> list[tuple[Tensor, States]] | str:
    """Run bound cells over a sequence as a torch operator.

    The arguments are those of :func:`unrolled.engines.dispatch.run`.

    Returns:
        The results, or the reason as a string if the operator doesn't support the call.
    """
    dtype = x.dtype
    inputs = [x]
    for cell, state in zip(cells, states, strict=False):
        inputs += [*(state or ()), *[getattr(cell, name) for name in cell.shapes()]]
    reason = backends.unsupported(inputs, in_graph=True)
    if reason is not None:
        return reason
    compute_dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    direction_texts: list[str] = []
    tensors: list[Tensor] = []
    result_counts: list[int] = []
    for cell, spec, state, reverse in zip(cells, wrapper_specs, states, (False, True), strict=False):
        text, own_names, state_count, reason = operators.serialize_direction(
            cell.unbound, spec, cell.training, compute_dtype, x.device, state is not None, reverse
        )
        if reason:
            return str(reason)
        result_counts.append(1 + state_count)
        direction_texts.append(text)
        differentiable = [*(state or ()), *[getattr(cell, name) for name in cell.shapes()]]
        if compute_dtype is not dtype:
            differentiable = [tensor.to(compute_dtype) for tensor in differentiable]
        tensors += differentiable
        tensors += [getattr(cell, name) for name in own_names]
    sizes_tensor = torch.tensor(sizes, device="cpu") if isinstance(sizes, list) else sizes
    x = x if compute_dtype is dtype else x.to(compute_dtype)
    flat: list[Tensor] = _ops.recurrence(x, tensors, sizes_tensor, f"[{', '.join(direction_texts)}]")
    results: list[tuple[Tensor, States]] = []
    for count in result_counts:
        part, flat = flat[:count], flat[count:]
        output, *final = part if compute_dtype is dtype else [tensor.to(dtype) for tensor in part]
        results.append((output, tuple(final)))
    return results
